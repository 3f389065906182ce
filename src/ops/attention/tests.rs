//! Attention against its definition, differences, itself on other threads, and its promises on bits.

use super::*;
use crate::{
    backend::{
        Tensor,
        cpu::{Cpu, Real},
    },
    ops::tests::{assert_f32, assert_gradient, cpu, dot, elements, floats, random, tensor, unwritten, values},
};

const NARROW: HeadShape = HeadShape { kv_heads: 2, group: 3, head_dim: 5 };

/// Self-attention of whole sequences.
fn whole(heads: HeadShape, batch: usize, tokens: usize) -> AttentionShape {
    AttentionShape { heads, batch, queries: tokens, keys: tokens, scale: 1.7 / heads.head_dim as f64 }
}

/// out and log_sum_exp by the formula, in plain loops; `qkv` as for backward.
fn definition(qkv: &[f64], first_key: Option<&[i32]>, shape: AttentionShape) -> (Vec<f64>, Vec<f64>) {
    let HeadShape { kv_heads, group, head_dim } = shape.heads;
    let (row, k_at, v_at) = (shape.heads.row(), shape.heads.queries(), shape.heads.queries() + shape.heads.keys());
    let (mut out, mut log_sum_exp) = (vec![], vec![]);
    for token in 0..shape.batch * shape.queries {
        let sequence = token / shape.queries * shape.queries;
        let first = first_key.map_or(0, |f| f[token] as usize);
        for head in 0..kv_heads * group {
            let part = |token: usize, at: usize, head: usize| &qkv[token * row + at + head * head_dim..][..head_dim];
            let seen: Vec<usize> = (sequence + first..token + 1).collect();
            let e: Vec<f64> = seen
                .iter()
                .map(|&key| (shape.scale * dot(part(token, 0, head), part(key, k_at, head / group))).exp())
                .collect();
            let sum: f64 = e.iter().sum();
            let of = |i: usize| -> f64 { seen.iter().zip(&e).map(|(&t, e)| e * part(t, v_at, head / group)[i]).sum() };
            out.extend((0..head_dim).map(|i| if seen.is_empty() { 0.0 } else { of(i) / sum }));
            log_sum_exp.push(sum.ln());
        }
    }
    (out, log_sum_exp)
}

fn fused<'a, F: Real>(qkv: &'a Tensor<Cpu<F>>, shape: AttentionShape, at: usize) -> Strided<'a, Cpu<F>> {
    Strided { view: qkv.slice(at..qkv.len()), stride: shape.heads.row(), rows: shape.queries }
}

/// out and log_sum_exp by the op.
fn forward<F: Real>(
    cpu: &Cpu<F>,
    qkv: &Tensor<Cpu<F>>,
    first_key: Option<&[i32]>,
    shape: AttentionShape,
) -> (Tensor<Cpu<F>>, Tensor<Cpu<F>>) {
    let tokens = shape.batch * shape.queries;
    let mut out = unwritten(cpu, tokens * shape.heads.queries());
    let mut log_sum_exp = unwritten(cpu, tokens * shape.heads.kv_heads * shape.heads.group);
    let first_key = first_key.map(|f| tensor(cpu, f));
    let (k_at, v_at) = (shape.heads.queries(), shape.heads.queries() + shape.heads.keys());
    cpu.attention(
        out.view_mut(),
        log_sum_exp.view_mut(),
        fused(qkv, shape, 0),
        fused(qkv, shape, k_at),
        fused(qkv, shape, v_at),
        first_key.as_ref().map(Tensor::view),
        shape,
    );
    (out, log_sum_exp)
}

/// out, log_sum_exp and dqkv by the op.
fn both<F: Real>(
    cpu: &Cpu<F>,
    qkv: &[f64],
    dout: &[f64],
    first_key: Option<&[i32]>,
    shape: AttentionShape,
) -> [Tensor<Cpu<F>>; 3] {
    let (qkv, dout) = (floats(cpu, qkv), floats(cpu, dout));
    let (out, log_sum_exp) = forward(cpu, &qkv, first_key, shape);
    let mut dqkv = unwritten(cpu, qkv.len());
    let first_key = first_key.map(|f| tensor(cpu, f));
    cpu.attention_backward(
        dqkv.view_mut(),
        dout.view(),
        out.view(),
        log_sum_exp.view(),
        qkv.view(),
        first_key.as_ref().map(Tensor::view),
        shape,
    );
    [out, log_sum_exp, dqkv]
}

/// Documents that begin at these positions of every sequence, as `first_key`.
fn documents(batch: usize, tokens: usize, starts: &[usize]) -> Vec<i32> {
    let first = |token: usize| starts.iter().filter(|&&s| s <= token).max().copied().unwrap_or(0) as i32;
    (0..batch).flat_map(|_| (0..tokens).map(first)).collect()
}

