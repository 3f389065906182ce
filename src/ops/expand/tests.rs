use super::*;
use crate::{
    backend::{
        Tensor,
        cpu::{Element, Real},
    },
    ops::tests::{cpu, elements, random, tensor},
    rng::Stream,
};
use half::{bf16, f16};

/// A source with its maps.
struct Case<S> {
    values: Vec<S>,
    source_columns: usize,
    rows: Vec<u32>,
    columns: Vec<u32>,
    /// Factors of rows and columns.
    scales: [Option<Vec<f64>>; 2],
}

impl<S: Float> Case<S> {
    fn new(rows: usize, columns: usize, rows_map: Vec<u32>, columns_map: Vec<u32>) -> Self {
        let values = random(7, rows * columns).into_iter().map(S::store).collect();
        Self { values, source_columns: columns, rows: rows_map, columns: columns_map, scales: [None, None] }
    }

    fn len(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Runs the op on the ranges between `borders` of the target.
    fn run<F: Real, T: Float>(&self, cpu: &Cpu<F>, borders: &[usize], scale: f64, noise: Option<&Noise>) -> Vec<T> {
        let nan = vec![T::store(f64::NAN); self.len()];
        let mut target = tensor(cpu, &nan);
        let (values, rows) = (tensor(cpu, &self.values), tensor(cpu, &self.rows));
        let columns = tensor(cpu, &self.columns);
        let scales = self.scales.clone().map(|s| s.map(|s| tensor(cpu, &s)));
        for border in borders.windows(2) {
            let source = Source {
                values: values.view(),
                columns: self.source_columns,
                rows_map: rows.view(),
                columns_map: columns.view(),
                scale,
                rows_scale: scales[0].as_ref().map(Tensor::view),
                columns_scale: scales[1].as_ref().map(Tensor::view),
            };
            cpu.expand(target.slice_mut(border[0]..border[1]), border[0], self.columns.len(), source, noise);
        }
        elements(&target)
    }

    /// All factors on element i.
    fn scale(&self, i: usize, whole: f64) -> f64 {
        let at = [i / self.columns.len(), i % self.columns.len()];
        (0..2).fold(whole, |scale, axis| scale * self.scales[axis].as_ref().map_or(1.0, |s| s[at[axis]]))
    }

    /// The value that element i copies.
    fn source(&self, i: usize) -> f64 {
        let (row, column) = (i / self.columns.len(), i % self.columns.len());
        self.values[self.rows[row] as usize * self.source_columns + self.columns[column] as usize].load()
    }

    fn assert_definition<T: Float + PartialEq + std::fmt::Debug>(&self, cpu: &Cpu<f32>, noise: Option<&Noise>) {
        let (scale, len) = (1.0 / 3.0, self.len());
        let result = self.run::<f32, T>(cpu, &[0, len / 3, len / 3 + 1, len], scale, noise);
        for (i, &value) in result.iter().enumerate() {
            let scale = self.scale(i, scale);
            let mut normal = [0.0];
            let amount = noise.map_or(0.0, |n| {
                n.stream.normal_fill(i as u64, &mut normal);
                n.amount
            });
            let expected = if T::DTYPE == f64::DTYPE {
                T::store(scale * self.source(i) + amount * f64::from(normal[0]))
            } else {
                T::store(f64::from(scale as f32 * self.source(i) as f32 + amount as f32 * normal[0]))
            };
            assert_eq!(value, expected, "element {i} of {len}");
        }
    }
}

/// k copies of each of n indices.
fn repeated(n: usize, k: usize) -> Vec<u32> {
    (0..n * k).map(|i| (i / k) as u32).collect()
}

fn noise(amount: f64, paired: Option<u32>) -> Noise {
    Noise { stream: Stream::new(5, "blocks.0.mlp.up.weight"), amount, paired }
}

fn bits<T: Element>(x: &[T]) -> &[u8] {
    bytemuck::cast_slice(x)
}

fn every_target<S: Float>() {
    let cpu = cpu::<f32>(2);
    let shuffled = |n: u32| (0..n).map(|i| i * 7 % n).collect::<Vec<_>>();
    let cases = [1, 2, 3, 4, 5].map(|k| Case::<S>::new(5, 37, repeated(5, k), repeated(37, k)));
    let heads = (0..64).map(|i| i / 16 / 2 * 16 + i % 16).collect();
    let others = [
        Case::new(4, 33, shuffled(4), shuffled(33)),
        Case::new(3, 32, repeated(3, 2), heads),
        Case::new(50, 1, repeated(50, 3), vec![0]),
        // Over several blocks, and not in step with them.
        Case::new(3, 4099, repeated(3, 1), repeated(4099, 3)),
    ];
    let factors = |n: usize| Some((0..n).map(|i| (i % 3) as f64 / 7.0).collect::<Vec<_>>());
    let mut scaled = [Case::new(4, 33, shuffled(4), shuffled(33)), Case::new(50, 1, repeated(50, 3), vec![0])];
    scaled.iter_mut().for_each(|case| case.scales = [factors(case.rows.len()), factors(case.columns.len())]);
    scaled[1].scales[1] = None;
    for case in cases.iter().chain(&others).chain(&scaled) {
        for noise in [None, Some(&noise(0.25, None))] {
            case.assert_definition::<f64>(&cpu, noise);
            case.assert_definition::<f32>(&cpu, noise);
            case.assert_definition::<bf16>(&cpu, noise);
            case.assert_definition::<f16>(&cpu, noise);
        }
    }
}

#[test]
fn every_element_is_what_the_contract_says() {
    every_target::<f64>();
    every_target::<f32>();
    every_target::<bf16>();
    every_target::<f16>();
}

#[test]
fn loading_by_the_identity_keeps_every_bit() {
    let values: Vec<f32> = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9))).collect();
    let values: Vec<f32> = values.into_iter().filter(|v| !v.is_nan()).collect();
    let mut case = Case::new(1, 1, repeated(values.len(), 1), vec![0]);
    case.values = values;
    let result: Vec<f32> = case.run(&cpu::<f32>(1), &[0, case.len()], 1.0, None);
    assert_eq!(bits(&result), bits(&case.values));
}

