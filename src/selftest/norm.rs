//! Norms.

use super::agreement::{Agreement, get, put_real, repeated, unwritten};
use crate::{
    Result,
    ops::norm::{Norm, NormKind, NormShape, Residual},
};

struct Case {
    x: Vec<f64>,
    gain: Vec<f64>,
    bias: Vec<f64>,
    dy: Vec<f64>,
    past: Vec<f64>,
    shape: NormShape,
    with_bias: bool,
    overwrite: bool,
}

/// x + branch / 2, and the norm of that sum.
fn fused<B: Norm>(backend: &B, case: &Case, branch: &[f64]) -> Result<[Vec<f64>; 2]> {
    let (x, branch, gain) = (put_real(backend, &case.x)?, put_real(backend, branch)?, put_real(backend, &case.gain)?);
    let mut y = unwritten(backend, backend.compute(), x.len())?;
    let mut sum = unwritten(backend, backend.compute(), x.len())?;
    let mut statistics = unwritten(backend, backend.statistics(), 2 * case.shape.rows)?;
    let residual = Residual { sum: sum.view_mut(), branch: branch.view(), scale: 0.5 };
    backend.norm(y.view_mut(), statistics.view_mut(), x.view(), Some(residual), gain.view(), None, case.shape);
    Ok([get(backend, &sum)?, get(backend, &y)?])
}

/// y, statistics, dx, dgain, dbias.
fn run<B: Norm>(backend: &B, case: &Case) -> Result<[Vec<f64>; 5]> {
    let (compute, len, width) = (backend.compute(), case.x.len(), case.shape.width);
    let [x, gain, bias, dy] = [&case.x, &case.gain, &case.bias, &case.dy].map(|values| put_real(backend, values));
    let (x, gain, bias, dy) = (x?, gain?, bias?, dy?);
    let mut y = unwritten(backend, compute, len)?;
    let mut statistics = unwritten(backend, backend.statistics(), 2 * case.shape.rows)?;
    let mut dx = if case.overwrite { unwritten(backend, compute, len)? } else { put_real(backend, &case.past)? };
    let mut dgain = unwritten(backend, backend.gradient(), width)?;
    let mut dbias = unwritten(backend, backend.gradient(), if case.with_bias { width } else { 0 })?;
    let bias = case.with_bias.then(|| bias.view());
    backend.norm(y.view_mut(), statistics.view_mut(), x.view(), None, gain.view(), bias, case.shape);
    backend.norm_backward(
        dx.view_mut(),
        dgain.view_mut(),
        case.with_bias.then(|| dbias.view_mut()),
        dy.view(),
        x.view(),
        statistics.view(),
        gain.view(),
        case.shape,
        case.overwrite,
    );
    let [y, statistics, dx] = [&y, &statistics, &dx].map(|tensor| get(backend, tensor));
    Ok([y?, statistics?, dx?, get(backend, &dgain)?, get(backend, &dbias)?])
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let kinds = [(NormKind::Layer, true), (NormKind::Layer, false), (NormKind::Rms, false), (NormKind::Rms, true)];
    // A warp a row, a block a row, rows that a block takes in parts; with and without whole pieces of 16 bytes.
    let sizes = [(5, 1), (70, 13), (9, 64), (5, 512), (33, 776), (3, 1030), (3, 3080), (2, 8204), (2, 20_000)];
    for (i, (rows, width)) in sizes.into_iter().enumerate() {
        for (k, (kind, with_bias)) in kinds.into_iter().enumerate() {
            let shape = NormShape { rows, width, kind, eps: 1e-5 };
            let values = |seed, len, mean: f64| -> Vec<f64> {
                agreement.normal(seed, len, 1.0).into_iter().map(|x| agreement.rounded(x + mean)).collect()
            };
            let case = Case {
                x: values(1, rows * width, 0.3),
                gain: values(2, width, 1.0),
                bias: values(3, width, 0.0),
                dy: values(4, rows * width, 0.0),
                past: values(5, rows * width, 0.0),
                shape,
                with_bias,
                overwrite: (i + k) % 2 == 0,
            };
            compare(agreement, &case)?;
        }
    }
    copies(agreement)?;
    elementwise(agreement)
}

/// Copies of a unit get the same bits, wherever they lie in pieces and teams.
fn copies(agreement: &mut Agreement) -> Result<()> {
    const COPIES: usize = 3;
    for (rows, narrow) in [(67, 37), (9, 256), (5, 1401)] {
        let shape = NormShape { rows, width: COPIES * narrow, kind: NormKind::Layer, eps: 1e-5 };
        let values = |seed, len| repeated(&agreement.normal(seed, len, 1.0), COPIES);
        let [x, gain, bias] = [values(1, rows * narrow), values(2, narrow), values(3, narrow)];
        let [dy, past] = [values(4, rows * narrow), values(5, rows * narrow)];
        let case = Case { x, gain, bias, dy, past, shape, with_bias: true, overwrite: false };
        let [y, _, dx, dgain, dbias] = run(agreement.cuda(), &case)?;
        for (what, got) in [("y", y), ("dx", dx), ("dgain", dgain), ("dbias", dbias)] {
            agreement.compare_copies(format!("norm copies {what} {rows} x {narrow}"), &got, COPIES);
        }
    }
    Ok(())
}

