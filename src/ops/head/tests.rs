//! The readout against its definition, differences, itself on other threads, and its promises on bits.

use super::*;
use crate::{
    backend::{
        Tensor,
        cpu::{Cpu, Real},
    },
    ops::tests::{assert_f32, assert_gradient, cpu, dot, elements, floats, random, tensor, unwritten, values},
};

/// What a readout is computed from.
struct Inputs {
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    targets: Vec<i32>,
    shape: ReadoutShape,
}

/// Factor on every loss.
const SCALE: f64 = 0.3;

impl Inputs {
    fn new(rows: usize, width: usize, classes: usize, padded: usize, bias: bool) -> Self {
        let mut weight = random(2, padded * width);
        weight[classes * width..].fill(0.0);
        let mut b = random(3, padded);
        b[classes..].fill(0.0);
        let pick = |(r, u): (usize, f64)| if r % 5 == 3 { -1 } else { ((u + 1.0) / 2.0 * classes as f64) as i32 };
        let targets = random(4, rows).into_iter().enumerate().map(pick).collect();
        let shape = ReadoutShape { rows, width, classes, padded, scale: 1.5 };
        Self { x: random(1, rows * width), weight, bias: bias.then_some(b), targets, shape }
    }

    /// Logits by the formula, rows × classes.
    fn logits(&self) -> Vec<f64> {
        let ReadoutShape { width, classes, scale, .. } = self.shape;
        let logit = |x: &[f64], c: usize| {
            scale * dot(x, &self.weight[c * width..][..width]) + self.bias.as_ref().map_or(0.0, |b| b[c])
        };
        self.x.chunks(width).flat_map(|x| (0..classes).map(move |c| logit(x, c))).collect()
    }

    /// Losses by the formula.
    fn losses(&self) -> Vec<f64> {
        let logits = self.logits();
        let loss = |(z, &t): (&[f64], &i32)| match usize::try_from(t) {
            Ok(t) => z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[t],
            Err(_) => 0.0,
        };
        logits.chunks(self.shape.classes).zip(&self.targets).map(loss).collect()
    }

    /// dx, dweight, dbias by the formula.
    fn gradients(&self) -> [Vec<f64>; 3] {
        let ReadoutShape { rows, width, classes, padded, scale } = self.shape;
        let [mut dx, mut dweight, mut dbias] = [rows * width, padded * width, padded].map(|len| vec![0.0; len]);
        for (r, logits) in self.logits().chunks(classes).enumerate() {
            let Ok(target) = usize::try_from(self.targets[r]) else { continue };
            let sum: f64 = logits.iter().map(|z| z.exp()).sum();
            for (c, z) in logits.iter().enumerate() {
                let dlogit = SCALE * (z.exp() / sum - if c == target { 1.0 } else { 0.0 });
                dbias[c] += dlogit;
                for i in 0..width {
                    dx[r * width + i] += scale * dlogit * self.weight[c * width + i];
                    dweight[c * width + i] += scale * dlogit * self.x[r * width + i];
                }
            }
        }
        [dx, dweight, dbias]
    }
}

/// losses, dx, dweight, dbias by the op, with gradients; dbias is empty without a bias.
fn run<F: Real>(cpu: &Cpu<F>, i: &Inputs) -> [Tensor<Cpu<F>>; 4] {
    let ReadoutShape { rows, width, padded, .. } = i.shape;
    let (x, weight, bias) = (floats(cpu, &i.x), floats(cpu, &i.weight), i.bias.as_ref().map(|b| floats(cpu, b)));
    let targets = tensor(cpu, &i.targets);
    let mut out = [rows, rows * width, padded * width, bias.as_ref().map_or(0, |b| b.len())].map(|n| unwritten(cpu, n));
    let mut scratch = unwritten(cpu, cpu.cross_entropy_scratch(i.shape));
    let [losses, dx, dweight, dbias] = &mut out;
    cpu.cross_entropy(
        losses.view_mut(),
        Some(ReadoutGradients {
            dx: dx.view_mut(),
            dweight: dweight.view_mut(),
            dbias: bias.is_some().then(|| dbias.view_mut()),
            scale: SCALE,
        }),
        scratch.view_mut(),
        x.view(),
        weight.view(),
        bias.as_ref().map(Tensor::view),
        targets.view(),
        i.shape,
    );
    out
}

