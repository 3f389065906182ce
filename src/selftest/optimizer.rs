//! Elementwise optimizers: the bits of the CPU's f32, whatever the working weights are and moments are kept in.

use super::agreement::{Agreement, get, put, round};
use crate::{
    DType, Result,
    backend::{Backend, Tensor, cpu::Cpu},
    ops::{
        optimizer::{Arenas, Method, Optimizer},
        pieces::{self, PIECE, Pieces, RowSettings},
        scalars::{SCALARS, Scalar},
    },
};

const METHODS: [(&str, Method); 7] = [
    ("sgd", Method::Sgd { momentum: 0.0, dampening: 0.0, nesterov: false }),
    ("sgd momentum", Method::Sgd { momentum: 0.9, dampening: 0.3, nesterov: false }),
    ("sgd nesterov", Method::Sgd { momentum: 0.9, dampening: 0.0, nesterov: true }),
    ("adam", Method::Adam { beta1: 0.9, beta2: 0.95, coupled: true, amsgrad: false }),
    ("adamw", Method::Adam { beta1: 0.9, beta2: 0.95, coupled: false, amsgrad: false }),
    ("amsgrad", Method::Adam { beta1: 0.9, beta2: 0.95, coupled: false, amsgrad: true }),
    ("lion", Method::Lion { beta1: 0.9, beta2: 0.99 }),
];
const STEPS: usize = 3;

/// An arena with gaps, a row of Muon's among its rows.
struct Inputs {
    rows: Vec<std::ops::Range<usize>>,
    weights: Vec<f64>,
    gradients: [Vec<f64>; STEPS],
}

impl Inputs {
    fn new(agreement: &Agreement) -> Self {
        let rows = vec![0..1, 64..64 + 8192 + 77, 8448..8448 + 500, 9000..9000 + PIECE + 4097, 80_001..80_003];
        let len = 80_010;
        // Weights that the working type holds, and gradients of every size.
        let mut gradients = [2, 3, 4].map(|seed| agreement.normal(seed, len, 1.0));
        for gradient in &mut gradients {
            gradient.iter_mut().enumerate().for_each(|(i, g)| *g *= 2f64.powi((i % 20) as i32 - 15));
        }
        Self { rows, weights: agreement.normal(1, len, 0.5), gradients }
    }

    fn pieces<B: Optimizer>(&self, backend: &B) -> Result<Pieces<B>> {
        let settings = |row: usize| RowSettings {
            lr: 0.5 + row as f64,
            decay: 0.1 / (1.0 + row as f64),
            eps: 1e-6,
            clip: 1.0,
            muon: u64::from(row == 2),
        };
        let list = pieces::cut(self.rows.iter().cloned(), 0..self.weights.len());
        Pieces::new(backend, list, (0..self.rows.len()).map(settings).collect())
    }
}

fn scalars<B: Optimizer>(backend: &B, time: usize, skip: bool) -> Result<Tensor<B>> {
    let mut scalars = [0.0; SCALARS];
    for (scalar, value) in [
        (Scalar::LearningRate, 0.01 / time as f64),
        (Scalar::Time, time as f64),
        (Scalar::Factor, 0.7),
        (Scalar::Skip, f64::from(u8::from(skip))),
    ] {
        *scalar.in_mut(&mut scalars) = value;
    }
    put(backend, DType::F64, &scalars)
}

/// Weights as updated, as read by the forward pass, and moments after some steps, of which the last is skipped; and the
/// partial sums of every step.
fn run<B: Optimizer>(backend: &B, inputs: &Inputs, method: Method) -> Result<[Vec<f64>; 3]> {
    let pieces = inputs.pieces(backend)?;
    let len = inputs.weights.len();
    let mut weights = put(backend, backend.compute(), &inputs.weights)?;
    let mut master = backend.master().map(|dtype| put(backend, dtype, &inputs.weights)).transpose()?;
    let mut moments: Vec<Tensor<B>> =
        (0..3).map(|_| Tensor::new(backend, backend.moment(), len)).collect::<Result<_>>()?;
    let mut partials = put(backend, DType::F64, &vec![f64::NAN; pieces.list.len()])?;
    let mut sums = Vec::new();
    for time in 1..=STEPS + 1 {
        let [first, second, maximum] = &mut moments[..] else { unreachable!("three moments") };
        let gradients = put(backend, backend.gradient(), &inputs.gradients[(time - 1) % STEPS])?;
        let arenas = Arenas {
            weights: weights.view_mut(),
            master: master.as_mut().map(Tensor::view_mut),
            first: Some(first.view_mut()),
            second: Some(second.view_mut()),
            maximum: Some(maximum.view_mut()),
            gradients: gradients.view(),
        };
        let scalars = scalars(backend, time, time > STEPS)?;
        backend.update(arenas, partials.view_mut(), scalars.view(), &pieces, method);
        sums.extend(get(backend, &partials)?);
    }
    let mut state = get(backend, master.as_ref().unwrap_or(&weights))?;
    for moment in &moments {
        state.extend(get(backend, moment)?);
    }
    Ok([state, get(backend, &weights)?, sums])
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let (inputs, compute) = (Inputs::new(agreement), agreement.cuda().compute());
    let cpu = Cpu::<f32>::new(0)?.with_moments(agreement.cuda().moment());
    for (name, method) in METHODS {
        let [state, weights, sums] = run(agreement.cuda(), &inputs, method)?;
        let [wanted, wanted_weights, wanted_sums] = run(&cpu, &inputs, method)?;
        agreement.compare(format!("optimizer {name}"), &state, &wanted, |_| 0.0);
        // What is not updated keeps the value it had, which the type holds.
        let rounded: Vec<f64> = wanted_weights.iter().map(|&w| round(w, compute)).collect();
        agreement.compare(format!("optimizer {name} working weights"), &weights, &rounded, |_| 0.0);
        // Sums of squares, made in another order.
        let bound = |i: usize| wanted_sums[i] * (2 * PIECE) as f64 * 2f64.powi(-53);
        agreement.compare(format!("optimizer {name} changes"), &sums, &wanted_sums, bound);
    }
    Ok(())
}
