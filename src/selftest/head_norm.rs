//! Q/K norm.

use super::agreement::{Agreement, get, put_real, repeated, unwritten};
use crate::{
    Result,
    ops::{attention::HeadShape, head_norm::HeadNorm},
};

const EPS: f64 = 1e-6;

/// out, statistics, dqkv, dq_gain, dk_gain, of qkv, the gains, and the gradient by out.
fn run<B: HeadNorm>(backend: &B, inputs: &[Vec<f64>; 4], shape: HeadShape) -> Result<[Vec<f64>; 5]> {
    let [qkv, q_gain, k_gain, d] = inputs.each_ref().map(|values| put_real(backend, values));
    let (qkv, q_gain, k_gain, mut d) = (qkv?, q_gain?, k_gain?, d?);
    let heads = qkv.len() / shape.row() * (shape.queries() + shape.keys()) / shape.head_dim;
    let mut out = unwritten(backend, backend.compute(), qkv.len())?;
    let mut statistics = unwritten(backend, backend.statistics(), heads)?;
    let mut dq_gain = unwritten(backend, backend.gradient(), shape.head_dim)?;
    let mut dk_gain = unwritten(backend, backend.gradient(), shape.head_dim)?;
    let (x, q, k) = (qkv.view(), q_gain.view(), k_gain.view());
    backend.head_norm(out.view_mut(), statistics.view_mut(), x, q, k, shape, EPS);
    let (dq, dk) = (dq_gain.view_mut(), dk_gain.view_mut());
    backend.head_norm_backward(d.view_mut(), dq, dk, x, statistics.view(), q, k, shape);
    let [out, statistics] = [get(backend, &out)?, get(backend, &statistics)?];
    Ok([out, statistics, get(backend, &d)?, get(backend, &dq_gain)?, get(backend, &dk_gain)?])
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let type_rounding = agreement.rounding() * 1.01;
    let f32_rounding = 2f64.powi(-24);
    let shapes = [(1, 1, 1, 1), (9, 2, 3, 6), (21, 2, 2, 64), (5, 2, 15, 128), (4, 1, 2, 37), (3, 2, 1, 300)];
    for (rows, kv_heads, group, head_dim) in shapes {
        let shape = HeadShape { kv_heads, group, head_dim };
        let normal = |seed, len, mean: f64| agreement.normal(seed, len, 1.0).into_iter().map(move |x| x + mean);
        let inputs = [(rows * shape.row(), 0.0), (head_dim, 1.0), (head_dim, 1.0), (rows * shape.row(), 0.0)];
        let mut seed = 0;
        let inputs = inputs.map(|(len, mean)| {
            seed += 1;
            normal(seed, len, mean).map(|x| agreement.rounded(x)).collect::<Vec<f64>>()
        });
        let [out, statistics, d, dq, dk] = run(agreement.cuda(), &inputs, shape)?;
        let wanted = run(agreement.cpu(), &inputs, shape)?;
        let name = |what: &str| format!("head_norm {what} {rows} x ({kv_heads} x {group}) x {head_dim}");
        // A sum of squares: a lane's terms one after another, then over the lanes. Root, quotient and products follow.
        let roundings = (head_dim.div_ceil(32) + 8 + 5 + 6) as f64;
        let bound = |i: usize| (type_rounding + roundings * f32_rounding) * wanted[0][i].abs();
        agreement.compare(name("out"), &out, &wanted[0], bound);
        agreement.compare(name("1/deviation"), &statistics, &wanted[1], |i| roundings * f32_rounding * wanted[1][i]);
        // d gain - n mean(d gain n), where n, the normalised head, is under √size; times 1/deviation.
        let (heads, normed) = (shape.row() / head_dim, kv_heads * (group + 1));
        let inverse = |i: usize| match i / head_dim % heads {
            head if head < normed => wanted[1][i / shape.row() * normed + head],
            _ => 0.0,
        };
        let size = |i: usize| inverse(i) * 4.0 * 3.0 * (1.0 + 4.0);
        let bound = |i: usize| type_rounding * wanted[2][i].abs() + 3.0 * roundings * f32_rounding * size(i);
        agreement.compare(name("dqkv"), &d, &wanted[2], bound);
        // Sums over rows and heads of d n, under 1 in the mean.
        for (what, got, wanted, heads) in [("dq_gain", &dq, &wanted[3], group), ("dk_gain", &dk, &wanted[4], 1)] {
            let terms = (rows * kv_heads * heads) as f64;
            let bound = (terms + 2.0 * roundings) * f32_rounding * (terms + 16.0);
            let gradient = agreement.gradient_rounding();
            agreement.compare(name(what), got, wanted, |i| bound + gradient * wanted[i].abs());
        }
    }
    copies(agreement)
}

/// Copies of an element of a head get the same bits.
fn copies(agreement: &mut Agreement) -> Result<()> {
    const COPIES: usize = 3;
    let shape = HeadShape { kv_heads: 2, group: 2, head_dim: COPIES * 17 };
    let (rows, row) = (11, shape.row() / COPIES);
    let mut seed = 0;
    let inputs = [rows * row, 17, 17, rows * row].map(|len| {
        seed += 1;
        repeated(&agreement.normal(seed, len, 1.0), COPIES)
    });
    let [out, _, dqkv, dq, dk] = run(agreement.cuda(), &inputs, shape)?;
    for (what, got) in [("out", out), ("dqkv", dqkv), ("dq_gain", dq), ("dk_gain", dk)] {
        agreement.compare_copies(format!("head_norm copies {what}"), &got, COPIES);
    }
    Ok(())
}
