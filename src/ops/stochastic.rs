//! Moments as they are kept: in the type that they are computed in, or in bf16, rounded stochastically.
//!
//! A step changes a moment by a small part of it: the second by 1 − β₂, 5 % or less of what is new. bf16's neighbours
//! are up to 2⁻⁷ apart, relatively, and rounding to the nearest one loses what is smaller than half of that, at every
//! step in the same direction. Rounded up with the probability of the part of the distance that lies below, a moment is
//! right in the mean.
//!
//! The bits are a function of the step and the element: at time t (the optimizer's, in [`super::scalars`]) element i of
//! the arena has word i mod 4 of block i / 4 of the stream "moments" with seed t ([`crate::rng`]); the low half of it
//! rounds the first moment, the high half the second and its maximum. So results depend neither on how elements are
//! shared out nor on whether the run was stopped in between. Copies of a unit in a widened model are other elements:
//! they do not stay equal, and a wide model follows the narrow one in the mean only.

use crate::{
    backend::cpu::{Element, Real},
    rng::Stream,
};
use half::bf16;

/// A type that moments are kept in.
pub(super) trait Moment: Element {
    /// Whether rounding takes random bits.
    const RANDOM: bool;
    /// The value, exactly.
    fn value(self) -> f64;
    /// A value as it is kept; `bits` are uniform below 2¹⁶.
    fn keep(value: f64, bits: u32) -> Self;
}

impl<F: Real> Moment for F {
    const RANDOM: bool = false;
    #[inline(always)]
    fn value(self) -> f64 {
        self.to_f64()
    }
    #[inline(always)]
    fn keep(value: f64, _: u32) -> Self {
        F::from_f64(value)
    }
}

impl Moment for bf16 {
    const RANDOM: bool = true;
    #[inline(always)]
    fn value(self) -> f64 {
        f64::from(self.to_f32())
    }
    /// The lower half of the bits of a binary32 is how far it lies from its neighbour toward zero: a random number added
    /// there carries with that probability.
    #[inline(always)]
    fn keep(value: f64, bits: u32) -> Self {
        let value = value as f32;
        if value.is_nan() { Self::NAN } else { Self::from_bits(((value.to_bits() + bits) >> 16) as u16) }
    }
}

/// The stream whose bits round moments at a time.
pub(super) fn stream(time: f64) -> Stream {
    Stream::new(time as u64, "moments")
}

/// The part of an element's word that belongs to a moment: 0 the first, 1 the second, 2 its maximum, which is rounded as
/// the second is that becomes it.
#[inline(always)]
pub(super) fn bits(word: u32, moment: usize) -> u32 {
    if moment == 0 { word & 0xffff } else { word >> 16 }
}

/// The words of neighbouring elements, made a group at a time.
pub(super) struct Words {
    stream: Stream,
    group: Option<u64>,
    words: [u32; 64],
}

impl Words {
    /// Those of a time.
    pub(super) fn new(time: f64) -> Self {
        Self { stream: stream(time), group: None, words: [0; 64] }
    }

    /// The word of an element of the arena.
    #[inline(always)]
    pub(super) fn of(&mut self, element: u64) -> u32 {
        let group = element / 64;
        if self.group != Some(group) {
            (self.group, self.words) = (Some(group), self.stream.neighbours(group));
        }
        self.words[(element % 64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both neighbours of a value in bf16, the one toward zero first.
    fn neighbours(x: f32) -> [f32; 2] {
        let bits = (x.to_bits() >> 16) as u16;
        [bits, bits + 1].map(|bits| bf16::from_bits(bits).to_f32())
    }

    #[test]
    fn a_value_becomes_one_of_its_neighbours_and_itself_in_the_mean() {
        for x in [1.0 + 0.3 / 128.0, -3.7e-20, 2.0f32.powi(-130) * 1.234, 0.1, -255.9] {
            let [low, high] = neighbours(x);
            let all: Vec<f64> = (0..1 << 16).map(|bits| bf16::keep(x.into(), bits).value()).collect();
            assert!(
                all.iter().all(|&y| y == f64::from(low) || y == f64::from(high)),
                "{x} is neither {low} nor {high}"
            );
            // Over all bits there are the mean is exact: sums of 2^16 numbers of 8 bits are exact in f64.
            assert_eq!(all.iter().sum::<f64>() / 65_536.0, f64::from(x));
        }
    }

    #[test]
    fn words_make_no_bias() {
        let (x, mut words) = (0.7231f32, Words::new(3.0));
        const COUNT: u64 = 100_000;
        let [low, high] = neighbours(x).map(f64::from);
        for moment in [0, 1] {
            let kept = |i| bf16::keep(x.into(), bits(words.of(5 + i), moment)).value();
            let mean = (0..COUNT).map(kept).sum::<f64>() / COUNT as f64;
            // Five deviations of a mean of independent draws of one of two values.
            let part = (f64::from(x) - low) / (high - low);
            let bound = 5.0 * (high - low) * (part * (1.0 - part) / COUNT as f64).sqrt();
            assert!((mean - f64::from(x)).abs() < bound, "moment {moment}: {mean}");
        }
        // Steps, moments and elements differ: of 2^16 values as many pairs of 64 are the same as chance has it, few.
        let of = |time| {
            let mut words = Words::new(time);
            (0..64).flat_map(|i| [0, 1].map(|moment| bits(words.of(i), moment))).collect::<Vec<_>>()
        };
        let (first, second) = (of(1.0), of(2.0));
        assert!(first.iter().zip(&second).filter(|(a, b)| a == b).count() < 4);
        assert!(first.chunks(2).filter(|halves| halves[0] == halves[1]).count() < 4);
    }

    #[test]
    fn what_bf16_holds_is_kept() {
        for pattern in 0..=u16::MAX {
            let x = bf16::from_bits(pattern);
            for bits in [0, 1, 0x8000, 0xffff] {
                let kept = bf16::keep(x.value(), bits);
                assert!(kept.to_bits() == pattern || x.is_nan() && kept.is_nan(), "{pattern:#06x} with {bits:#06x}");
            }
        }
        assert_eq!(bf16::keep(f64::MAX, 0), bf16::INFINITY);
    }
}
