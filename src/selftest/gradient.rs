//! Sums of losses and gradients, and the decision about a step.

use super::agreement::{Agreement, get, put, put_integers, unwritten};
use crate::{
    DType, Result,
    ops::{
        gradient::{Decision, Gradient},
        pieces::{PIECE, Piece, Pieces, RowSettings},
        scalars::{SCALARS, Scalar},
    },
};

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];
/// The error of one rounding of f64, relatively.
const ROUNDING: f64 = 1.0 / (1u64 << 53) as f64;

/// Pieces of all lengths, from odd places, in rows of two with clip weights of their own.
fn pieces<B: Gradient>(backend: &B, lens: &[usize]) -> Result<Pieces<B>> {
    let (mut list, mut offset) = (Vec::new(), 0);
    for (i, &len) in lens.iter().enumerate() {
        list.push(Piece { offset, len: len as u32, row: i as u32 / 2 });
        offset += len as u64 + 3;
    }
    let row = |row| RowSettings { lr: 1.0, decay: 0.0, eps: 0.0, clip: 1.0 + row as f64, muon: 0 };
    Pieces::new(backend, list, (0..=lens.len() / 2).map(row).collect())
}

fn tallied<B: Gradient>(backend: &B, losses: &[f64], targets: &[i32]) -> Result<Vec<f64>> {
    let mut scalars = put(backend, DType::F64, &[1.0; SCALARS])?;
    let (losses, targets) = (put(backend, backend.statistics(), losses)?, put_integers(backend, targets)?);
    backend.tally(scalars.view_mut(), losses.view(), targets.view());
    get(backend, &scalars)
}

fn accumulated<B: Gradient>(backend: &B, [from, to]: [DType; 2], values: &[f64]) -> Result<Vec<f64>> {
    let len = values.len() / 2;
    let (source, mut target) = (put(backend, from, &values[..len])?, put(backend, to, &values[len..2 * len])?);
    backend.accumulate(target.view_mut(), source.view(), true);
    let mut all = get(backend, &target)?;
    backend.accumulate(target.slice_mut(3..len), source.slice(1..len - 2), false);
    all.extend(get(backend, &target)?);
    Ok(all)
}

fn norms<B: Gradient>(backend: &B, lens: &[usize], values: &[f64]) -> Result<Vec<f64>> {
    let gradients = put(backend, backend.gradient(), values)?;
    let mut partials = unwritten(backend, DType::F64, lens.len())?;
    backend.square_norms(partials.view_mut(), gradients.view(), &pieces(backend, lens)?);
    get(backend, &partials)
}

/// All scalars after a decision from these partial sums and LossSum, Counted, Halt; and after an update.
fn decided<B: Gradient>(backend: &B, partials: &[f64], before: [f64; 3], decision: Decision) -> Result<Vec<f64>> {
    let mut scalars = [0.0; SCALARS];
    for (scalar, value) in [Scalar::LossSum, Scalar::Counted, Scalar::Halt].into_iter().zip(before) {
        *scalar.in_mut(&mut scalars) = value;
    }
    let (mut scalars, sums) = (put(backend, DType::F64, &scalars)?, put(backend, DType::F64, partials)?);
    backend.decide(scalars.view_mut(), sums.view(), &pieces(backend, &vec![1; partials.len()])?, decision);
    let mut all = get(backend, &scalars)?;
    backend.finish_update(scalars.view_mut(), sums.view());
    all.extend(get(backend, &scalars)?);
    Ok(all)
}

fn check_decisions(agreement: &mut Agreement) -> Result<()> {
    let plain = Decision { clip: f64::INFINITY, nominal: 100.0, halt: false };
    let decisions = [plain, Decision { clip: 1e-3, ..plain }, Decision { halt: true, ..plain }];
    for count in [1, 2, 300, 1000] {
        let partials: Vec<f64> = agreement.normal(3, count, 1.0).iter().map(|x| x * x).collect();
        let with = |at: usize, value: f64| {
            let mut partials = partials.clone();
            partials[at] = value;
            partials
        };
        let all = [
            partials.clone(),
            vec![0.0; count],
            with(count / 2, f64::NAN),
            with(count - 1, f64::INFINITY),
            vec![f64::MAX / 4.0; count],
        ];
        let (mut got, mut wanted) = (Vec::new(), Vec::new());
        for (partials, decision) in all.iter().flat_map(|partials| decisions.map(|decision| (partials, decision))) {
            for before in [[7.0, 50.0, 0.0], [7.0, 0.0, 0.0], [f64::NAN, 50.0, 0.0], [7.0, 50.0, 1.0]] {
                got.extend(decided(agreement.cuda(), partials, before, decision)?);
                wanted.extend(decided(agreement.cpu(), partials, before, decision)?);
            }
        }
        // The sums are made in another order.
        let bound = |i: usize| wanted[i].abs() * (2 * count) as f64 * ROUNDING;
        agreement.compare(format!("gradient decide {count}"), &got, &wanted, bound);
    }
    Ok(())
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    for rows in [1, 77, 5000] {
        let losses: Vec<f64> = agreement.normal(1, rows, 3.0).iter().map(|x| x.abs()).collect();
        let targets: Vec<i32> = (0..rows as i32).map(|i| if i % 3 == 1 { -1 } else { i }).collect();
        let (got, wanted) =
            (tallied(agreement.cuda(), &losses, &targets)?, tallied(agreement.cpu(), &losses, &targets)?);
        let bound = |i: usize| wanted[i].abs() * (2 * rows) as f64 * ROUNDING;
        agreement.compare(format!("gradient tally {rows}"), &got, &wanted, bound);
    }
    let values = agreement.normal(2, 2 * 4099, 1.0);
    for [from, to] in FLOATS.into_iter().flat_map(|from| FLOATS.map(|to| [from, to])) {
        let got = accumulated(agreement.cuda(), [from, to], &values)?;
        let wanted = accumulated(agreement.cpu(), [from, to], &values)?;
        agreement.compare(format!("gradient accumulate {from} to {to}"), &got, &wanted, |_| 0.0);
    }
    let lens = [1, 2, 61, 509, 8 * 512, PIECE];
    let values = agreement.normal(4, lens.iter().map(|len| len + 3).sum(), 1.0);
    let (got, wanted) = (norms(agreement.cuda(), &lens, &values)?, norms(agreement.cpu(), &lens, &values)?);
    let bound = |i: usize| wanted[i] * (2 * lens[i]) as f64 * ROUNDING;
    agreement.compare("gradient square norms", &got, &wanted, bound);
    check_decisions(agreement)
}
