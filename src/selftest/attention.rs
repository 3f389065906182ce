//! Attention.

use super::agreement::{Agreement, get, put, put_integers, put_real, round, unwritten};
use crate::{
    DType, Result,
    ops::attention::{Attention, AttentionShape, HeadShape, Strided},
};

/// What hides keys beside the causal border.
#[derive(Clone, Copy, Debug)]
enum Mask {
    Nothing,
    /// Keys of earlier documents of so many tokens.
    Documents(usize),
    /// Some keys, anyhow: of some queries all.
    Any,
}

struct Inputs {
    shape: AttentionShape,
    /// Rows of all keys' tokens, the last of which are the queries'.
    qkv: Vec<f64>,
    dout: Vec<f64>,
    first_key: Option<Vec<i32>>,
}

impl Inputs {
    fn new(agreement: &Agreement, heads: HeadShape, [batch, queries, keys]: [usize; 3], mask: Mask) -> Self {
        let shape = AttentionShape { heads, batch, queries, keys, scale: 1.0 / (heads.head_dim as f64).sqrt() };
        let first = |query: usize| {
            let position = keys - queries + query % queries;
            match mask {
                Mask::Nothing => 0,
                Mask::Documents(tokens) => (position / tokens * tokens) as i32,
                Mask::Any => (query * 31 % (position + 3)) as i32 - 1,
            }
        };
        Self {
            shape,
            qkv: agreement.normal(1, batch * keys * heads.row(), 1.0),
            dout: agreement.normal(2, batch * queries * heads.queries(), 1.0),
            first_key: (!matches!(mask, Mask::Nothing)).then(|| (0..batch * queries).map(first).collect()),
        }
    }

    /// The keys that a query (counted through all sequences) sees.
    fn seen(&self, query: usize) -> std::ops::Range<usize> {
        let first = self.first_key.as_ref().map_or(0, |first| first[query].max(0) as usize);
        first..self.shape.keys - self.shape.queries + query % self.shape.queries + 1
    }

    /// Where a head's part of a token's row begins, counting query, key and value heads.
    fn at(&self, sequence: usize, position: usize, head: usize) -> usize {
        let heads = self.shape.heads;
        (sequence * self.shape.keys + position) * heads.row() + head * heads.head_dim
    }
}

/// out and log_sum_exp.
fn forward<B: Attention>(backend: &B, inputs: &Inputs) -> Result<[Vec<f64>; 2]> {
    let (shape, heads) = (inputs.shape, inputs.shape.heads);
    let rows = shape.batch * shape.queries;
    let qkv = put_real(backend, &inputs.qkv)?;
    let first_key = inputs.first_key.as_ref().map(|first| put_integers(backend, first)).transpose()?;
    let mut out = unwritten(backend, backend.compute(), rows * heads.queries())?;
    let mut log_sum_exp = unwritten(backend, backend.statistics(), rows * heads.kv_heads * heads.group)?;
    let part = |at: usize| Strided { view: qkv.slice(at..qkv.len()), stride: heads.row(), rows: shape.keys };
    let (q, k) = (part((shape.keys - shape.queries) * heads.row()), part(heads.queries()));
    let v = part(heads.queries() + heads.keys());
    let first_key = first_key.as_ref().map(|first| first.view());
    backend.attention(out.view_mut(), log_sum_exp.view_mut(), q, k, v, first_key, shape);
    Ok([get(backend, &out)?, get(backend, &log_sum_exp)?])
}

/// dqkv.
fn backward<B: Attention>(backend: &B, inputs: &Inputs, [out, log_sum_exp]: &[Vec<f64>; 2]) -> Result<Vec<f64>> {
    let (qkv, dout, out) = (put_real(backend, &inputs.qkv)?, put_real(backend, &inputs.dout)?, put_real(backend, out)?);
    let log_sum_exp = put(backend, backend.statistics(), log_sum_exp)?;
    let first_key = inputs.first_key.as_ref().map(|first| put_integers(backend, first)).transpose()?;
    let mut dqkv = unwritten(backend, backend.compute(), inputs.qkv.len())?;
    let first_key = first_key.as_ref().map(|first| first.view());
    let (dout, out, log_sum_exp) = (dout.view(), out.view(), log_sum_exp.view());
    backend.attention_backward(dqkv.view_mut(), dout, out, log_sum_exp, qkv.view(), first_key, inputs.shape);
    get(backend, &dqkv)
}

