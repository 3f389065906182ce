//! Muon, on matrices whose singular values are equal: the error of Newton-Schulz then follows from that of one number.

use super::agreement::{Agreement, get, put, unwritten};
use crate::{
    DType, Result,
    backend::Tensor,
    ops::{
        muon::{Muon, MuonMatrix, QUINTIC, STEPS, scratch},
        pieces::RowSettings,
        scalars::{SCALARS, Scalar},
    },
};

const LR: f64 = 0.02;
const FACTOR: f64 = 0.5;
const SETTINGS: RowSettings = RowSettings { lr: 0.7, decay: 0.1, eps: 1e-7, clip: 1.0, muon: 1 };

/// A matrix with orthonormal rows, or columns where there are more rows: those of a discrete cosine transform.
fn orthonormal(rows: usize, columns: usize) -> Vec<f64> {
    let large = rows.max(columns) as f64;
    let element = |i: usize, j: usize| {
        let size = if i == 0 { 1.0 } else { 2f64.sqrt() } / large.sqrt();
        size * (std::f64::consts::PI * (j as f64 + 0.5) * i as f64 / large).cos()
    };
    let at = |i| (i / columns, i % columns);
    (0..rows * columns)
        .map(|i| if rows > columns { element(at(i).1, at(i).0) } else { element(at(i).0, at(i).1) })
        .collect()
}

/// Weight (as updated), moment, and partial sums after a step and one more that is skipped.
fn run<B: Muon>(backend: &B, weight: &[f64], gradient: &[f64], [rows, columns]: [usize; 2]) -> Result<[Vec<f64>; 3]> {
    let mut working = put(backend, backend.compute(), weight)?;
    let mut master = backend.master().map(|dtype| put(backend, dtype, weight)).transpose()?;
    let mut first = Tensor::new(backend, backend.moment(), weight.len())?;
    let gradient = put(backend, backend.gradient(), gradient)?;
    let mut work = unwritten(backend, backend.compute(), scratch(rows, columns))?;
    let mut partials = unwritten(backend, DType::F64, 2)?;
    for skip in [0, 1] {
        let mut scalars = [0.0; SCALARS];
        let inputs = [(Scalar::LearningRate, LR), (Scalar::Factor, FACTOR), (Scalar::Skip, skip as f64)];
        inputs.into_iter().for_each(|(scalar, value)| *scalar.in_mut(&mut scalars) = value);
        let scalars = put(backend, DType::F64, &scalars)?;
        let matrix = MuonMatrix {
            weight: working.view_mut(),
            master: master.as_mut().map(Tensor::view_mut),
            first: first.view_mut(),
            gradient: gradient.view(),
            rows,
            columns,
            settings: SETTINGS,
        };
        backend.muon(matrix, partials.slice_mut(skip..skip + 1), work.view_mut(), scalars.view());
    }
    let updated = get(backend, master.as_ref().unwrap_or(&working))?;
    Ok([updated, get(backend, &first)?, get(backend, &partials)?])
}

/// How far the result of all steps may be off, relatively in the Frobenius norm, when products are rounded to `rounding`.
///
/// All singular values are s. A step makes a s + b s³ + c s⁵ = f of them, and changes an error at most by the larger of
/// f' and f / s; A is rounded, b A + c A² from it and its own, and the result.
fn relative_error(small: usize, rounding: f64) -> f64 {
    let [a, b, c] = QUINTIC;
    let mut s = (small as f64).sqrt().recip();
    // u is rounded, its norm, and their quotient.
    let mut error = 3.0 * rounding * s;
    for _ in 0..STEPS {
        let f = a * s + b * s.powi(3) + c * s.powi(5);
        let slope = (a + 3.0 * b * s * s + 5.0 * c * s.powi(4)).abs();
        let new = (2.0 * b.abs() * s * s + 3.0 * c * s.powi(4) + f / s) * s * rounding;
        error = slope.max(f / s) * error + new;
        s = f;
    }
    error / s
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    for shape @ [rows, columns] in [[1, 1], [1, 7], [5, 5], [5, 64], [67, 16], [33, 129], [128, 64]] {
        let weight = agreement.normal(1, rows * columns, 0.1);
        // f32 holds the gradients.
        let gradient: Vec<f64> = orthonormal(rows, columns).iter().map(|&g| f64::from(0.03 * g as f32)).collect();
        let (got, wanted) =
            (run(agreement.cuda(), &weight, &gradient, shape)?, run(agreement.cpu(), &weight, &gradient, shape)?);
        let f32_rounding = 2f64.powi(-24);
        // Sums of f32 are rounded as often as they have terms.
        let rounding = agreement.rounding() + f32_rounding * rows.max(columns) as f64;
        let relative = relative_error(rows.min(columns), rounding);
        let change = wanted[2][0].sqrt();
        let off = got[0].iter().zip(&wanted[0]).map(|(got, wanted)| (got - wanted).powi(2)).sum::<f64>().sqrt();
        // The weights themselves are rounded to f32 three times.
        let weights = wanted[0].iter().map(|w| w * w).sum::<f64>().sqrt();
        let bound = relative * change + 3.0 * f32_rounding * weights;
        agreement.compare(format!("muon weights {rows} x {columns}"), &[off], &[0.0], |_| bound);
        let bound = |i: usize| 2.0 * f32_rounding * wanted[1][i].abs();
        agreement.compare(format!("muon moment {rows} x {columns}"), &got[1], &wanted[1], bound);
        let sums = |i: usize| 2.0 * bound_of_change(relative, f32_rounding * weights, change) * wanted[2][i];
        agreement.compare(format!("muon changes {rows} x {columns}"), &got[2], &wanted[2], sums);
    }
    Ok(())
}

/// Of a sum of squares: twice the relative error of the norm, which may be large.
fn bound_of_change(relative: f64, absolute: f64, change: f64) -> f64 {
    let error = relative + 3.0 * absolute / change;
    error + error * error / 2.0
}
