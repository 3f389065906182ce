//! The float types that tensors are stored in, for the ops that take any of them.

use crate::{
    DType,
    backend::cpu::{Element, Real},
    dtype::round_to_odd,
};
use half::{bf16, f16};

/// A storage type of floats. All conversions round to nearest even.
pub(crate) trait Float: Element {
    /// What values of this type are computed in: f64 for f64, otherwise f32.
    type Arithmetic: Real + Element;
    /// The value, exactly.
    fn load(self) -> f64;
    /// Rounded from f64.
    fn store(value: f64) -> Self;
    /// Rounded from the arithmetic type.
    fn round(value: Self::Arithmetic) -> Self;
}

impl Float for f64 {
    type Arithmetic = f64;
    #[inline(always)]
    fn load(self) -> f64 {
        self
    }
    #[inline(always)]
    fn store(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn round(value: f64) -> Self {
        value
    }
}

impl Float for f32 {
    type Arithmetic = f32;
    #[inline(always)]
    fn load(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn store(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Float for bf16 {
    type Arithmetic = f32;
    #[inline(always)]
    fn load(self) -> f64 {
        f64::from(self.to_f32())
    }
    #[inline(always)]
    fn store(value: f64) -> Self {
        Self::from_f32(round_to_odd(value))
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Float for f16 {
    type Arithmetic = f32;
    #[inline(always)]
    fn load(self) -> f64 {
        f64::from(self.to_f32())
    }
    #[inline(always)]
    fn store(value: f64) -> Self {
        Self::from_f32(round_to_odd(value))
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// The number by which kernels know a float type (kernels/types.cuh).
pub(super) fn tag(dtype: DType) -> u32 {
    match dtype {
        DType::F64 => 0,
        DType::F32 => 1,
        DType::BF16 => 2,
        DType::F16 => 3,
        other => panic!("{other:?} is not a float type"),
    }
}

/// Evaluates `$body` with `$T` as the Rust type of a float [`crate::DType`].
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => panic!("{other:?} is not a float type"),
        }
    };
}
pub(crate) use with_float;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halfway_values_round_to_even() {
        // bf16 has 8 bits of mantissa: 1 + 2⁻⁸ and 1 + 3·2⁻⁸ lie halfway.
        assert_eq!(bf16::round(1.0 + 2f32.powi(-8)).load(), 1.0);
        assert_eq!(bf16::round(1.0 + 3.0 * 2f32.powi(-8)).load(), 1.0 + 2f64.powi(-6));
        // Just above halfway, by less than f32 can tell: rounding by way of f32 would go down to even.
        assert_eq!(bf16::store(1.0 + 2f64.powi(-8) + 2f64.powi(-40)).load(), 1.0 + 2f64.powi(-7));
        assert_eq!(bf16::store(-1.0 - 2f64.powi(-8) + 2f64.powi(-40)).load(), -1.0);
        assert_eq!(f16::store(1.0 + 2f64.powi(-11)).load(), 1.0);
        assert_eq!(f16::store(1.0 + 2f64.powi(-11) + 2f64.powi(-50)).load(), 1.0 + 2f64.powi(-10));
        assert_eq!(f32::store(1.0 + 2f64.powi(-24)).load(), 1.0);
    }

    #[test]
    fn every_half_survives_and_the_extremes_are_kept() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(b.is_nan() && bf16::store(b.load()).is_nan() || bf16::store(b.load()).to_bits() == bits);
            assert!(h.is_nan() && f16::store(h.load()).is_nan() || f16::store(h.load()).to_bits() == bits);
        }
        assert_eq!(bf16::store(1e300), bf16::INFINITY);
        assert_eq!(f16::store(-1e300), f16::NEG_INFINITY);
        assert_eq!(bf16::store(-1e-300).to_bits(), bf16::NEG_ZERO.to_bits());
        assert_eq!(f16::store(65_519.0), f16::MAX);
        assert_eq!(f16::store(65_520.0), f16::INFINITY);
    }
}
