//! Numerators of softmax over the columns of a matrix: what the readout and attention have in common on the CPU.

use crate::backend::cpu::{Real, math::vectorize};

/// Exponentials that are summed in the compute type; such sums are added in f64.
const SUM_BLOCK: usize = 1024;

/// In scores, whose rows have as many elements as `max`, subtracts from each column its maximum and takes exponentials,
/// in place; gives the maxima (0 for a column of −∞) and the sums.
pub(super) fn numerators<F: Real>(scores: &mut [F], max: &mut [F], sum: &mut [f64]) {
    let (width, mut at) = (max.len(), 0);
    while at < width {
        let (max, sum) = (&mut max[at..], &mut sum[at..]);
        // As many columns at a time as have their maxima and sums in registers.
        at += match width - at {
            64.. => vectorize!(columns::<F, 64>(scores, width, at, max, sum)),
            32.. => vectorize!(columns::<F, 32>(scores, width, at, max, sum)),
            16.. => vectorize!(columns::<F, 16>(scores, width, at, max, sum)),
            _ => vectorize!(columns::<F, 1>(scores, width, at, max, sum)),
        };
    }
}

/// The same for N columns from column `at` on; returns N.
#[inline(always)]
fn columns<F: Real, const N: usize>(
    scores: &mut [F],
    width: usize,
    at: usize,
    max: &mut [F],
    sum: &mut [f64],
) -> usize {
    let mut largest = [F::NEG_INFINITY; N];
    for row in scores.chunks_exact(width) {
        for (largest, &score) in largest.iter_mut().zip(&row[at..at + N]) {
            *largest = if score > *largest { score } else { *largest };
        }
    }
    for largest in &mut largest {
        *largest = if *largest == F::NEG_INFINITY { F::ZERO } else { *largest };
    }
    let mut sums = [0.0; N];
    for block in scores.chunks_mut(SUM_BLOCK * width) {
        let mut part = [F::ZERO; N];
        for row in block.chunks_exact_mut(width) {
            for ((score, part), &largest) in row[at..at + N].iter_mut().zip(&mut part).zip(&largest) {
                *score = Real::exp(*score - largest);
                *part += *score;
            }
        }
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part.to_f64());
    }
    max[..N].copy_from_slice(&largest);
    sum[..N].copy_from_slice(&sums);
    N
}
