use super::*;
use crate::{
    DType,
    backend::{Tensor, cpu::Cpu},
    ops::{
        pieces::{PIECE, Piece, RowSettings},
        scalars::SCALARS,
        tests::{cpu, elements, random, tensor},
    },
};
use half::bf16;

/// Two rows, the first in two pieces, with clip weights 1 and 4, and padding between them.
fn pieces<F: Real>(cpu: &Cpu<F>) -> Pieces<Cpu<F>> {
    let list = vec![
        Piece { offset: 0, len: PIECE as u32, row: 0 },
        Piece { offset: PIECE as u64, len: 37, row: 0 },
        Piece { offset: PIECE as u64 + 64, len: 101, row: 1 },
    ];
    let row = |clip| RowSettings { lr: 1.0, decay: 0.0, eps: 0.0, clip, muon: 0 };
    Pieces::new(cpu, list, vec![row(1.0), row(4.0)]).unwrap()
}

const ARENA: usize = PIECE + 64 + 101;

fn decide(partials: [f64; 3], state: &[(Scalar, f64)], decision: Decision) -> Vec<f64> {
    let cpu = cpu::<f64>(1);
    let mut scalars = tensor(&cpu, &[0.0; SCALARS]);
    for &(scalar, value) in state {
        *scalar.in_mut(scalars.view_mut().into_slice()) = value;
    }
    let partials = tensor(&cpu, &partials);
    cpu.decide(scalars.view_mut(), partials.view(), &pieces(&cpu), decision);
    elements(&scalars)
}

const COUNTED: [(Scalar, f64); 2] = [(Scalar::Counted, 50.0), (Scalar::LossSum, 7.0)];
const NO_CLIP: Decision = Decision { clip: f64::INFINITY, nominal: 100.0, halt: false };

#[test]
fn tally_adds_losses_and_counts_targets() {
    let cpu = cpu::<f32>(2);
    let mut scalars = tensor(&cpu, &[1.0; SCALARS]);
    let (losses, targets) = (tensor(&cpu, &[0.5f32, 0.0, 1e-3, 2.0]), tensor(&cpu, &[3, -1, 0, 7]));
    for _ in 0..2 {
        cpu.tally(scalars.view_mut(), losses.view(), targets.view());
    }
    let after: Vec<f64> = elements(&scalars);
    assert_eq!(Scalar::LossSum.of(&after), 1.0 + (2.5 + f64::from(1e-3f32)) + (2.5 + f64::from(1e-3f32)));
    assert_eq!(Scalar::Counted.of(&after), 7.0);
    assert_eq!(Scalar::GradNorm.of(&after), 1.0);
}

#[test]
fn accumulate_converts_and_rounds_once() {
    let cpu = cpu::<f32>(3);
    let values = random(1, 2 * TASK + 9);
    let (wide, narrow) = (tensor(&cpu, &values), tensor(&cpu, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()));
    let mut sum: Tensor<Cpu<f32>> = tensor(&cpu, &vec![f64::NAN; values.len()]);
    cpu.accumulate(sum.view_mut(), narrow.view(), false);
    cpu.accumulate(sum.view_mut(), wide.view(), true);
    assert_eq!(elements::<_, f64>(&sum), values.iter().map(|v| v + v).collect::<Vec<_>>());
    let mut small = tensor(&cpu, &vec![1f32; values.len()]);
    cpu.accumulate(small.view_mut(), wide.view(), true);
    assert_eq!(elements::<_, f32>(&small), values.iter().map(|v| (1.0 + v) as f32).collect::<Vec<_>>());
    let mut smaller: Tensor<Cpu<f32>> = tensor(&cpu, &vec![bf16::ONE; values.len()]);
    cpu.accumulate(smaller.view_mut(), narrow.view(), false);
    assert!(elements::<_, bf16>(&smaller).iter().zip(&values).all(|(b, &v)| *b == bf16::from_f32(v as f32)));
    assert_eq!(smaller.dtype(), DType::BF16);
}

