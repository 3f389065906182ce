//! Activations of the MLP: GELU (arXiv 1606.08415; tanh form and exact), ReLU, and SwiGLU (arXiv 2002.05202).

mod cuda;

use crate::backend::{
    Backend, Mut, Ref,
    cpu::{Cpu, Real, math::vectorize, parallel::RowsMut},
};
use serde::{Deserialize, Serialize};

/// An elementwise activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    GeluTanh,
    /// x Φ(x), by erf.
    GeluExact,
    /// max(x, 0); its gradient at 0 is 0.
    Relu,
}

/// Activations.
pub trait Activate: Backend {
    /// y = f(x), of equal length.
    fn activate(&self, y: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation);

    /// d = d · f′(x): turns the gradient by y into the gradient by x, in place.
    fn activate_backward(&self, d: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation);

    /// y = silu(gate) · up. `gate_up` is rows × 2 ffn: the gate's outputs, then those of up; y is rows × ffn.
    fn gate(&self, y: Mut<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize);

    /// dgate_up, rows × 2 ffn, from dy, rows × ffn.
    fn gate_backward(&self, dgate_up: Mut<'_, Self>, dy: Ref<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize);
}

/// Elements of a task.
const BLOCK: usize = 1 << 13;

impl<F: Real> Activate for Cpu<F> {
    fn activate(&self, y: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation) {
        let x = x.as_slice::<F>();
        assert_eq!(y.len(), x.len());
        self.pool().for_rows(RowsMut::blocks(y.into_slice::<F>(), BLOCK), 1, |block, y| {
            let x = &x[block.start * BLOCK..][..y.len()];
            vectorize!(match kind {
                Activation::GeluTanh => map(y, x, gelu_tanh),
                Activation::GeluExact => map(y, x, gelu_exact),
                Activation::Relu => map(y, x, relu),
            });
        });
    }

    fn activate_backward(&self, d: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation) {
        let x = x.as_slice::<F>();
        assert_eq!(d.len(), x.len());
        self.pool().for_rows(RowsMut::blocks(d.into_slice::<F>(), BLOCK), 1, |block, d| {
            let x = &x[block.start * BLOCK..][..d.len()];
            vectorize!(match kind {
                Activation::GeluTanh => multiply(d, x, gelu_tanh_slope),
                Activation::GeluExact => gelu_exact_backward(d, x),
                Activation::Relu => multiply(d, x, relu_slope),
            });
        });
    }

    fn gate(&self, y: Mut<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize) {
        let gate_up = gate_up.as_slice::<F>();
        assert_eq!(2 * y.len(), gate_up.len());
        let rows = rows_per_task(ffn);
        self.pool().for_rows(RowsMut::new(y.into_slice::<F>(), ffn), rows, |range, y| {
            let gate_up = &gate_up[2 * range.start * ffn..2 * range.end * ffn];
            vectorize!({
                for (y, gate_up) in y.chunks_exact_mut(ffn).zip(gate_up.chunks_exact(2 * ffn)) {
                    let (gate, up) = gate_up.split_at(ffn);
                    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                        *y = g * sigmoid(g) * u;
                    }
                }
            });
        });
    }

    fn gate_backward(&self, dgate_up: Mut<'_, Self>, dy: Ref<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize) {
        let (dy, gate_up) = (dy.as_slice::<F>(), gate_up.as_slice::<F>());
        assert!(dgate_up.len() == gate_up.len() && 2 * dy.len() == gate_up.len());
        let rows = rows_per_task(ffn);
        self.pool().for_rows(RowsMut::new(dgate_up.into_slice::<F>(), 2 * ffn), rows, |range, dgate_up| {
            let dy = &dy[range.start * ffn..range.end * ffn];
            let gate_up = &gate_up[2 * range.start * ffn..2 * range.end * ffn];
            let rows = dgate_up.chunks_exact_mut(2 * ffn).zip(dy.chunks_exact(ffn)).zip(gate_up.chunks_exact(2 * ffn));
            vectorize!({
                for ((d, dy), gate_up) in rows {
                    let ((dgate, dup), (gate, up)) = (d.split_at_mut(ffn), gate_up.split_at(ffn));
                    gate_backward_row(dgate, dup, dy, gate, up);
                }
            });
        });
    }
}

/// Rows of a task, for rows of `width` elements.
fn rows_per_task(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

#[inline(always)]
fn map<F: Real>(y: &mut [F], x: &[F], f: impl Fn(F) -> F) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = f(x);
    }
}

#[inline(always)]
fn multiply<F: Real>(d: &mut [F], x: &[F], slope: impl Fn(F) -> F) {
    for (d, &x) in d.iter_mut().zip(x) {
        *d *= slope(x);
    }
}

