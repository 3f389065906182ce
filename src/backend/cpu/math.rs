//! The numbers that CPU kernels compute with: [`Real`] (f32, f64), run-time choice of the instruction set ([`simd`]),
//! and sums in a fixed order of lanes.
//!
//! The f32 functions are straight lines of plain arithmetic, without branches, calls or fused operations, so loops over
//! them become vector code, and every instruction set gives the same bits. Their polynomials are near-minimax fits made
//! for this file; the largest errors, in units in the last place over all floats, are in the tests.

use super::gemm::Kernel;
use std::{
    fmt::{Debug, Display},
    iter::Sum,
    ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign},
};

/// Lanes of the fixed-order sums: a register of f32 with AVX-512, two with AVX2.
const LANES: usize = 16;

/// f32 or f64.
pub trait Real:
    super::Element
    + Default
    + Debug
    + Display
    + PartialOrd
    + Sum
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞, where a maximum starts.
    const NEG_INFINITY: Self;

    /// The matrix product of this type, for the instruction set of this machine.
    fn kernel() -> Kernel<Self>;
    /// The nearest number of this type.
    fn from_f64(x: f64) -> Self;
    /// The same number in f64.
    fn to_f64(self) -> f64;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Absolute value.
    fn abs(self) -> Self;
    /// Correctly rounded square root.
    fn sqrt(self) -> Self;
    /// eˣ; for f32 within 1 ulp, denormal results too.
    fn exp(self) -> Self;
    /// Natural logarithm; for f32 within 1 ulp; −∞ at ±0, NaN below.
    fn ln(self) -> Self;
    /// Hyperbolic tangent; for f32 within 2 ulp.
    fn tanh(self) -> Self;
    /// Error function 2/√π ∫₀ˣ exp(−t²) dt; for f32 within 2 ulp.
    fn erf(self) -> Self;

    /// The larger; `other` if one of them is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

macro_rules! shared_by_both {
    ($float:ty) => {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const NEG_INFINITY: Self = <$float>::NEG_INFINITY;

        #[inline(always)]
        fn from_f64(x: f64) -> Self {
            x as $float
        }
        #[inline(always)]
        fn to_f64(self) -> f64 {
            self.into()
        }
        #[inline(always)]
        fn is_finite(self) -> bool {
            <$float>::is_finite(self)
        }
        #[inline(always)]
        fn abs(self) -> Self {
            <$float>::abs(self)
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            <$float>::sqrt(self)
        }
    };
}

impl Real for f64 {
    shared_by_both!(f64);

    fn kernel() -> Kernel<Self> {
        gemm_f64::gemm::f64::get_gemm_fn()
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
}

impl Real for f32 {
    shared_by_both!(f32);

    fn kernel() -> Kernel<Self> {
        gemm_f32::gemm::f32::get_gemm_fn()
    }

    /// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ = 1 + r + r²·P(r); times 2ⁿ in two steps, so that denormals round once.
    #[inline(always)]
    fn exp(self) -> Self {
        // Beyond these the result is infinite or rounds to zero. The comparisons let NaN through.
        let x = if self > 89.0 { 89.0 } else { self };
        let x = if x < -104.0 { -104.0 } else { x };
        // Adding 1.5·2²³ rounds to an integer, which then stands in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let rounded = x * std::f32::consts::LOG2_E + ROUND;
        let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let whole = rounded - ROUND;
        let r = x - whole * LN_2_HIGH - whole * LN_2_LOW;
        let p = polynomial(r, [0.499_999_94, 0.166_665_15, 0.041_668_456, 0.008_369_419, 0.001_381_314_2]);
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
        let half = n >> 1;
        (1.0 + (r + r * r * p)) * power(half) * power(n.wrapping_sub(half))
    }

