//! Linear layers.

use super::agreement::{Agreement, get, put_real, unwritten};
use crate::{
    Result,
    ops::linear::{Linear, LinearShape},
};

/// y, dx, dweight, dbias.
fn run<B: Linear>(backend: &B, inputs: &[Vec<f64>; 4], shape: LinearShape) -> Result<[Vec<f64>; 4]> {
    let [x, weight, bias, dy] = inputs.each_ref().map(|values| put_real(backend, values));
    let (x, weight, bias, dy) = (x?, weight?, bias?, dy?);
    let mut y = unwritten(backend, backend.compute(), dy.len())?;
    let mut dx = unwritten(backend, backend.compute(), x.len())?;
    let mut dweight = unwritten(backend, backend.gradient(), weight.len())?;
    let mut dbias = unwritten(backend, backend.gradient(), bias.len())?;
    backend.linear(y.view_mut(), x.view(), weight.view(), Some(bias.view()), shape);
    backend.linear_backward_input(dx.view_mut(), dy.view(), weight.view(), shape);
    backend.linear_backward_weight(dweight.view_mut(), Some(dbias.view_mut()), dy.view(), x.view(), shape);
    Ok([get(backend, &y)?, get(backend, &dx)?, get(backend, &dweight)?, get(backend, &dbias)?])
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    for (rows, inputs, outputs) in [(1, 1, 1), (7, 5, 3), (67, 54, 7), (64, 128, 96), (130, 257, 129)] {
        let shape = LinearShape { rows, inputs, outputs };
        let lens = [rows * inputs, outputs * inputs, outputs, rows * outputs];
        let mut seed = 0;
        let values = lens.map(|len| {
            seed += 1;
            agreement.normal(seed, len, 1.0)
        });
        let got = run(agreement.cuda(), &values, shape)?;
        let wanted = run(agreement.cpu(), &values, shape)?;
        // Operands are exact. A sum of k products of normal numbers: its size is about √k, and f32's partial sums are
        // rounded k times; the result once more, to its type.
        let sums = [inputs, outputs, rows, rows];
        let (real, gradient) = (agreement.rounding() * 1.01, agreement.gradient_rounding());
        let types = [real, real, gradient, gradient];
        for (i, name) in ["y", "dx", "dweight", "dbias"].into_iter().enumerate() {
            let k = sums[i] as f64;
            let bound = |j: usize| types[i] * wanted[i][j].abs() + 2f64.powi(-24) * (k + 1.0) * 4.0 * k.sqrt();
            let name = format!("linear {name} {rows} x {inputs} -> {outputs}");
            agreement.compare(name, &got[i], &wanted[i], bound);
        }
    }
    Ok(())
}
