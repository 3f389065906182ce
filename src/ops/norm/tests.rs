use super::{
    cpu::{BLOCK, TASK},
    *,
};
use crate::{
    backend::cpu::Real,
    ops::tests::{assert_f32, assert_gradient, cpu, dot, elements, floats, random, unwritten, values},
};

const SHAPE: NormShape = NormShape { rows: 7, width: 19, kind: NormKind::Layer, eps: 1e-5 };
const KINDS: [NormKind; 2] = [NormKind::Layer, NormKind::Rms];

struct Case {
    x: Vec<f64>,
    branch: Vec<f64>,
    gain: Vec<f64>,
    bias: Vec<f64>,
    dy: Vec<f64>,
    past: Vec<f64>,
    shape: NormShape,
}

impl Case {
    fn new(shape: NormShape) -> Self {
        let len = shape.rows * shape.width;
        Self {
            x: random(1, len).iter().map(|v| v + 0.3).collect(),
            branch: random(2, len),
            gain: random(3, shape.width).iter().map(|v| 1.0 + 0.5 * v).collect(),
            bias: random(4, shape.width),
            dy: random(5, len),
            past: random(6, len),
            shape,
        }
    }

    /// (y, sum) with the residual, (y, []) without.
    fn forward<F: Real>(&self, threads: usize, residual: bool, bias: bool) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let cpu = cpu::<F>(threads);
        let len = self.x.len();
        let (mut y, mut sum) = (unwritten(&cpu, len), unwritten(&cpu, len));
        let mut statistics = unwritten(&cpu, 2 * self.shape.rows);
        let (x, branch, gain) = (floats(&cpu, &self.x), floats(&cpu, &self.branch), floats(&cpu, &self.gain));
        let bias = bias.then(|| floats(&cpu, &self.bias));
        let residual = residual.then(|| Residual { sum: sum.view_mut(), branch: branch.view(), scale: 0.5 });
        let bias = bias.as_ref().map(|b| b.view());
        cpu.norm(y.view_mut(), statistics.view_mut(), x.view(), residual, gain.view(), bias, self.shape);
        (values(&y), values(&sum), values(&statistics))
    }

    /// (dx, dgain, dbias) of norm(x).
    fn backward<F: Real>(&self, threads: usize, overwrite: bool) -> [Vec<f64>; 3] {
        let statistics = self.forward::<F>(threads, false, true).2;
        let cpu = cpu::<F>(threads);
        let mut dx = if overwrite { unwritten(&cpu, self.x.len()) } else { floats(&cpu, &self.past) };
        let (mut dgain, mut dbias) = (unwritten(&cpu, self.gain.len()), unwritten(&cpu, self.gain.len()));
        let (dy, x, gain) = (floats(&cpu, &self.dy), floats(&cpu, &self.x), floats(&cpu, &self.gain));
        let statistics = floats(&cpu, &statistics);
        cpu.norm_backward(
            dx.view_mut(),
            dgain.view_mut(),
            Some(dbias.view_mut()),
            dy.view(),
            x.view(),
            statistics.view(),
            gain.view(),
            self.shape,
            overwrite,
        );
        [values(&dx), values(&dgain), values(&dbias)]
    }
}

#[test]
fn values_are_the_formulas() {
    for kind in KINDS {
        let case = Case::new(NormShape { kind, ..SHAPE });
        let (y, sum, statistics) = case.forward::<f64>(2, true, true);
        for (r, y) in y.chunks(19).enumerate() {
            let x: Vec<f64> = (r * 19..(r + 1) * 19).map(|i| case.x[i] + 0.5 * case.branch[i]).collect();
            assert_eq!(x, sum[r * 19..(r + 1) * 19]);
            let mean = if kind == NormKind::Layer { x.iter().sum::<f64>() / 19.0 } else { 0.0 };
            let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 19.0 + 1e-5).sqrt();
            assert!((statistics[2 * r] - mean).abs() < 1e-14);
            assert!((statistics[2 * r + 1] * deviation - 1.0).abs() < 1e-14);
            for j in 0..19 {
                assert!((y[j] - (x[j] - mean) / deviation * case.gain[j] - case.bias[j]).abs() < 1e-14);
            }
        }
        let (plain, ..) = case.forward::<f64>(1, false, false);
        let (with_bias, ..) = case.forward::<f64>(1, false, true);
        assert!(plain.iter().zip(with_bias).enumerate().all(|(i, (p, b))| (b - p - case.bias[i % 19]).abs() < 1e-14));
    }
}