    /// x = 2ᵉ·(1 + f) with √½ ≤ 1 + f < √2; ln x = e·ln 2 + f − f²/2 + f³·P(f).
    #[inline(always)]
    fn ln(self) -> Self {
        let denormal = self < f32::MIN_POSITIVE;
        let x = if denormal { self * 8_388_608.0 } else { self };
        const SQRT_HALF: u32 = 0x3f35_04f3;
        let e = (x.to_bits() as i32).wrapping_sub(SQRT_HALF as i32) >> 23;
        let f = f32::from_bits(x.to_bits().wrapping_sub((e << 23) as u32)) - 1.0;
        let e = e as f32 - if denormal { 23.0 } else { 0.0 };
        let p = polynomial(
            f,
            [
                0.333_333_13,
                -0.250_000_1,
                0.200_021_19,
                -0.166_679_96,
                0.142_195_51,
                -0.124_055_915,
                0.118_881_75,
                -0.116_756_41,
                0.067_466_01,
            ],
        );
        let square = f * f;
        let small = f * square * p + e * LN_2_LOW - 0.5 * square;
        let result = small + f + e * LN_2_HIGH;
        let result = if self == 0.0 { f32::NEG_INFINITY } else { result };
        let result = if self < 0.0 { f32::NAN } else { result };
        // Infinity stays, NaN stays.
        if self < f32::INFINITY { result } else { self }
    }

    /// |x| < 0.625: x + x³·P(x²); else 1 − 2 / (e²ˣ + 1).
    #[inline(always)]
    fn tanh(self) -> Self {
        let x = self.abs();
        let square = x * x;
        let p = polynomial(square, [-0.333_332_84, 0.133_314_91, -0.053_743_497, 0.020_650_579, -0.005_717_037]);
        let near = x + x * (square * p);
        let far = 1.0 - 2.0 / (Real::exp(2.0 * x) + 1.0);
        (if x < 0.625 { near } else { far }).copysign(self)
    }

    /// |x| < 0.93: x + x·P(x²); else 1 − exp(−Q(|x|)), where Q is fitted to −ln erfc up to 4, where erf rounds to 1.
    #[inline(always)]
    fn erf(self) -> Self {
        let x = self.abs();
        let p = polynomial(
            x * x,
            [
                0.128_379_17,
                -0.376_126_35,
                0.112_836_94,
                -0.026_859_27,
                0.005_200_634,
                -0.000_813_743_7,
                0.000_083_452_25,
            ],
        );
        let near = x + x * p;
        let capped = if x > 4.0 { 4.0 } else { x };
        let q = polynomial(
            capped,
            [
                -0.000_175_874_56,
                1.129_520_8,
                0.633_334_64,
                0.108_293_94,
                -0.025_128_625,
                0.004_174_643,
                -0.000_435_218_88,
                0.000_021_161_906,
            ],
        );
        let far = 1.0 - Real::exp(-q);
        (if x < 0.93 { near } else { far }).copysign(self)
    }
}

/// ln 2 in two parts; the first has 9 significant bits, so that its products with exponents are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -0.000_212_194_44;

/// Horner's rule, lowest coefficient first.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        sum = sum * x + coefficients[i];
    }
    sum
}

/// Runs `f` compiled for the best instruction set of this machine (AVX-512, AVX2 with FMA, NEON, or the target's
/// baseline), so its loops use the widest registers. Mark the closure and what it calls `#[inline(always)]`: only what
/// is inlined here is compiled so.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// [`simd`] of an expression, by a closure that is marked as it must be.
macro_rules! vectorize {
    ($body:expr) => {
        $crate::backend::cpu::math::simd(
            #[inline(always)]
            || $body,
        )
    };
}
pub(crate) use vectorize;

/// Σ xᵢ: element i goes to lane i mod 16, then the lanes are added by halves. For use inside [`simd`].
#[inline(always)]
pub(crate) fn sum<F: Real>(x: &[F]) -> F {
    fold(x, x, F::ZERO, |x, _| x, |a, b| a + b)
}

