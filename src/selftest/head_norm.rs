//! Q/K norm, with and without RoPE behind it.

use super::agreement::{Agreement, get, put, put_real, repeated, round, unwritten};
use crate::{
    DType, Result,
    ops::{attention::HeadShape, head_norm::HeadNorm, rotary::Rotation},
};

const EPS: f64 = 1e-6;
/// Rows of a sequence, and the position of its first, where heads are turned.
const SEQUENCE: usize = 5;
const START: usize = 3;

/// The table of angles, if heads are turned.
type Angles<'a> = Option<&'a [f64]>;

/// out, statistics, dqkv, dq_gain, dk_gain, of qkv, the gains, and the gradient by out.
fn run<B: HeadNorm>(
    backend: &B,
    inputs: &[Vec<f64>; 4],
    angles: Angles<'_>,
    shape: HeadShape,
) -> Result<[Vec<f64>; 5]> {
    let [qkv, q_gain, k_gain, d] = inputs.each_ref().map(|values| put_real(backend, values));
    let (qkv, q_gain, k_gain, mut d) = (qkv?, q_gain?, k_gain?, d?);
    let heads = qkv.len() / shape.row() * (shape.queries() + shape.keys()) / shape.head_dim;
    let mut out = unwritten(backend, backend.compute(), qkv.len())?;
    let mut statistics = unwritten(backend, backend.statistics(), heads)?;
    let mut dq_gain = unwritten(backend, backend.gradient(), shape.head_dim)?;
    let mut dk_gain = unwritten(backend, backend.gradient(), shape.head_dim)?;
    let (x, q, k) = (qkv.view(), q_gain.view(), k_gain.view());
    let table = angles.map(|angles| put(backend, backend.statistics(), angles)).transpose()?;
    let rotation = || table.as_ref().map(|t| Rotation { table: t.view(), sequence: SEQUENCE, start: START });
    backend.head_norm(out.view_mut(), statistics.view_mut(), x, q, k, rotation(), shape, EPS);
    let (dq, dk) = (dq_gain.view_mut(), dk_gain.view_mut());
    backend.head_norm_backward(d.view_mut(), dq, dk, x, statistics.view(), q, k, rotation(), shape);
    let [out, statistics] = [get(backend, &out)?, get(backend, &statistics)?];
    Ok([out, statistics, get(backend, &d)?, get(backend, &dq_gain)?, get(backend, &dk_gain)?])
}

/// Angles that f32 holds, of all positions, each `copies` times.
fn angles(half: usize, copies: usize) -> Vec<f64> {
    let angle = |at: usize| (at / half) as f64 * 10_000f64.powf(-((at % half) as f64) / half as f64);
    (0..(SEQUENCE + START) * half)
        .flat_map(|at| [angle(at).cos(), angle(at).sin()].repeat(copies))
        .map(|x| round(x, DType::F32))
        .collect()
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let shapes = [(1, 1, 1, 1), (9, 2, 3, 6), (21, 2, 2, 64), (5, 2, 15, 128), (4, 1, 2, 37), (3, 2, 1, 300)];
    for (rows, kv_heads, group, head_dim) in shapes {
        let shape = HeadShape { kv_heads, group, head_dim };
        check_shape(agreement, rows, shape, None)?;
        if head_dim % 2 == 0 {
            check_shape(agreement, rows, shape, Some(&angles(head_dim / 2, 1)))?;
        }
    }
    copies(agreement)
}

