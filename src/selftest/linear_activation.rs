//! Linear layers with an activation, fused where the device does that, and as the two ops that they are made of.

use super::agreement::{Agreement, get, put_real, unwritten};
use crate::{
    Result,
    ops::{activation::Activation, linear::LinearShape, linear_activation::LinearActivation},
};

/// What goes in: x, weight and bias of a layer; the gradient by the output of the next layer, its weight.
type Inputs = [Vec<f64>; 5];

/// before, after, dbefore; `apart`: by the two ops one after the other.
fn run<B: LinearActivation>(
    backend: &B,
    inputs: &Inputs,
    shape: LinearShape,
    kind: Activation,
    apart: bool,
) -> Result<[Vec<f64>; 3]> {
    let [x, weight, bias, dy, next] = inputs.each_ref().map(|values| put_real(backend, values));
    let (x, weight, bias, dy, next) = (x?, weight?, bias?, dy?, next?);
    let len = shape.rows * shape.outputs;
    let [before, after, d] = [(); 3].map(|()| unwritten(backend, backend.compute(), len));
    let (mut before, mut after, mut d) = (before?, after?, d?);
    let back = LinearShape { rows: shape.rows, inputs: shape.outputs, outputs: shape.inputs };
    if apart {
        backend.linear(before.view_mut(), x.view(), weight.view(), Some(bias.view()), shape);
        backend.activate(after.view_mut(), before.view(), kind);
        backend.linear_backward_input(d.view_mut(), dy.view(), next.view(), back);
        backend.activate_backward(d.view_mut(), before.view(), kind);
    } else {
        let (to, argument) = (after.view_mut(), before.view_mut());
        backend.linear_activate(to, argument, x.view(), weight.view(), Some(bias.view()), shape, kind);
        backend.linear_activate_backward(d.view_mut(), dy.view(), next.view(), before.view(), back, kind);
    }
    Ok([get(backend, &before)?, get(backend, &after)?, get(backend, &d)?])
}

/// dy · weight: the gradient by the activation's value.
fn passed<B: LinearActivation>(backend: &B, inputs: &Inputs, shape: LinearShape) -> Result<Vec<f64>> {
    let (dy, next) = (put_real(backend, &inputs[3])?, put_real(backend, &inputs[4])?);
    let mut d = unwritten(backend, backend.compute(), shape.rows * shape.outputs)?;
    let back = LinearShape { rows: shape.rows, inputs: shape.outputs, outputs: shape.inputs };
    backend.linear_backward_input(d.view_mut(), dy.view(), next.view(), back);
    get(backend, &d)
}

/// What a GPU's own tanh may be wrong by, relatively: PTX ISA, "tanh", tanh.approx.f32. A matrix product's GELU may use it.
const TANH: f64 = 1.0 / (1 << 11) as f64;

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    for (rows, inputs, outputs) in [(1, 8, 16), (7, 5, 3), (33, 24, 40), (64, 128, 256)] {
        let shape = LinearShape { rows, inputs, outputs };
        let lens = [rows * inputs, outputs * inputs, outputs, rows * inputs, inputs * outputs];
        let mut seed = 0;
        let values = lens.map(|len| {
            seed += 1;
            agreement.normal(seed, len, if seed == 2 { 1.0 / (inputs as f64).sqrt() } else { 1.0 })
        });
        for kind in [Activation::GeluTanh, Activation::GeluExact] {
            let name = |what: &str| format!("linear_activation {kind:?} {what} {rows} x {inputs} -> {outputs}");
            let wanted = run(agreement.cpu(), &values, shape, kind, false)?;
            let passed = passed(agreement.cpu(), &values, shape)?;
            let (fused, apart) = (
                run(agreement.cuda(), &values, shape, kind, false)?,
                run(agreement.cuda(), &values, shape, kind, true)?,
            );
            let rounding = agreement.rounding() * 1.01;
            // Sums of k products (see `linear`), which are of unit size before, and dy · weight afterwards.
            let sums = |size: f64| 2f64.powi(-24) * (inputs as f64 + 2.0) * 4.0 * size;
            // GELU's slope is under 1.13 and its second derivative under 1; an argument x is rounded where it is kept, and
            // the rounded one is used by backward and by an activation apart.
            let argument = |i: usize| rounding * wanted[0][i].abs() + sums(1.0);
            let after = |i: usize| rounding * wanted[1][i].abs() + 1.13 * argument(i) + TANH * wanted[0][i].abs();
            let backward = |i: usize| {
                let x = wanted[0][i];
                let slope = 1.13 * (rounding + TANH * (1.0 + x.abs())) + argument(i);
                rounding * wanted[2][i].abs() + passed[i].abs() * slope + 1.13 * sums((inputs as f64).sqrt())
            };
            for (how, got) in [("fused", &fused), ("apart", &apart)] {
                agreement.compare(name(&format!("{how} argument")), &got[0], &wanted[0], argument);
                agreement.compare(name(&format!("{how} value")), &got[1], &wanted[1], after);
                agreement.compare(name(&format!("{how} gradient")), &got[2], &wanted[2], backward);
            }
        }
    }
    Ok(())
}