#[test]
fn gradients() {
    for kind in KINDS {
        let case = Case::new(NormShape { kind, ..SHAPE });
        let loss = |case: &Case| dot(&case.dy, &case.forward::<f64>(1, false, true).0);
        let with = |change: &dyn Fn(&mut Case)| {
            let mut moved = Case::new(case.shape);
            change(&mut moved);
            loss(&moved)
        };
        let [dx, dgain, dbias] = case.backward::<f64>(2, true);
        assert_gradient("x", &case.x, &dx, |x| with(&|c| c.x = x.to_vec()));
        assert_gradient("gain", &case.gain, &dgain, |g| with(&|c| c.gain = g.to_vec()));
        assert_gradient("bias", &case.bias, &dbias, |b| with(&|c| c.bias = b.to_vec()));

        let [added, again, _] = case.backward::<f64>(2, false);
        assert_eq!(again, dgain);
        assert!(added.iter().zip(&dx).zip(&case.past).all(|((a, d), p)| (a - d - p).abs() < 1e-14));
    }
}

#[test]
fn threads_change_no_bit_and_f32_is_near() {
    for kind in KINDS {
        let shape = NormShape { rows: 3 * BLOCK + 5, width: 131, kind, eps: 1e-5 };
        let case = Case::new(shape);
        let forward = case.forward::<f32>(1, true, true);
        let backward = case.backward::<f32>(1, false);
        for threads in [2, 3] {
            assert_eq!(forward, case.forward::<f32>(threads, true, true));
            assert_eq!(backward, case.backward::<f32>(threads, false));
        }
        // Means are sums of 131 terms in 16 lanes: 131/16 + 4 additions, whose error a normalised value (under 4)
        // takes over about twice, by mean and deviation; the gradients go through two means more.
        let additions = 131.0 / 16.0 + 4.0;
        let exact = case.forward::<f64>(1, true, true);
        assert_f32("y", &forward.0, &exact.0, 2.0 * additions, |_| 4.0);
        let exact = case.backward::<f64>(1, false);
        assert_f32("dx", &backward[0], &exact[0], 4.0 * additions, |_| 4.0);
        // Sums over the rows, of terms under 4, in blocks; the roundings' mean grows with the sum's length only.
        let rows = (BLOCK + 4) as f64;
        assert_f32("dgain", &backward[1], &exact[1], rows, |_| 4.0 * (shape.rows as f64).sqrt());
        assert_f32("dbias", &backward[2], &exact[2], rows, |_| 4.0 * (shape.rows as f64).sqrt());
    }
}

#[test]
fn copies_are_equal_in_bits() {
    for kind in KINDS {
        let shape = NormShape { rows: BLOCK + 3, width: 3 * 37, kind, eps: 1e-5 };
        let mut case = Case::new(shape);
        for vector in [&mut case.x, &mut case.branch, &mut case.gain, &mut case.bias, &mut case.dy, &mut case.past] {
            *vector = (0..vector.len()).map(|i| vector[i / 3]).collect();
        }
        let same = |v: &[f64]| v.chunks(3).all(|c| c.iter().all(|x| x.to_bits() == c[0].to_bits()));
        let (y, sum, _) = case.forward::<f32>(2, true, true);
        assert!(same(&y) && same(&sum));
        assert!(case.backward::<f32>(2, false).iter().all(|g| same(g)));
    }
}

#[test]
fn add_and_scale() {
    let cpu = cpu::<f32>(2);
    let (x, branch) = (random(1, 2 * TASK + 3), random(2, 2 * TASK + 3));
    let mut target = unwritten(&cpu, x.len());
    cpu.add(target.view_mut(), floats(&cpu, &x).view(), floats(&cpu, &branch).view(), 0.25);
    let expected = |i: usize| x[i] as f32 + 0.25 * branch[i] as f32;
    assert!(elements::<f32, f32>(&target).iter().enumerate().all(|(i, &v)| v == expected(i)));
    cpu.scale(target.view_mut(), -2.0);
    assert!(elements::<f32, f32>(&target).iter().enumerate().all(|(i, &v)| v == -2.0 * expected(i)));
}