#[test]
fn bits_depend_neither_on_threads_nor_on_ranges() {
    let case = Case::<f32>::new(97, 1031, repeated(97, 2), repeated(1031, 2));
    for noise in [noise(0.1, None), noise(0.1, Some(2))] {
        let whole: Vec<f32> = case.run(&cpu::<f32>(1), &[0, case.len()], 0.5, Some(&noise));
        for threads in [2, 3] {
            let cut: Vec<f32> = case.run(&cpu::<f32>(threads), &[0, 1, 70_001, 70_002, case.len()], 0.5, Some(&noise));
            assert_eq!(bits(&whole), bits(&cut));
        }
    }
}

/// Σ over the copies of a source column is what a layer adds up when the copies of its input are equal.
fn paired_noise_cancels<F: Real, T: Float>(rounding: f64) {
    let cpu = cpu::<F>(2);
    for k in [2, 3] {
        // The copies of a column lie together, or a head apart.
        let heads = (0..100 * k).map(|i| (i / (10 * k) * 10 + i % 10) as u32).collect();
        for columns in [repeated(100, k), heads] {
            let mut case = Case::<f32>::new(40, 100, repeated(40, 1), columns);
            case.values.fill(0.0);
            let amount = 0.5;
            let result: Vec<T> = case.run(&cpu, &[0, case.len()], 1.0, Some(&noise(amount, Some(k as u32))));
            for row in result.chunks(case.columns.len()) {
                let mut sums = [0.0; 100];
                for (&column, &value) in case.columns.iter().zip(row) {
                    sums[column as usize] += value.load();
                }
                // k values under 5 · amount, each rounded some three times.
                assert!(sums.iter().all(|s| s.abs() < 3.0 * k as f64 * 5.0 * amount * rounding));
            }
            let squares: f64 = result.iter().map(|v| v.load() * v.load()).sum();
            let deviation = (squares / case.len() as f64).sqrt();
            // The deviation of a sample deviation is amount / √(2 n), n the independent draws; five of them.
            let bound = 5.0 * amount / (2.0 * (4000 * (k - 1)) as f64).sqrt();
            assert!((deviation - amount).abs() < bound, "{k}: {deviation}");
        }
    }
}

#[test]
fn paired_noise_keeps_the_function_and_its_deviation() {
    paired_noise_cancels::<f32, f32>(2f64.powi(-24));
    paired_noise_cancels::<f64, f64>(2f64.powi(-53));
}

#[test]
fn fill_is_mean_plus_noise() {
    let (cpu, noise) = (cpu::<f32>(3), noise(0.02, None));
    let len = 3 * TASK + 11;
    let mut normals = vec![0.0; len];
    noise.stream.normal_fill(5, &mut normals);
    let mut target = tensor(&cpu, &vec![f32::NAN; len]);
    cpu.fill(target.view_mut(), 5, 1.0, Some(&noise));
    let expected: Vec<f32> = normals.iter().map(|n| 1.0 + 0.02f32 * n).collect();
    assert_eq!(elements::<_, f32>(&target), expected);
    let mut target: Tensor<Cpu<f32>> = tensor(&cpu, &vec![bf16::NAN; len]);
    cpu.fill(target.view_mut(), 0, 0.5, None);
    assert!(elements::<_, bf16>(&target).iter().all(|&v| v == bf16::from_f32(0.5)));
}

#[test]
fn mean_square_is_exact_where_sums_are() {
    // Squares of multiples of 2⁻⁸ under 1 are multiples of 2⁻¹⁶: sums of 2¹⁸ of them have 34 bits, and are exact.
    let values: Vec<f32> = random(3, (1 << 18) + 5).iter().map(|v| (v * 256.0).round() as f32 / 256.0).collect();
    let expected = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / values.len() as f64;
    for threads in [1, 2, 3] {
        let cpu = cpu::<f32>(threads);
        let (x, mut out) = (tensor(&cpu, &values), tensor(&cpu, &[f64::NAN]));
        cpu.mean_square(out.view_mut(), x.view());
        assert_eq!(elements::<_, f64>(&out), [expected]);
        cpu.mean_square(out.view_mut(), x.slice(0..0));
        assert_eq!(elements::<_, f64>(&out), [0.0]);
    }
}
