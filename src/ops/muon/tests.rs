use super::*;
use crate::{
    backend::Tensor,
    ops::{
        scalars::{SCALARS, Scalar},
        tests::{cpu, elements, floats, random, tensor, values},
    },
};

const LR: f64 = 0.02;
const FACTOR: f64 = 0.5;
const SETTINGS: RowSettings = RowSettings { lr: 0.7, decay: 0.1, eps: 1e-3, clip: 1.0, muon: 1 };

/// Weight, first moment, and what the last step reported.
type State = (Vec<f64>, Vec<f64>, f64);

/// Runs steps of the op with these gradients, from a weight of random numbers (or of the given ones).
fn run<F: Real>(threads: usize, weight: &[f64], shape: (usize, usize), gradients: &[Vec<f64>], skip: f64) -> State {
    let cpu = cpu::<F>(threads);
    let mut weight = floats(&cpu, weight);
    let mut first = floats(&cpu, &vec![0.0; weight.len()]);
    let mut work = floats(&cpu, &vec![f64::NAN; scratch(shape.0, shape.1)]);
    let mut partial = tensor(&cpu, &[f64::NAN]);
    let mut scalars: Tensor<Cpu<F>> = tensor(&cpu, &[0.0; SCALARS]);
    for (scalar, value) in [(Scalar::LearningRate, LR), (Scalar::Factor, FACTOR), (Scalar::Skip, skip)] {
        *scalar.in_mut(scalars.view_mut().into_slice()) = value;
    }
    for gradient in gradients {
        let gradient = floats(&cpu, gradient);
        let matrix = MuonMatrix {
            weight: weight.view_mut(),
            master: None,
            first: first.view_mut(),
            gradient: gradient.view(),
            offset: 0,
            rows: shape.0,
            columns: shape.1,
            settings: SETTINGS,
        };
        cpu.muon(matrix, partial.view_mut(), work.view_mut(), scalars.view());
    }
    (values(&weight), values(&first), elements::<_, f64>(&partial)[0])
}

fn transposed(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|j| (0..rows).map(move |i| x[i * columns + j])).collect()
}

fn product(a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    (0..m * n).map(|ij| (0..k).map(|p| a[ij / n * k + p] * b[p * n + ij % n]).sum()).collect()
}

/// The same, written out on matrices.
fn reference(weight: &[f64], (rows, columns): (usize, usize), gradients: &[Vec<f64>]) -> State {
    let (mut w, mut m, mut changed) = (weight.to_vec(), vec![0.0; weight.len()], 0.0);
    for gradient in gradients {
        let g: Vec<f64> = gradient.iter().map(|g| FACTOR * g).collect();
        m = m.iter().zip(&g).map(|(m, g)| 0.95 * m + g).collect();
        let u: Vec<f64> = m.iter().zip(&g).map(|(m, g)| g + 0.95 * m).collect();
        let norm = u.iter().map(|u| u * u).sum::<f64>().sqrt() + SETTINGS.eps;
        let mut x: Vec<f64> = u.iter().map(|u| u / norm).collect();
        let (n, l) = (rows.min(columns), rows.max(columns));
        if rows > columns {
            x = transposed(&x, rows, columns);
        }
        for _ in 0..5 {
            let a = product(&x, &transposed(&x, n, l), (n, n, l));
            let aa = product(&a, &a, (n, n, n));
            let b: Vec<f64> = a.iter().zip(aa).map(|(a, aa)| -4.7750 * a + 2.0315 * aa).collect();
            let bx = product(&b, &x, (n, l, n));
            x = x.iter().zip(bx).map(|(x, bx)| 3.4445 * x + bx).collect();
        }
        if rows > columns {
            x = transposed(&x, columns, rows);
        }
        let lr = LR * SETTINGS.lr;
        let new: Vec<f64> = w.iter().zip(x).map(|(w, x)| w - lr * SETTINGS.decay * w - lr * x).collect();
        changed = new.iter().zip(&w).map(|(new, w)| (new - w).powi(2)).sum();
        w = new;
    }
    (w, m, changed)
}