fn check_shape(agreement: &mut Agreement, rows: usize, shape: HeadShape, angles: Angles<'_>) -> Result<()> {
    let HeadShape { kv_heads, group, head_dim } = shape;
    let (type_rounding, f32_rounding) = (agreement.rounding() * 1.01, 2f64.powi(-24));
    let normal = |seed, len, mean: f64| agreement.normal(seed, len, 1.0).into_iter().map(move |x| x + mean);
    let inputs = [(rows * shape.row(), 0.0), (head_dim, 1.0), (head_dim, 1.0), (rows * shape.row(), 0.0)];
    let mut seed = 0;
    let inputs = inputs.map(|(len, mean)| {
        seed += 1;
        normal(seed, len, mean).map(|x| agreement.rounded(x)).collect::<Vec<f64>>()
    });
    let [out, statistics, d, dq, dk] = run(agreement.cuda(), &inputs, angles, shape)?;
    let wanted = run(agreement.cpu(), &inputs, angles, shape)?;
    let normed = &run(agreement.cpu(), &inputs, None, shape)?[0];
    let turned = if angles.is_some() { " turned" } else { "" };
    let name = |what: &str| format!("head_norm{turned} {what} {rows} x ({kv_heads} x {group}) x {head_dim}");
    // A sum of squares: a lane's terms one after another, then over the lanes. Root, quotient and products follow; a
    // turn adds three roundings of two elements.
    let roundings = (head_dim.div_ceil(32) + 8 + 5 + 6 + 3) as f64;
    let half = head_dim.div_ceil(2);
    let other = |i: usize| if i % head_dim < half { (i + half).min(normed.len() - 1) } else { i - half };
    let size = |i: usize| normed[i].abs() + if angles.is_some() { normed[other(i)].abs() } else { 0.0 };
    let bound = |i: usize| type_rounding * wanted[0][i].abs() + roundings * f32_rounding * size(i);
    agreement.compare(name("out"), &out, &wanted[0], bound);
    agreement.compare(name("1/deviation"), &statistics, &wanted[1], |i| roundings * f32_rounding * wanted[1][i]);
    // d gain - n mean(d gain n), where n, the normalised head, is under √size; times 1/deviation. Turned back, d may be
    // √2 times as large.
    let (heads, statistics_of_row) = (shape.row() / head_dim, kv_heads * (group + 1));
    let inverse = |i: usize| match i / head_dim % heads {
        head if head < statistics_of_row => wanted[1][i / shape.row() * statistics_of_row + head],
        _ => 0.0,
    };
    let size = |i: usize| inverse(i) * 4.0 * 3.0 * (1.0 + 4.0) * std::f64::consts::SQRT_2;
    let bound = |i: usize| type_rounding * wanted[2][i].abs() + 3.0 * roundings * f32_rounding * size(i);
    agreement.compare(name("dqkv"), &d, &wanted[2], bound);
    // Sums over rows and heads of d n, under 1 in the mean.
    for (what, got, wanted, heads) in [("dq_gain", &dq, &wanted[3], group), ("dk_gain", &dk, &wanted[4], 1)] {
        let terms = (rows * kv_heads * heads) as f64;
        let bound = (terms + 2.0 * roundings) * f32_rounding * (terms + 16.0);
        let gradient = agreement.gradient_rounding();
        agreement.compare(name(what), got, wanted, |i| bound + gradient * wanted[i].abs());
    }
    Ok(())
}

/// Copies of an element of a head get the same bits, also where they are turned by copies of an angle.
fn copies(agreement: &mut Agreement) -> Result<()> {
    const COPIES: usize = 3;
    for (what, size, angles) in [("", 17, None), (" turned", 16, Some(angles(8, COPIES)))] {
        let shape = HeadShape { kv_heads: 2, group: 2, head_dim: COPIES * size };
        let (rows, row) = (11, shape.row() / COPIES);
        let mut seed = 0;
        let inputs = [rows * row, size, size, rows * row].map(|len| {
            seed += 1;
            repeated(&agreement.normal(seed, len, 1.0), COPIES)
        });
        let [out, _, dqkv, dq, dk] = run(agreement.cuda(), &inputs, angles.as_deref(), shape)?;
        for (output, got) in [("out", out), ("dqkv", dqkv), ("dq_gain", dq), ("dk_gain", dk)] {
            agreement.compare_copies(format!("head_norm{what} copies {output}"), &got, COPIES);
        }
    }
    Ok(())
}