/// losses by the op, without gradients.
fn losses<F: Real>(cpu: &Cpu<F>, i: &Inputs) -> Tensor<Cpu<F>> {
    let (x, weight, bias) = (floats(cpu, &i.x), floats(cpu, &i.weight), i.bias.as_ref().map(|b| floats(cpu, b)));
    let mut losses = unwritten(cpu, i.shape.rows);
    let mut scratch = unwritten(cpu, cpu.cross_entropy_scratch(i.shape));
    cpu.cross_entropy(
        losses.view_mut(),
        None,
        scratch.view_mut(),
        x.view(),
        weight.view(),
        bias.as_ref().map(Tensor::view),
        tensor(cpu, &i.targets).view(),
        i.shape,
    );
    losses
}

/// Odd sizes, one class, no padding, and more rows than a chunk has.
fn cases() -> Vec<Inputs> {
    vec![
        Inputs::new(7, 5, 11, 64, true),
        Inputs::new(7, 5, 11, 11, false),
        Inputs::new(1, 1, 2, 2, true),
        Inputs::new(130, 33, 1000, 1024, true),
        Inputs::new(1100, 3, 7, 8, true),
    ]
}

#[test]
fn losses_and_logits_are_the_definition() {
    for i in cases() {
        let cpu = cpu::<f64>(2);
        let [with, ..] = run(&cpu, &i);
        let expected = i.losses();
        for (a, b) in values(&with).iter().zip(&expected) {
            assert!((a - b).abs() <= 1e-13 * (1.0 + b.abs()), "{a} {b}");
        }
        assert_eq!(elements::<_, f64>(&with), elements::<_, f64>(&losses(&cpu, &i)), "with gradients and without");
        let bias = i.bias.as_ref().map(|b| floats(&cpu, b));
        let mut logits = unwritten(&cpu, i.shape.rows * i.shape.classes);
        let (x, weight) = (floats(&cpu, &i.x), floats(&cpu, &i.weight));
        cpu.logits(logits.view_mut(), x.view(), weight.view(), bias.as_ref().map(Tensor::view), i.shape);
        for (a, b) in values(&logits).iter().zip(i.logits()) {
            assert!((a - b).abs() <= 1e-13 * (1.0 + b.abs()), "{a} {b}");
        }
    }
}

#[test]
fn gradients_of_several_chunks_are_the_definition() {
    for i in cases() {
        let [_, dx, dweight, dbias] = run(&cpu::<f64>(2), &i).map(|t| values(&t));
        for ((name, a), b) in ["dx", "dweight", "dbias"].iter().zip([dx, dweight, dbias]).zip(i.gradients()) {
            for (at, (a, b)) in a.iter().zip(&b).enumerate() {
                assert!(
                    (a - b).abs() <= 1e-14 * (i.shape.rows + i.shape.classes) as f64,
                    "{name}[{at}]: {a} {b} {:?}",
                    i.shape
                );
            }
        }
    }
}

#[test]
fn backward_is_the_gradient() {
    for (bias, padded) in [(true, 13), (false, 11)] {
        let mut i = Inputs::new(9, 5, 11, padded, bias);
        let [_, dx, dweight, dbias] = run(&cpu::<f64>(2), &i).map(|t| values(&t));
        let loss = |i: &Inputs| SCALE * i.losses().iter().sum::<f64>();
        let x = i.x.clone();
        assert_gradient("dx", &x, &dx, |x| {
            i.x.copy_from_slice(x);
            loss(&i)
        });
        i.x = x;
        let weight = i.weight.clone();
        assert_gradient("dweight", &weight, &dweight, |w| {
            i.weight.copy_from_slice(w);
            loss(&i)
        });
        i.weight = weight;
        if let Some(b) = i.bias.clone() {
            assert_gradient("dbias", &b, &dbias, |b| {
                i.bias = Some(b.to_vec());
                loss(&i)
            });
        }
    }
}

