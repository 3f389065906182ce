//! Activations.

use super::agreement::{Agreement, get, put_real, unwritten};
use crate::{
    Result,
    ops::activation::{Activate, Activation},
};

/// y, dx.
fn elementwise<B: Activate>(backend: &B, x: &[f64], dy: &[f64], kind: Activation) -> Result<[Vec<f64>; 2]> {
    let (x, mut d) = (put_real(backend, x)?, put_real(backend, dy)?);
    let mut y = unwritten(backend, backend.compute(), x.len())?;
    backend.activate(y.view_mut(), x.view(), kind);
    backend.activate_backward(d.view_mut(), x.view(), kind);
    Ok([get(backend, &y)?, get(backend, &d)?])
}

/// y, dgate_up.
fn gated<B: Activate>(backend: &B, gate_up: &[f64], dy: &[f64], ffn: usize) -> Result<[Vec<f64>; 2]> {
    let (gate_up, dy) = (put_real(backend, gate_up)?, put_real(backend, dy)?);
    let mut y = unwritten(backend, backend.compute(), dy.len())?;
    let mut d = unwritten(backend, backend.compute(), gate_up.len())?;
    backend.gate(y.view_mut(), gate_up.view(), ffn);
    backend.gate_backward(d.view_mut(), dy.view(), gate_up.view(), ffn);
    Ok([get(backend, &y)?, get(backend, &d)?])
}

// What f32 adds to the rounding of results: the argument of exp has at most 5 roundings, which its size multiplies where
// the result is near 0; exp, the quotient and erf have 2 ulp each, the products some 10 roundings more.
const ROUNDINGS: f64 = 24.0;

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let (type_rounding, f32_rounding) = (agreement.rounding() * 1.01, ROUNDINGS * 2f64.powi(-24));
    for n in [1, 7, 1024, 10_007] {
        let (x, dy) = (agreement.normal(1, n, 2.0), agreement.normal(2, n, 1.0));
        for kind in [Activation::GeluTanh, Activation::GeluExact, Activation::Relu] {
            let [y, d] = elementwise(agreement.cuda(), &x, &dy, kind)?;
            let [wanted_y, wanted_d] = elementwise(agreement.cpu(), &x, &dy, kind)?;
            let bound = |i: usize| type_rounding * wanted_y[i].abs() + f32_rounding * x[i].abs();
            agreement.compare(format!("activation {kind:?} y {n}"), &y, &wanted_y, bound);
            let size = |i: usize| dy[i].abs() * (1.0 + x[i] * x[i]);
            let bound = |i: usize| type_rounding * wanted_d[i].abs() + f32_rounding * size(i);
            agreement.compare(format!("activation {kind:?} dx {n}"), &d, &wanted_d, bound);
        }
    }
    for (rows, ffn) in [(1, 1), (3, 37), (5, 512), (2, 4104)] {
        let (gate_up, dy) = (agreement.normal(3, 2 * rows * ffn, 2.0), agreement.normal(4, rows * ffn, 1.0));
        let [y, d] = gated(agreement.cuda(), &gate_up, &dy, ffn)?;
        let [wanted_y, wanted_d] = gated(agreement.cpu(), &gate_up, &dy, ffn)?;
        let [gate, up] = [0, ffn].map(|half| move |i: usize| i / ffn * 2 * ffn + half + i % ffn);
        let size = |i: usize| (gate_up[gate(i)] * gate_up[up(i)]).abs();
        let bound = |i: usize| type_rounding * wanted_y[i].abs() + f32_rounding * size(i);
        agreement.compare(format!("activation gate y {rows} x {ffn}"), &y, &wanted_y, bound);
        // Of element i, in either half, the other factors: dy and up, or dy and gate; the slope is under 1 + |gate|.
        let size = |i: usize| {
            let at = i / (2 * ffn) * ffn + i % ffn;
            dy[at].abs() * (1.0 + gate_up[up(at)].abs()) * (1.0 + gate_up[gate(at)].abs())
        };
        let bound = |i: usize| type_rounding * wanted_d[i].abs() + f32_rounding * size(i);
        agreement.compare(format!("activation gate dgate_up {rows} x {ffn}"), &d, &wanted_d, bound);
    }
    Ok(())
}