/// silu(g) · u has the slopes σ(g) (1 + g (1 − σ(g))) · u by g and silu(g) by u.
#[inline(always)]
fn gate_backward_row<F: Real>(dgate: &mut [F], dup: &mut [F], dy: &[F], gate: &[F], up: &[F]) {
    for ((((dg, du), &dy), &g), &u) in dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up) {
        let s = sigmoid(g);
        *dg = dy * u * s * (F::ONE + g * (F::ONE - s));
        *du = dy * g * s;
    }
}

#[inline(always)]
fn sigmoid<F: Real>(x: F) -> F {
    F::ONE / (F::ONE + (-x).exp())
}

/// 2 √(2/π) and 2 √(2/π) · 0.044715: 0.5 (1 + tanh u) is sigmoid(2u), and 2u = x (LINEAR + CUBIC x²).
const LINEAR: f64 = 1.595_769_121_605_730_8;
const CUBIC: f64 = LINEAR * 0.044_715;

#[inline(always)]
fn gelu_tanh<F: Real>(x: F) -> F {
    x * sigmoid(x * (F::from_f64(LINEAR) + F::from_f64(CUBIC) * x * x))
}

#[inline(always)]
fn gelu_tanh_slope<F: Real>(x: F) -> F {
    let x2 = x * x;
    let s = sigmoid(x * (F::from_f64(LINEAR) + F::from_f64(CUBIC) * x2));
    s + x * s * (F::ONE - s) * (F::from_f64(LINEAR) + F::from_f64(3.0 * CUBIC) * x2)
}

