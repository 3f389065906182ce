//! Element types of memory and of files, and conversion between the floating-point ones.

use std::fmt;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

#[cfg(target_endian = "big")]
compile_error!("files hold little-endian elements and are mapped into memory as they are");

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// The upper half of a binary32.
    BF16,
    /// IEEE 754 binary16.
    F16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned byte.
    U8,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 9] =
        [Self::F64, Self::F32, Self::BF16, Self::F16, Self::I64, Self::I32, Self::U32, Self::U16, Self::U8];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::BF16 | Self::F16 | Self::U16 => 2,
            Self::U8 => 1,
        }
    }

    /// The name in configurations and in `index.json`, for example `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::U16 => "u16",
            Self::U8 => "u8",
        }
    }

    /// The name in the header of a safetensors file, for example `BF16`.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
        }
    }

    /// The type with this name in a safetensors header, if it is one that we use.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.safetensors_name() == name)
    }

    /// Whether [`convert`] takes this type.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::BF16 | Self::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Converts elements of one floating-point type to another, rounding to nearest, ties to even; too large becomes
/// infinity. Equal types are copied bit for bit. The slices need no alignment.
///
/// # Panics
/// If a type is not floating point or the slices do not hold the same number of whole elements: the caller has
/// checked both.
pub fn convert(src: &[u8], from: DType, dst: &mut [u8], to: DType) {
    assert!(from.is_float() && to.is_float(), "conversion from {from} to {to}");
    assert!(src.len().is_multiple_of(from.size()) && dst.len().is_multiple_of(to.size()), "part of an element");
    assert_eq!(src.len() / from.size(), dst.len() / to.size(), "elements in source and target");
    use DType::{BF16, F16, F32, F64};
    match (from, to) {
        (F64, F32) => map(src, dst, f64::from_ne_bytes, |x| (x as f32).to_ne_bytes()),
        (F64, BF16) => map(src, dst, f64::from_ne_bytes, |x| to_bf16(round_to_odd(x)).to_ne_bytes()),
        (F64, F16) => map(src, dst, f64::from_ne_bytes, |x| f16::from_f32(round_to_odd(x)).to_ne_bytes()),
        (F32, F64) => map(src, dst, f32::from_ne_bytes, |x| f64::from(x).to_ne_bytes()),
        (F32, BF16) => map(src, dst, f32::from_ne_bytes, |x| to_bf16(x).to_ne_bytes()),
        (F32, F16) => map(src, dst, f32::from_ne_bytes, |x| f16::from_f32(x).to_ne_bytes()),
        (BF16, F64) => map(src, dst, bf16::from_ne_bytes, |x| x.to_f64().to_ne_bytes()),
        (BF16, F32) => map(src, dst, bf16::from_ne_bytes, |x| x.to_f32().to_ne_bytes()),
        (BF16, F16) => map(src, dst, bf16::from_ne_bytes, |x| f16::from_f32(x.to_f32()).to_ne_bytes()),
        (F16, F64) => map(src, dst, f16::from_ne_bytes, |x| x.to_f64().to_ne_bytes()),
        (F16, F32) => map(src, dst, f16::from_ne_bytes, |x| x.to_f32().to_ne_bytes()),
        (F16, BF16) => map(src, dst, f16::from_ne_bytes, |x| to_bf16(x.to_f32()).to_ne_bytes()),
        _ => dst.copy_from_slice(src),
    }
}

/// Reads each element of `N` bytes, and writes it as `M` bytes.
fn map<T, const N: usize, const M: usize>(
    src: &[u8],
    dst: &mut [u8],
    read: impl Fn([u8; N]) -> T,
    write: impl Fn(T) -> [u8; M],
) {
    for (src, dst) in src.as_chunks::<N>().0.iter().zip(dst.as_chunks_mut::<M>().0) {
        *dst = write(read(*src));
    }
}

/// The upper half of a binary32, rounded; without branches, so that loops over it become vector code.
fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // The bit that makes a NaN quiet also keeps one whose upper half is zero from becoming infinity.
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