/// Sum of products, and of their sizes.
fn dot(a: &[f64], b: &[f64]) -> (f64, f64) {
    a.iter().zip(b).fold((0.0, 0.0), |(sum, size), (a, b)| (sum + a * b, size + (a * b).abs()))
}

/// What each result may be off by, but for its own rounding.
struct Bounds {
    out: Vec<f64>,
    log_sum_exp: Vec<f64>,
    dqkv: Vec<f64>,
}

/// Rounding of f32, in which everything is summed; twice that of one addition, since tensor cores may cut off.
const SINGLE: f64 = 2.0 * 1.0 / (1u32 << 24) as f64;

impl Bounds {
    /// `real` is the rounding of the compute type, to which probabilities and the scores' gradients are rounded.
    fn new(inputs: &Inputs, out: &[f64], real: f64) -> Self {
        let (shape, HeadShape { kv_heads, group, .. }) = (inputs.shape, inputs.shape.heads);
        let (rows, heads) = (shape.batch * shape.queries, kv_heads * group);
        let mut bounds =
            Self { out: vec![0.0; out.len()], log_sum_exp: vec![0.0; rows * heads], dqkv: vec![0.0; inputs.qkv.len()] };
        for query in 0..rows {
            for head in 0..heads {
                bounds.add(inputs, query, head, out, real);
            }
        }
        bounds
    }

    fn add(&mut self, inputs: &Inputs, query: usize, head: usize, out: &[f64], real: f64) {
        let (shape, HeadShape { kv_heads, group, head_dim: d }) = (inputs.shape, inputs.shape.heads);
        let (heads, sequence, seen) = (kv_heads * group, query / shape.queries, inputs.seen(query));
        let q_at = inputs.at(sequence, shape.keys - shape.queries + query % shape.queries, head);
        let row = |at: usize| &inputs.qkv[at..at + d];
        let k_at = |key: usize| inputs.at(sequence, key, heads + head / group);
        let scores: Vec<_> = seen.clone().map(|key| dot(row(q_at), row(k_at(key)))).collect();
        if scores.is_empty() {
            return;
        }
        // The score, its scaling, and the shifted exponent.
        let largest = scores.iter().fold(0.0f64, |most, score| most.max(score.1)) * shape.scale;
        let of_score = SINGLE * largest * (d as f64 + 6.0);
        let total: f64 = scores.iter().map(|score| (score.0 * shape.scale).exp()).sum();
        let log = total.ln();
        // Relatively: of a numerator, whose exponential has 2 ulp, and of their sum.
        let of_p = of_score + SINGLE * (4.0 + log.abs());
        let of_sum = of_p + SINGLE * seen.len() as f64;
        self.log_sum_exp[query * heads + head] = of_score + of_sum + SINGLE * (log.abs() + largest);

        let at = (query * heads + head) * d;
        let dout = &inputs.dout[at..at + d];
        let (inner, inner_size) = dot(dout, &out[at..at + d]);
        for (key, (score, _)) in seen.clone().zip(scores) {
            let p = (score * shape.scale).exp() / total;
            let v_at = k_at(key) + kv_heads * d;
            let (dp, dp_size) = dot(dout, row(v_at));
            let ds = (p * (dp - inner) * shape.scale).abs();
            let of_dp = SINGLE * (d as f64 + 2.0) * (dp_size + inner_size);
            let of_ds = p * shape.scale * ((of_p + 3.0 * SINGLE) * (dp - inner).abs() + of_dp) + real * 1.01 * ds;
            // Sums over keys, and over the queries of all heads of a group.
            let (of_keys, of_queries) = (SINGLE * shape.keys as f64, SINGLE * (shape.queries * group) as f64);
            for (i, dout) in dout.iter().enumerate() {
                let (q, k, v) = (row(q_at)[i].abs(), row(k_at(key))[i].abs(), row(v_at)[i].abs());
                self.out[at + i] += p * v * (of_p + of_sum + of_keys + real * 1.01);
                self.dqkv[q_at + i] += (of_ds + of_keys * ds) * k;
                self.dqkv[k_at(key) + i] += (of_ds + of_queries * ds) * q;
                self.dqkv[v_at + i] += p * (of_p + of_queries + real * 1.01) * dout.abs();
            }
        }
    }
}