/// Φ, the distribution function of N(0, 1).
#[inline(always)]
fn normal_distribution<F: Real>(x: F) -> F {
    F::from_f64(0.5) * (F::ONE + (x * F::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

#[inline(always)]
fn gelu_exact<F: Real>(x: F) -> F {
    x * normal_distribution(x)
}

/// The slope is Φ(x) + x φ(x). In two loops: the compiler makes no vector code of one that has both erf and exp.
#[inline(always)]
fn gelu_exact_backward<F: Real>(d: &mut [F], x: &[F]) {
    const INVERSE_ROOT_TWO_PI: f64 = 0.398_942_280_401_432_7;
    let mut distribution = [F::ZERO; 256];
    for (d, x) in d.chunks_mut(256).zip(x.chunks(256)) {
        map(&mut distribution, x, normal_distribution);
        for ((d, &x), &p) in d.iter_mut().zip(x).zip(&distribution) {
            *d *= p + x * F::from_f64(INVERSE_ROOT_TWO_PI) * (F::from_f64(-0.5) * x * x).exp();
        }
    }
}

/// Written so that NaN stays NaN.
#[inline(always)]
fn relu<F: Real>(x: F) -> F {
    if x <= F::ZERO { F::ZERO } else { x }
}

#[inline(always)]
fn relu_slope<F: Real>(x: F) -> F {
    if x > F::ZERO { F::ONE } else { F::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_f32, assert_gradient, cpu, dot, elements, floats, random, unwritten, values};

    const KINDS: [Activation; 3] = [Activation::GeluTanh, Activation::GeluExact, Activation::Relu];

    fn activate<F: Real>(threads: usize, x: &[f64], kind: Activation) -> Vec<f64> {
        let cpu = cpu::<F>(threads);
        let mut y = unwritten(&cpu, x.len());
        cpu.activate(y.view_mut(), floats(&cpu, x).view(), kind);
        values(&y)
    }

    fn activate_backward<F: Real>(threads: usize, dy: &[f64], x: &[f64], kind: Activation) -> Vec<f64> {
        let cpu = cpu::<F>(threads);
        let mut d = floats(&cpu, dy);
        cpu.activate_backward(d.view_mut(), floats(&cpu, x).view(), kind);
        values(&d)
    }

    fn gate<F: Real>(threads: usize, gate_up: &[f64], ffn: usize) -> Vec<f64> {
        let cpu = cpu::<F>(threads);
        let mut y = unwritten(&cpu, gate_up.len() / 2);
        cpu.gate(y.view_mut(), floats(&cpu, gate_up).view(), ffn);
        values(&y)
    }

    fn gate_backward<F: Real>(threads: usize, dy: &[f64], gate_up: &[f64], ffn: usize) -> Vec<f64> {
        let cpu = cpu::<F>(threads);
        let mut d = unwritten(&cpu, gate_up.len());
        cpu.gate_backward(d.view_mut(), floats(&cpu, dy).view(), floats(&cpu, gate_up).view(), ffn);
        values(&d)
    }

    #[test]
    fn values_are_the_formulas() {
        let x: Vec<f64> = random(1, 37).iter().map(|v| 6.0 * v).collect();
        let tanh = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        for (&x, y) in x.iter().zip(activate::<f64>(1, &x, Activation::GeluTanh)) {
            assert!((y - tanh(x)).abs() < 1e-14);
        }
        for (&x, y) in x.iter().zip(activate::<f64>(1, &x, Activation::Relu)) {
            assert_eq!(y, x.max(0.0));
        }
        // Φ from tables: Φ(1) = 0.841344746068543, Φ(−2) = 0.0227501319481792.
        let y = activate::<f64>(1, &[1.0, -2.0], Activation::GeluExact);
        assert!((y[0] - 0.841344746068543).abs() < 1e-14 && (y[1] + 2.0 * 0.0227501319481792).abs() < 1e-14);
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let y = gate::<f64>(1, &[1.0, -3.0, 0.5, 0.25], 2);
        assert!((y[0] - silu(1.0) * 0.5).abs() < 1e-15 && (y[1] - silu(-3.0) * 0.25).abs() < 1e-15);
    }

    #[test]
    fn gradients() {
        // Away from 0, where ReLU has no derivative.
        let x: Vec<f64> = random(2, 23).iter().map(|v| 3.0 * v + 0.01 * v.signum()).collect();
        let dy = random(3, x.len());
        for kind in KINDS {
            let d = activate_backward::<f64>(1, &dy, &x, kind);
            assert_gradient(&format!("{kind:?}"), &x, &d, |x| dot(&dy, &activate::<f64>(1, x, kind)));
        }
        let gate_up = random(4, 2 * 3 * 5);
        let dy = random(5, 3 * 5);
        let d = gate_backward::<f64>(1, &dy, &gate_up, 5);
        assert_gradient("gate", &gate_up, &d, |g| dot(&dy, &gate::<f64>(1, g, 5)));
    }

    #[test]
    fn f32_is_f64_rounded() {
        // The argument of exp has at most 5 roundings, which its size (under 40 for |x| ≤ 6) multiplies where the
        // result is near 0 and so x · s is small; f32's own functions and the products add some 10 more.
        let x: Vec<f64> = random(6, 20_011).iter().map(|v| f64::from((6.0 * v) as f32)).collect();
        let dy = random(7, x.len());
        for kind in KINDS {
            let (y, exact) = (activate::<f32>(2, &x, kind), activate::<f64>(1, &x, kind));
            assert_f32(&format!("{kind:?}"), &y, &exact, 16.0, |i| x[i].abs());
            let (d, exact) = (activate_backward::<f32>(2, &dy, &x, kind), activate_backward::<f64>(1, &dy, &x, kind));
            assert_f32(&format!("{kind:?} backward"), &d, &exact, 16.0, |i| dy[i].abs() * (1.0 + x[i] * x[i]));
        }
        let ffn = 2001;
        let gate_up = &x[..2 * 5 * ffn];
        let dy = &dy[..5 * ffn];
        assert_f32("gate", &gate::<f32>(2, gate_up, ffn), &gate::<f64>(1, gate_up, ffn), 16.0, |_| 36.0);
        let exact = gate_backward::<f64>(1, dy, gate_up, ffn);
        assert_f32("gate backward", &gate_backward::<f32>(2, dy, gate_up, ffn), &exact, 16.0, |_| 36.0);
    }

    #[test]
    fn threads_change_no_bit() {
        let x = random(8, 2 * 3 * 9_001);
        let dy = random(9, x.len());
        let run = |threads| {
            let mut all: Vec<Vec<f64>> = KINDS.iter().map(|&kind| activate::<f32>(threads, &x, kind)).collect();
            all.extend(KINDS.iter().map(|&kind| activate_backward::<f32>(threads, &dy, &x, kind)));
            all.push(gate::<f32>(threads, &x, 9_001));
            all.push(gate_backward::<f32>(threads, &dy[..x.len() / 2], &x, 9_001));
            all
        };
        let one = run(1);
        assert!(one.iter().flatten().all(|v| v.is_finite()));
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }

    #[test]
    fn copies_are_equal_in_bits_at_any_place() {
        let cpu = cpu::<f32>(2);
        for kind in KINDS {
            for value in random(10, 50) {
                let mut y = floats(&cpu, &vec![1.0; BLOCK + 37]);
                cpu.activate(y.view_mut(), floats(&cpu, &vec![4.0 * value; BLOCK + 37]).view(), kind);
                let y = elements::<f32, f32>(&y);
                assert!(y.iter().all(|v| v.to_bits() == y[0].to_bits()), "{kind:?} at {value}");
            }
        }
    }

    #[test]
    fn large_values_and_nan() {
        for kind in KINDS {
            let y = activate::<f32>(1, &[1e4, -1e4, f64::NAN, 0.0], kind);
            assert!(y[0] == 1e4 && y[1] == 0.0 && y[2].is_nan() && y[3] == 0.0, "{kind:?}: {y:?}");
            let d = activate_backward::<f32>(1, &[1.0, 1.0], &[1e4, -1e4], kind);
            assert_eq!(d, [1.0, 0.0], "{kind:?}");
        }
        assert_eq!(gate::<f32>(1, &[-200.0, 200.0, 1.0, 1.0], 2), [0.0, 200.0]);
    }
}