#[test]
fn single_precision_is_the_double_one_rounded() {
    for i in cases() {
        let exact = run(&cpu::<f64>(1), &i).map(|t| values(&t));
        let single = run(&cpu::<f32>(1), &i).map(|t| values(&t));
        let ReadoutShape { rows, width, scale, .. } = i.shape;
        // |x|, |w|, |b| ≤ 1, so a logit is a sum of `width` products of size `scale` and errs by width · (width · scale +
        // 1) ulps at most; a probability errs by that much of itself, and by what sums and exp add (8). dx is a sum over
        // the classes with weights that sum to 2; dweight over the rows.
        let ulps = width as f64 * (width as f64 * scale + 1.0) + 8.0;
        let sizes = [1.0, 2.0 * SCALE * scale, rows as f64 * SCALE * scale, rows as f64 * SCALE];
        for (((name, size), a), b) in ["losses", "dx", "dweight", "dbias"].iter().zip(sizes).zip(&single).zip(&exact) {
            assert_f32(name, a, b, ulps, |_| size);
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    for i in cases() {
        let run = |threads| run(&cpu::<f32>(threads), &i).map(|t| elements::<_, f32>(&t));
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }
}

#[test]
fn copies_of_inputs_stay_equal_in_bits() {
    for (rows, width, copies) in [(77, 11, 3), (65, 16, 2), (130, 5, 13)] {
        let mut i = Inputs::new(rows, width, 300, 320, false);
        let spread = |x: &[f64]| -> Vec<f64> { x.iter().flat_map(|&x| vec![x; copies]).collect() };
        (i.x, i.weight, i.shape.width) = (spread(&i.x), spread(&i.weight), width * copies);
        let [_, dx, dweight, _] = run(&cpu::<f32>(2), &i).map(|t| elements::<_, f32>(&t));
        for unit in dx.chunks(copies).chain(dweight.chunks(copies)) {
            assert!(unit.iter().all(|x| x.to_bits() == unit[0].to_bits()), "{unit:?}");
        }
    }
}

#[test]
fn what_is_ignored_or_padding_gives_nothing() {
    let mut i = Inputs::new(9, 5, 11, 16, true);
    i.x[3 * 5..4 * 5].fill(f64::NAN);
    assert_eq!(i.targets[3], -1);
    let [losses, dx, dweight, dbias] = run(&cpu::<f32>(2), &i).map(|t| elements::<_, f32>(&t));
    assert_eq!(losses[3], 0.0);
    assert!(dx[3 * 5..4 * 5].iter().all(|&x| x == 0.0));
    assert!(dweight[11 * 5..].iter().chain(&dbias[11..]).all(|&x| x == 0.0));
    assert!(losses.iter().chain(&dx).chain(&dweight).chain(&dbias).all(|x| x.is_finite()));
}

#[test]
fn large_logits_do_not_overflow_and_nan_is_not_hidden() {
    let mut i = Inputs::new(4, 2, 3, 3, false);
    i.x.fill(1e4);
    i.weight = vec![1.0, 1.0, -1.0, -1.0, 0.0, 0.0];
    i.targets = vec![0, 1, 2, 0];
    let [losses, dx, ..] = run(&cpu::<f32>(1), &i).map(|t| elements::<_, f32>(&t));
    assert_eq!(losses, [0.0, 60000.0, 30000.0, 0.0]);
    assert!(dx.iter().all(|x| x.is_finite()));
    i.x[2] = f64::NAN;
    let [losses, ..] = run(&cpu::<f32>(1), &i).map(|t| elements::<_, f32>(&t));
    assert!(losses[1].is_nan() && losses[0] == 0.0);
}