/// Heads, then sequences, queries and keys.
const CASES: [(HeadShape, [usize; 3], Mask); 19] = [
    (heads(1, 1, 8), [1, 1, 1], Mask::Nothing),
    (heads(2, 3, 5), [2, 70, 70], Mask::Any),
    (heads(1, 2, 6), [1, 9, 133], Mask::Nothing),
    (heads(2, 1, 16), [3, 131, 131], Mask::Nothing),
    (heads(1, 3, 16), [2, 1, 67], Mask::Any),
    (heads(1, 1, 24), [1, 150, 150], Mask::Documents(37)),
    (heads(3, 2, 64), [1, 130, 130], Mask::Nothing),
    (heads(1, 1, 64), [2, 193, 193], Mask::Documents(64)),
    (heads(1, 2, 64), [1, 65, 200], Mask::Any),
    (heads(1, 1, 80), [1, 67, 67], Mask::Any),
    (heads(1, 2, 128), [1, 131, 131], Mask::Documents(100)),
    (heads(1, 1, 192), [1, 70, 70], Mask::Any),
    (heads(1, 1, 250), [1, 33, 40], Mask::Nothing),
    (heads(1, 2, 256), [1, 67, 67], Mask::Nothing),
    // Few queries, and more keys than a split has.
    (heads(2, 6, 64), [1, 1, 257], Mask::Nothing),
    (heads(1, 3, 128), [2, 3, 300], Mask::Any),
    (heads(2, 1, 6), [1, 4, 129], Mask::Documents(50)),
    (heads(1, 1, 250), [1, 2, 200], Mask::Any),
    (heads(1, 2, 1), [2, 4, 4], Mask::Any),
];

const fn heads(kv_heads: usize, group: usize, head_dim: usize) -> HeadShape {
    HeadShape { kv_heads, group, head_dim }
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let real = agreement.rounding() * 1.01;
    for (heads, sizes, mask) in CASES {
        let inputs = Inputs::new(agreement, heads, sizes, mask);
        let (got, wanted) = (forward(agreement.cuda(), &inputs)?, forward(agreement.cpu(), &inputs)?);
        let HeadShape { kv_heads, group, head_dim } = heads;
        let name = |what: &str| format!("attention {what} {kv_heads}x{group}x{head_dim} {sizes:?} {mask:?}");
        // What backward reads is the same on both sides.
        let saved: [Vec<f64>; 2] = [
            wanted[0].iter().map(|x| agreement.rounded(*x)).collect(),
            wanted[1].iter().map(|x| round(*x, DType::F32)).collect(),
        ];
        let bounds = Bounds::new(&inputs, &saved[0], real);
        agreement.compare(name("out"), &got[0], &wanted[0], |i| bounds.out[i] + real * wanted[0][i].abs());
        agreement.compare(name("log-sum-exp"), &got[1], &wanted[1], |i| bounds.log_sum_exp[i]);
        if sizes[1] == sizes[2] {
            let got = backward(agreement.cuda(), &inputs, &saved)?;
            let wanted = backward(agreement.cpu(), &inputs, &saved)?;
            agreement.compare(name("dqkv"), &got, &wanted, |i| bounds.dqkv[i] + real * wanted[i].abs());
        }
    }
    copies(agreement)
}

/// Equal heads have equal results, bit for bit, whatever stands between them.
fn copies(agreement: &mut Agreement) -> Result<()> {
    let (narrow, wide) = (heads(1, 2, 24), heads(3, 2, 24));
    let inputs = Inputs::new(agreement, narrow, [1, 67, 67], Mask::Documents(20));
    let repeat = |row: &[f64]| -> Vec<f64> {
        let parts =
            [0..48, 48..72, 72..96].map(|part| row[part.start.min(row.len())..part.end.min(row.len())].repeat(3));
        parts.concat()
    };
    let shape = AttentionShape { heads: wide, ..inputs.shape };
    let widened = Inputs {
        shape,
        qkv: inputs.qkv.chunks(96).flat_map(repeat).collect(),
        dout: inputs.dout.chunks(48).flat_map(repeat).collect(),
        first_key: inputs.first_key.clone(),
    };
    let (one, three) = (forward(agreement.cuda(), &inputs)?, forward(agreement.cuda(), &widened)?);
    let (done, dthree) = (backward(agreement.cuda(), &inputs, &one)?, backward(agreement.cuda(), &widened, &three)?);
    let repeated = |x: &[f64], row: usize| -> Vec<f64> { x.chunks(row).flat_map(repeat).collect() };
    agreement.compare("attention copies: out", &three[0], &repeated(&one[0], 48), |_| 0.0);
    agreement.compare("attention copies: dqkv", &dthree, &repeated(&done, 96), |_| 0.0);
    Ok(())
}