fn compare(agreement: &mut Agreement, case: &Case) -> Result<()> {
    let NormShape { rows, width, kind, .. } = case.shape;
    let name = |what: &str| format!("norm {kind:?} {what} {rows} x {width}");
    let (type_rounding, f32_rounding) = (agreement.rounding() * 1.01, 2f64.powi(-24));
    // A mean: each of at most 512 threads adds its elements one after another, warps and blocks add by halves.
    let additions = (16 * width.div_ceil(16 * 512) + 10) as f64;

    let branch = agreement.normal(6, rows * width, 1.0);
    let [sum, y] = fused(agreement.cuda(), case, &branch)?;
    let [wanted_sum, _] = fused(agreement.cpu(), case, &branch)?;
    let bound = |i: usize| type_rounding * wanted_sum[i].abs() + 2.0 * f32_rounding * 8.0;
    agreement.compare(name("sum"), &sum, &wanted_sum, bound);
    // The norm is that of the rounded sum, in the same bits as when it comes as x.
    let of_sum = Case {
        x: sum,
        gain: case.gain.clone(),
        bias: Vec::new(),
        dy: case.dy.clone(),
        past: Vec::new(),
        shape: case.shape,
        with_bias: false,
        overwrite: true,
    };
    let [y_of_sum, ..] = run(agreement.cuda(), &of_sum)?;
    agreement.compare(name("y of sum"), &y, &y_of_sum, |_| 0.0);

    let [y, statistics, dx, dgain, dbias] = run(agreement.cuda(), case)?;
    let wanted = run(agreement.cpu(), case)?;
    // Elements are under 6 and deviations near 1 (of width 1 there is nothing to add), so that mean and deviation move
    // a normalised element by twice a mean's error; the gradient has two means more. Gains are under 5.
    let bound = |i: usize| type_rounding * wanted[0][i].abs() + 2.0 * additions * f32_rounding * 6.0 * 5.0;
    agreement.compare(name("y"), &y, &wanted[0], bound);
    let bound = |i: usize| additions * f32_rounding * if i.is_multiple_of(2) { 2.0 } else { wanted[1][i] * 2.0 };
    agreement.compare(name("statistics"), &statistics, &wanted[1], bound);
    let size = |i: usize| 6.0 * 5.0 * wanted[1][i / width * 2 + 1];
    let bound = |i: usize| type_rounding * wanted[2][i].abs() + 4.0 * additions * f32_rounding * size(i);
    agreement.compare(name("dx"), &dx, &wanted[2], bound);
    // Sums over rows, of terms that are under 1 in the mean and under 36; a normalised element has errors of its own.
    let (terms, own) = (rows as f64, 2.0 * additions);
    let bound = (terms + own) * f32_rounding * (terms + 36.0);
    let gradient = agreement.gradient_rounding();
    agreement.compare(name("dgain"), &dgain, &wanted[3], |i| bound + gradient * wanted[3][i].abs());
    agreement.compare(name("dbias"), &dbias, &wanted[4], |i| bound + gradient * wanted[4][i].abs());
    Ok(())
}

/// x + scale · branch, scale · x.
fn run_elementwise<B: Norm>(backend: &B, x: &[f64], branch: &[f64]) -> Result<[Vec<f64>; 2]> {
    let (mut x, branch) = (put_real(backend, x)?, put_real(backend, branch)?);
    let mut sum = unwritten(backend, backend.compute(), x.len())?;
    backend.add(sum.view_mut(), x.view(), branch.view(), 0.25);
    backend.scale(x.view_mut(), -0.75);
    Ok([get(backend, &sum)?, get(backend, &x)?])
}

fn elementwise(agreement: &mut Agreement) -> Result<()> {
    let (type_rounding, f32_rounding) = (agreement.rounding() * 1.01, 2f64.powi(-24));
    for n in [1, 13, 4096, 10_007] {
        let (x, branch) = (agreement.normal(7, n, 1.0), agreement.normal(8, n, 1.0));
        let got = run_elementwise(agreement.cuda(), &x, &branch)?;
        let wanted = run_elementwise(agreement.cpu(), &x, &branch)?;
        // A product and a sum, of numbers under 8; then the result is rounded.
        let bound = |i: usize| type_rounding * wanted[0][i].abs() + 2.0 * f32_rounding * 8.0;
        agreement.compare(format!("norm add {n}"), &got[0], &wanted[0], bound);
        let bound = |i: usize| (type_rounding + f32_rounding) * wanted[1][i].abs();
        agreement.compare(format!("norm scale {n}"), &got[1], &wanted[1], bound);
    }
    Ok(())
}