#[test]
fn square_norms_are_weighted_sums_per_piece() {
    let values = random(2, ARENA);
    let square = |range: std::ops::Range<usize>| values[range].iter().map(|v| v * v).sum::<f64>();
    let exact = [square(0..PIECE), square(PIECE..PIECE + 37), 4.0 * square(PIECE + 64..ARENA)];
    let mut seen = Vec::new();
    for threads in [1, 2, 3] {
        let cpu = cpu::<f32>(threads);
        let mut partials = tensor(&cpu, &[f64::NAN; 3]);
        let narrow = tensor(&cpu, &values.iter().map(|&v| v as f32).collect::<Vec<_>>());
        for gradients in [narrow, tensor(&cpu, &values)] {
            cpu.square_norms(partials.view_mut(), gradients.view(), &pieces(&cpu));
            let result: Vec<f64> = elements(&partials);
            // The values are exact in f32, so both types give f64 sums of n terms, each rounded to 2⁻⁵³ of the sum.
            assert!(result.iter().zip(exact).all(|(r, e)| (r - e).abs() <= PIECE as f64 * 2f64.powi(-53) * e));
            seen.push(result);
        }
    }
    assert!(seen.iter().all(|s| *s == seen[0]));
}

#[test]
fn decide_scales_by_what_was_counted_and_clips() {
    let free = decide([4.0, 4.0, 1.0], &COUNTED, NO_CLIP);
    assert_eq!([Scalar::GradNorm, Scalar::Factor, Scalar::Skip].map(|s| s.of(&free)), [6.0, 2.0, 0.0]);
    assert_eq!(Scalar::BadRow.of(&free), -1.0);
    let clipped = decide([4.0, 4.0, 1.0], &COUNTED, Decision { clip: 1.5, ..NO_CLIP });
    assert_eq!([Scalar::GradNorm, Scalar::Factor].map(|s| s.of(&clipped)), [6.0, 2.0 * 0.25]);
    let zero = decide([0.0; 3], &COUNTED, Decision { clip: 1.5, ..NO_CLIP });
    assert_eq!([Scalar::GradNorm, Scalar::Factor, Scalar::Skip].map(|s| s.of(&zero)), [0.0, 2.0, 0.0]);
}

#[test]
fn decide_skips_and_halts_at_what_is_not_finite() {
    let verdict = |scalars: Vec<f64>| [Scalar::Skip, Scalar::Halt, Scalar::BadRow].map(|s| s.of(&scalars));
    let halting = Decision { halt: true, ..NO_CLIP };
    assert_eq!(verdict(decide([1.0, f64::NAN, f64::NAN], &COUNTED, NO_CLIP)), [1.0, 0.0, 0.0]);
    assert_eq!(verdict(decide([1.0, 1.0, f64::INFINITY], &COUNTED, halting)), [1.0, 1.0, 1.0]);
    // Each finite, the sum is not.
    assert_eq!(verdict(decide([f64::MAX, 0.0, f64::MAX], &COUNTED, NO_CLIP)), [1.0, 0.0, 1.0]);
    let bad_loss = [(Scalar::Counted, 50.0), (Scalar::LossSum, f64::NAN)];
    assert_eq!(verdict(decide([1.0; 3], &bad_loss, halting)), [1.0, 1.0, -2.0]);
    assert_eq!(verdict(decide([0.0; 3], &[], halting)), [1.0, 0.0, -1.0]);
    // Halted before: nothing is updated any more.
    let halted = [COUNTED[0], COUNTED[1], (Scalar::Halt, 1.0)];
    assert_eq!(verdict(decide([1.0; 3], &halted, NO_CLIP)), [1.0, 1.0, -1.0]);
}

#[test]
fn update_norm_is_zero_in_a_skipped_step() {
    let cpu = cpu::<f32>(1);
    let partials = tensor(&cpu, &[4.0, 12.0]);
    for (skip, norm) in [(0.0, 4.0), (1.0, 0.0)] {
        let mut scalars = tensor(&cpu, &[0.0; SCALARS]);
        *Scalar::Skip.in_mut(scalars.view_mut().into_slice()) = skip;
        cpu.finish_update(scalars.view_mut(), partials.view());
        assert_eq!(Scalar::UpdateNorm.of(&elements::<_, f64>(&scalars)), norm);
    }
}