/// The binary32 beside `x` from which a second rounding, to 16 bits, gives what one rounding of `x` would: exact if
/// it can be, otherwise the neighbour whose last bit is odd (Boldo and Melquiond, "Emulation of a FMA and correctly
/// rounded sums: proved algorithms using rounding to odd", 2008).
pub(crate) fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let bits = nearest.to_bits();
    if f64::from(nearest) == x || x.is_nan() || bits & 1 == 1 {
        nearest
    } else if f64::from(nearest).abs() > x.abs() {
        f32::from_bits(bits - 1)
    } else {
        f32::from_bits(bits + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn convert_one<const N: usize>(x: f64, to: DType) -> [u8; N] {
        let mut out = [0; N];
        convert(&x.to_ne_bytes(), DType::F64, &mut out, to);
        out
    }

    #[test]
    fn names_are_those_of_serde_and_safetensors() {
        for dtype in DType::ALL {
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
            assert_eq!(DType::from_safetensors_name(dtype.safetensors_name()), Some(dtype));
            let foreign: safetensors::Dtype =
                serde_json::from_value(dtype.safetensors_name().into()).expect("known to safetensors");
            assert_eq!(foreign.bitsize(), dtype.size() * 8);
        }
        assert_eq!(DType::from_safetensors_name("F33"), None);
    }

    #[test]
    fn a_tie_is_broken_by_bits_that_binary32_cannot_hold() {
        // Half way between two bfloat16 (1 and 1 + 2^-7), and a trifle above: through a binary32 rounded to nearest
        // both would be the tie, and go down to even.
        let tie = 1.0 + 2f64.powi(-8);
        assert_eq!(bf16::from_ne_bytes(convert_one(tie, DType::BF16)).to_f64(), 1.0);
        let above = tie + 2f64.powi(-40);
        assert_eq!(bf16::from_ne_bytes(convert_one(above, DType::BF16)).to_f64(), 1.0 + 2f64.powi(-7));
        let tie = 1.0 + 2f64.powi(-11);
        assert_eq!(f16::from_ne_bytes(convert_one(tie, DType::F16)).to_f64(), 1.0);
        let above = tie + 2f64.powi(-50);
        assert_eq!(f16::from_ne_bytes(convert_one(above, DType::F16)).to_f64(), 1.0 + 2f64.powi(-10));
    }

    #[test]
    fn every_16_bit_value_survives_the_way_up_and_down() {
        for narrow in [DType::BF16, DType::F16] {
            let values: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
            for wide in [DType::F32, DType::F64] {
                let mut up = vec![0; (1 << 16) * wide.size()];
                convert(&values, narrow, &mut up, wide);
                let mut down = vec![0; values.len()];
                convert(&up, wide, &mut down, narrow);
                for (bits, back) in (0..=u16::MAX).zip(down.as_chunks::<2>().0) {
                    let is_nan = match narrow {
                        DType::BF16 => bf16::from_bits(bits).is_nan(),
                        _ => f16::from_bits(bits).is_nan(),
                    };
                    // A signalling NaN comes back quiet.
                    assert!(u16::from_ne_bytes(*back) == bits || is_nan, "{narrow} {bits:#06x} through {wide}");
                }
            }
        }
    }

    /// The nearest of all finite values of a type, ties to the even bit pattern, by search.
    fn nearest(x: f64, value: impl Fn(u16) -> f64, infinity: u16) -> u16 {
        let magnitude = x.abs();
        // Finite magnitudes are ordered as their bit patterns; infinity stands for the next power of two.
        let next_power = 2.0 * 2f64.powi(value(infinity - 1).log2().floor() as i32);
        let at = |bits: u16| if bits == infinity { next_power } else { value(bits) };
        let (mut low, mut high) = (0, infinity);
        if magnitude >= next_power {
            low = infinity;
        }
        while high - low.min(high) > 1 {
            let middle = low + (high - low) / 2;
            if at(middle) <= magnitude { low = middle } else { high = middle }
        }
        let (below, above) = (magnitude - at(low), at(high) - magnitude);
        let up = low != infinity && (above < below || above == below && low % 2 == 1);
        (if up { high } else { low }) | if x.is_sign_negative() { 0x8000 } else { 0 }
    }

    proptest! {
        #[test]
        fn doubles_round_to_the_nearest(mantissa in any::<u64>(), exponent in -140i32..130, coarse in any::<bool>()) {
            // Coarse mantissas hit ties.
            let bits = if coarse { mantissa & (0xfff << 40) } else { mantissa };
            let fraction = f64::from_bits((bits & (u64::MAX >> 12)) | (bits & (1 << 63)) | 0x3ff0_0000_0000_0000);
            for x in [fraction * 2f64.powi(exponent), fraction * 2f64.powi(exponent / 6)] {
                let bf = u16::from_ne_bytes(convert_one(x, DType::BF16));
                prop_assert_eq!(bf, nearest(x, |b| bf16::from_bits(b).to_f64(), 0x7f80), "bf16 of {:e}", x);
                let f = u16::from_ne_bytes(convert_one(x, DType::F16));
                prop_assert_eq!(f, nearest(x, |b| f16::from_bits(b).to_f64(), 0x7c00), "f16 of {:e}", x);
            }
        }

        #[test]
        fn singles_round_as_doubles_do(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            for to in [DType::BF16, DType::F16] {
                let mut direct = [0; 2];
                convert(&x.to_ne_bytes(), DType::F32, &mut direct, to);
                if !x.is_nan() {
                    prop_assert_eq!(direct, convert_one::<2>(f64::from(x), to));
                }
            }
        }
    }
}