/// Σ xᵢ·yᵢ in the order of [`sum`], over the shorter length. For use inside [`simd`].
#[inline(always)]
pub(crate) fn dot<F: Real>(x: &[F], y: &[F]) -> F {
    fold(x, y, F::ZERO, |x, y| x * y, |a, b| a + b)
}

#[inline(always)]
fn fold<F: Real>(x: &[F], y: &[F], start: F, term: impl Fn(F, F) -> F, join: impl Fn(F, F) -> F) -> F {
    let len = x.len().min(y.len());
    let ((x, x_rest), (y, y_rest)) = (x[..len].as_chunks::<LANES>(), y[..len].as_chunks::<LANES>());
    let mut lanes = [start; LANES];
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            lanes[lane] = join(lanes[lane], term(x[lane], y[lane]));
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane = join(*lane, term(x, y));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distance in units of the last place of the correctly rounded result.
    fn ulps(found: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        if found == nearest || (found.is_nan() && nearest.is_nan()) {
            return 0.0;
        }
        let magnitude = nearest.abs().min(f32::MAX);
        let ulp =
            f64::from(magnitude.next_up().min(f32::MAX)) - f64::from(magnitude.next_up().min(f32::MAX).next_down());
        ((f64::from(found) - exact) / ulp).abs()
    }

    /// The largest error over every 1009th of all bit patterns, and over the special numbers.
    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let special = [0.0, 1.0, f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX, f32::INFINITY, f32::NAN, 89.0, 104.0];
        let special = special.into_iter().flat_map(|x| [x, -x]);
        let all = (0..u32::MAX).step_by(1009).map(f32::from_bits);
        special.chain(all).map(|x| (ulps(f(x), exact(x.into())), x)).fold(0.0, |worst, (u, x)| {
            assert!(!u.is_nan(), "{x}: {}", f(x));
            worst.max(u)
        })
    }

    #[test]
    fn functions_of_f32_are_within_their_stated_errors() {
        let exp = worst(Real::exp, f64::exp);
        let ln = worst(Real::ln, f64::ln);
        let tanh = worst(Real::tanh, f64::tanh);
        let erf = worst(Real::erf, libm::erf);
        eprintln!("ulp: exp {exp:.3}, ln {ln:.3}, tanh {tanh:.3}, erf {erf:.3}");
        assert!(exp <= 1.0 && ln <= 1.0 && tanh <= 2.0 && erf <= 2.0, "{exp} {ln} {tanh} {erf}");
    }

    #[test]
    fn zeros_keep_their_sign() {
        for f in [<f32 as Real>::tanh, <f32 as Real>::erf] {
            assert_eq!(f(-0.0).to_bits(), (-0f32).to_bits());
            assert_eq!(f(0.0).to_bits(), 0);
        }
        assert_eq!(Real::exp(-0f32), 1.0);
        assert_eq!(Real::ln(-0f32), f32::NEG_INFINITY);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        #[inline(always)]
        fn all(x: &[f32]) -> (f32, f32, Vec<f32>) {
            let y: Vec<f32> =
                x.iter().map(|&x| Real::exp(x) + Real::tanh(x) * Real::erf(x) + Real::ln(x.abs())).collect();
            (sum(x), dot(x, &y), y)
        }
        let x: Vec<f32> = (0..10_007).map(|i| (i as f32 - 5000.5) * 0.013).collect();
        let baseline = all(&x);
        simd(
            #[inline(always)]
            || assert!(all(&x) == baseline),
        );
    }

    #[test]
    fn sums_of_every_length() {
        for len in 0..70 {
            let x: Vec<f64> = (0..len).map(|i| f64::from(i * 37 % 11) - 7.0).collect();
            let y: Vec<f64> = x.iter().map(|x| x * 0.5 - 1.0).collect();
            assert_eq!(simd(|| sum(&x)), x.iter().sum::<f64>());
            assert_eq!(simd(|| dot(&x, &y)), x.iter().zip(&y).map(|(x, y)| x * y).sum::<f64>());
        }
    }
}