/// Shapes with odd sizes, several blocks of queries, several groups; and where documents begin.
fn cases() -> Vec<(AttentionShape, Vec<usize>)> {
    vec![
        (whole(NARROW, 2, 7), vec![3, 4]),
        (whole(HeadShape { kv_heads: 1, group: 1, head_dim: 1 }, 1, 1), vec![]),
        (whole(HeadShape { kv_heads: 2, group: 2, head_dim: 16 }, 2, 64), vec![40]),
        (whole(HeadShape { kv_heads: 1, group: 2, head_dim: 3 }, 1, 70), vec![1, 66]),
        (whole(HeadShape { kv_heads: 3, group: 1, head_dim: 33 }, 1, 150), vec![63, 64, 140]),
    ]
}

#[test]
fn forward_is_the_definition() {
    for (shape, starts) in cases() {
        let qkv = random(1, shape.batch * shape.queries * shape.heads.row());
        let first_key = documents(shape.batch, shape.queries, &starts);
        for first_key in [None, Some(first_key.as_slice())] {
            let cpu = cpu::<f64>(2);
            let (out, log_sum_exp) = forward(&cpu, &floats(&cpu, &qkv), first_key, shape);
            let expected = definition(&qkv, first_key, shape);
            for (a, b) in [(out, expected.0), (log_sum_exp, expected.1)] {
                for (a, b) in values(&a).iter().zip(&b) {
                    assert!((a - b).abs() < 1e-14 * shape.keys as f64 + 1e-14, "{a} {b} {shape:?}");
                }
            }
        }
    }
}

#[test]
fn queries_at_the_end_of_a_cache_see_what_they_see_in_the_whole_sequence() {
    let shape = whole(NARROW, 2, 90);
    let (row, width) = (shape.heads.row(), shape.heads.queries());
    let qkv = random(2, shape.batch * shape.queries * row);
    let (expected, _) = definition(&qkv, None, shape);
    let cpu = cpu::<f64>(2);
    // A cache of keys and then values a row, with room for 100 tokens; what is not filled must not be read.
    let (keys, stride, rows) = (shape.heads.keys(), 2 * shape.heads.keys(), 100);
    let mut cache = vec![f64::NAN; shape.batch * rows * stride];
    for token in 0..shape.batch * 90 {
        let at = (token / 90 * rows + token % 90) * stride;
        cache[at..at + stride].copy_from_slice(&qkv[token * row + width..][..stride]);
    }
    let cache = floats(&cpu, &cache);
    for queries in [1, 2, 67] {
        let last = |token: &usize| token % 90 >= 90 - queries;
        let q: Vec<f64> = (0..180).filter(last).flat_map(|t| qkv[t * row..][..width].to_vec()).collect();
        let q = floats(&cpu, &q);
        let mut out = unwritten(&cpu, shape.batch * queries * width);
        let mut log_sum_exp = unwritten(&cpu, shape.batch * queries * 6);
        cpu.attention(
            out.view_mut(),
            log_sum_exp.view_mut(),
            Strided { view: q.view(), stride: width, rows: queries },
            Strided { view: cache.view(), stride, rows },
            Strided { view: cache.slice(keys..cache.len()), stride, rows },
            None,
            AttentionShape { queries, ..shape },
        );
        let expected = (0..180).filter(last).flat_map(|t| expected[t * width..][..width].to_vec());
        for (a, b) in values(&out).into_iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{a} {b}");
        }
    }
}

#[test]
fn backward_is_the_gradient() {
    for (shape, starts) in cases() {
        let tokens = shape.batch * shape.queries;
        if tokens * shape.heads.row() > 2000 || tokens == 1 {
            continue; // Too many differences; and a single token's queries have no gradient to compare with.
        }
        let (qkv, dout) = (random(3, tokens * shape.heads.row()), random(4, tokens * shape.heads.queries()));
        let first_key = documents(shape.batch, shape.queries, &starts);
        for first_key in [None, Some(first_key.as_slice())] {
            let cpu = cpu::<f64>(1);
            let [_, _, dqkv] = both(&cpu, &qkv, &dout, first_key, shape);
            assert_gradient("dqkv", &qkv, &values(&dqkv), |qkv| dot(&dout, &definition(qkv, first_key, shape).0));
        }
    }
}

