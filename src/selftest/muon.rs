//! Muon, on matrices whose singular values are equal: the error of Newton-Schulz then follows from that of one number.

use super::agreement::{Agreement, get, put, round, unwritten};
use crate::{
    DType, Result,
    backend::{Backend, Tensor, cpu::Cpu},
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

/// A matrix each of whose rows (columns, where there are more rows) is its neighbour in a pair, the second with its sign
/// turned: any combination of the two matrices has equal singular values too. Zero where one has no neighbour.
fn turned(matrix: &[f64], [rows, columns]: [usize; 2]) -> Vec<f64> {
    let (small, stride, across) = if rows > columns { (columns, 1, columns) } else { (rows, columns, 1) };
    let mut turned = vec![0.0; matrix.len()];
    for i in 0..small / 2 * 2 {
        for j in 0..rows.max(columns) {
            let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
            turned[i * stride + j * across] = sign * matrix[(i ^ 1) * stride + j * across];
        }
    }
    turned
}

/// Where a step starts.
struct Inputs {
    shape: [usize; 2],
    weight: Vec<f64>,
    moment: Vec<f64>,
    gradient: Vec<f64>,
}

impl Inputs {
    fn new(agreement: &Agreement, shape @ [rows, columns]: [usize; 2]) -> Self {
        let matrix = orthonormal(rows, columns);
        // Their types hold moments and gradients. (Singular values that a rounding moved apart move the bound by its
        // square.) An odd number of rows leaves one alone, and then there is no moment.
        let scaled = |matrix: &[f64], by, dtype| matrix.iter().map(|&x| round(by * x, dtype)).collect();
        let of_moment = if rows.min(columns).is_multiple_of(2) { 0.01 } else { 0.0 };
        let (of_gradient, cuda) = (0.03, agreement.cuda());
        let moment = scaled(&turned(&matrix, shape), of_moment, cuda.moment());
        let gradient = scaled(&matrix, of_gradient, cuda.gradient());
        Self { shape, weight: agreement.normal(1, rows * columns, 0.1), moment, gradient }
    }
}

/// Weight (as updated), moment, and partial sums after a step and one more that is skipped.
fn run<B: Muon>(backend: &B, inputs: &Inputs) -> Result<[Vec<f64>; 3]> {
    let [rows, columns] = inputs.shape;
    let mut working = put(backend, backend.compute(), &inputs.weight)?;
    let mut master = backend.master().map(|dtype| put(backend, dtype, &inputs.weight)).transpose()?;
    let mut first = put(backend, backend.moment(), &inputs.moment)?;
    let gradient = put(backend, backend.gradient(), &inputs.gradient)?;
    let mut work = unwritten(backend, backend.compute(), scratch(rows, columns))?;
    let mut partials = unwritten(backend, DType::F64, 2)?;
    for skip in [0, 1] {
        let mut scalars = [0.0; SCALARS];
        let inputs =
            [(Scalar::LearningRate, LR), (Scalar::Time, 3.0), (Scalar::Factor, FACTOR), (Scalar::Skip, skip as f64)];
        inputs.into_iter().for_each(|(scalar, value)| *scalar.in_mut(&mut scalars) = value);
        let scalars = put(backend, DType::F64, &scalars)?;
        let matrix = MuonMatrix {
            weight: working.view_mut(),
            master: master.as_mut().map(Tensor::view_mut),
            first: first.view_mut(),
            gradient: gradient.view(),
            offset: 7,
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
    let single = 2f64.powi(-24);
    let single_cpu = Cpu::<f32>::new(0)?.with_moments(agreement.cuda().moment());
    for shape @ [rows, columns] in [[1, 1], [1, 7], [5, 5], [2, 3], [8, 67], [67, 16], [33, 129], [128, 64]] {
        let inputs = Inputs::new(agreement, shape);
        let [weight, moment, sums] = run(agreement.cuda(), &inputs)?;
        let [wanted, _, wanted_sums] = run(agreement.cpu(), &inputs)?;
        let [_, wanted_moment, _] = run(&single_cpu, &inputs)?;
        // Sums of f32 are rounded as often as they have terms.
        let rounding = agreement.rounding() + single * rows.max(columns) as f64;
        let change = wanted_sums[0].sqrt();
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        // The weights themselves are rounded to f32 three times.
        let bound =
            relative_error(rows.min(columns), rounding) * change + 3.0 * single * norm(&mut wanted.iter().copied());
        let off = norm(&mut weight.iter().zip(&wanted).map(|(got, wanted)| got - wanted));
        let name = |what: &str| format!("muon {what} {rows} x {columns}");
        agreement.compare(name("weights"), &[off], &[0.0], |_| bound);
        // The bits of the CPU's f32.
        agreement.compare(name("moment"), &moment, &wanted_moment, |_| 0.0);
        // (change + bound)² − change².
        agreement.compare(name("changes"), &sums, &wanted_sums, |_| bound * (2.0 * change + bound));
    }
    Ok(())
}