fn gradients(len: usize) -> Vec<Vec<f64>> {
    (1..4).map(|t| random(t, len)).collect()
}

fn near(a: &State, b: &State, tolerance: f64) -> bool {
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    apart(&a.0, &b.0) <= tolerance && apart(&a.1, &b.1) <= tolerance && (a.2 - b.2).abs() <= tolerance
}

#[test]
fn f64_follows_the_definition_for_wide_tall_and_square_matrices() {
    for shape in [(7, 33), (33, 7), (20, 20), (1, 5), (5, 1)] {
        let weight = random(9, shape.0 * shape.1);
        let steps = gradients(weight.len());
        let result = run::<f64>(2, &weight, shape, &steps, 0.0);
        // Five steps that amplify small singular values by up to 3.4445⁵ ≈ 485, three times over.
        assert!(near(&result, &reference(&weight, shape, &steps), 1e-12), "{shape:?}");
    }
}

#[test]
fn f32_follows_f64_and_bits_do_not_depend_on_threads() {
    let shape = (96, 160);
    let weight = random(9, shape.0 * shape.1);
    let steps = gradients(weight.len());
    let one = run::<f32>(1, &weight, shape, &steps, 0.0);
    assert!([2, 3].iter().all(|&threads| run::<f32>(threads, &weight, shape, &steps, 0.0) == one));
    // Rounding of x, 2⁻²⁴, is amplified by up to 485 and enters the weight times lr = 0.014, three times; the sums
    // behind x have up to 160 terms.
    let tolerance = 2f64.powi(-24) * (485.0 * 0.014 * 3.0 * 160f64.sqrt() + 10.0);
    assert!(near(&one, &run::<f64>(2, &weight, shape, &steps, 0.0), tolerance));
}

#[test]
fn singular_values_come_near_one() {
    // Of a diagonal, singular values are the diagonal. The quintic brings them to 0.68 … 1.13 (Jordan et al.).
    let cpu = cpu::<f64>(1);
    let n = 12;
    let mut x = vec![0.0; n * n];
    (0..n).for_each(|i| x[i * (n + 1)] = (i + 1) as f64);
    normalise(cpu.pool(), &mut x, 0.0);
    let (mut y, mut squares) = (vec![0.0; n * n], vec![0.0; 2 * n * n]);
    let result = orthogonalise(cpu.pool(), &mut x, &mut y, &mut squares, n, n);
    for (i, value) in result.iter().enumerate() {
        let diagonal = i % (n + 1) == 0;
        assert!(if diagonal { (0.67..1.2).contains(value) } else { *value == 0.0 }, "{i}: {value}");
    }
}

/// A widened matrix without noise: copies of its units must stay equal, bit for bit.
#[test]
fn copies_of_units_stay_bit_identical_in_f32() {
    for (rows, columns, k) in [(24, 40, 2), (40, 24, 3), (65, 65, 2)] {
        let repeat = |x: Vec<f64>| -> Vec<f64> {
            (0..rows * k * columns * k).map(|i| x[i / (columns * k) / k * columns + i % (columns * k) / k]).collect()
        };
        let weight = repeat(random(9, rows * columns));
        let steps: Vec<Vec<f64>> = gradients(rows * columns).into_iter().map(repeat).collect();
        let (wide, ..) = run::<f32>(2, &weight, (rows * k, columns * k), &steps, 0.0);
        let narrow: Vec<f64> =
            (0..rows * columns).map(|i| wide[i / columns * k * columns * k + i % columns * k]).collect();
        assert_eq!(wide, repeat(narrow));
        assert_ne!(wide, weight);
    }
}

#[test]
fn a_skipped_step_changes_nothing() {
    let weight = random(9, 6 * 4);
    let (after, first, partial) = run::<f64>(1, &weight, (6, 4), &[vec![f64::NAN; 24]], 1.0);
    assert_eq!((after, first, partial), (weight, vec![0.0; 24], 0.0));
}