#[test]
fn single_precision_is_the_double_one_rounded() {
    for (shape, starts) in cases() {
        let tokens = shape.batch * shape.queries;
        let (qkv, dout) = (random(5, tokens * shape.heads.row()), random(6, tokens * shape.heads.queries()));
        let first_key = documents(shape.batch, shape.queries, &starts);
        let exact = both(&cpu::<f64>(1), &qkv, &dout, Some(&first_key), shape);
        let single = both(&cpu::<f32>(1), &qkv, &dout, Some(&first_key), shape);
        // |q|, |k|, |v|, |dout| ≤ 1: scores, and what flows back through them, are sums of head_dim terms of size 1, so
        // with an error of head_dim² ulps at most; those and their exponentials are then summed over the keys, and over
        // the queries that see a key.
        let size = (shape.heads.head_dim * shape.heads.head_dim + shape.keys) as f64;
        let scale = [1.0, 1.0, (shape.heads.group * shape.queries) as f64];
        for ((name, scale), (a, b)) in [("out", scale[0]), ("log_sum_exp", scale[1]), ("dqkv", scale[2])]
            .into_iter()
            .zip(single.iter().zip(&exact))
        {
            assert_f32(name, &values(a), &values(b), size, |_| scale);
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    for (shape, starts) in cases() {
        let tokens = shape.batch * shape.queries;
        let (qkv, dout) = (random(7, tokens * shape.heads.row()), random(8, tokens * shape.heads.queries()));
        let first_key = documents(shape.batch, shape.queries, &starts);
        let run =
            |threads| both(&cpu::<f32>(threads), &qkv, &dout, Some(&first_key), shape).map(|t| elements::<_, f32>(&t));
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }
}

#[test]
fn hidden_keys_leave_no_trace_and_a_blind_query_gives_nothing() {
    let shape = whole(NARROW, 1, 80);
    let (row, width, keys) = (shape.heads.row(), shape.heads.queries(), shape.heads.keys());
    let (mut qkv, dout) = (random(9, 80 * row), random(10, 80 * width));
    // Token 70 begins a document; token 75 sees nothing at all, nor do 32..64, which are a whole block.
    let mut first_key = documents(1, 80, &[70]);
    first_key[75] = 76;
    first_key[32..64].fill(80);
    let run = |qkv: &[f64]| both(&cpu::<f32>(2), qkv, &dout, Some(&first_key), shape).map(|t| elements::<_, f32>(&t));
    let [out, log_sum_exp, dqkv] = run(&qkv);
    for blind in (32..64).chain([75]) {
        assert!(out[blind * width..][..width].iter().all(|&x| x == 0.0));
        assert!(log_sum_exp[blind * 6..][..6].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(dqkv[blind * row..][..width].iter().all(|&x| x == 0.0));
    }
    assert!(out.iter().chain(&dqkv).all(|x| x.is_finite()));
    // The last token's key and value are seen by itself alone, and the first document by none of the second.
    for x in &mut qkv[79 * row + width..79 * row + width + 2 * keys] {
        *x = 30.0;
    }
    for x in &mut qkv[..70 * row] {
        *x *= -0.5;
    }
    let [changed, _, _] = run(&qkv);
    assert_eq!(out[70 * width..79 * width], changed[70 * width..79 * width]);
    assert_ne!(out[79 * width..], changed[79 * width..]);
}

#[test]
fn copies_of_heads_and_of_their_elements_stay_equal_in_bits() {
    let narrow = HeadShape { kv_heads: 2, group: 2, head_dim: 11 };
    let wide = HeadShape { kv_heads: 6, group: 4, head_dim: 22 };
    let tokens = 75;
    // Index in the narrow model of element i of a wide axis [kv_heads, group, head_dim].
    let source = |i: usize, group: usize, wide_group: usize| {
        let (head, element) = (i / 22, i % 22 / 2);
        let (kv, member) = (head / wide_group / 3, head % wide_group * group / wide_group);
        (kv * group + member) * 11 + element
    };
    let queries: Vec<usize> = (0..wide.queries()).map(|i| source(i, 2, 4)).collect();
    let keys: Vec<usize> = (0..wide.keys()).map(|i| source(i, 1, 1)).collect();
    let (k_at, v_at) = (narrow.queries(), narrow.queries() + narrow.keys());
    let row: Vec<usize> =
        queries.iter().copied().chain(keys.iter().map(|k| k_at + k)).chain(keys.iter().map(|k| v_at + k)).collect();
    let spread = |x: &[f64], width: usize, map: &[usize]| -> Vec<f64> {
        x.chunks(width).flat_map(|x| map.iter().map(|&i| x[i])).collect()
    };
    let qkv = spread(&random(11, tokens * narrow.row()), narrow.row(), &row);
    let dout = spread(&random(12, tokens * narrow.queries()), narrow.queries(), &queries);
    let [out, _, dqkv] = both(&cpu::<f32>(2), &qkv, &dout, None, whole(wide, 1, tokens));
    for (x, map) in [(elements::<_, f32>(&out), &queries), (elements::<_, f32>(&dqkv), &row)] {
        for x in x.chunks(map.len()) {
            for (i, &source) in map.iter().enumerate() {
                let first = map.iter().position(|&s| s == source).expect("i itself");
                assert_eq!(x[i].to_bits(), x[first].to_bits(), "element {i} is a copy of {first}");
            }
        }
    }
}
