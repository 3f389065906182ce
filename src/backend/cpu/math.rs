//! Provisional.
use super::Element;
use std::ops::*;
/// A float that the CPU backend computes in.
pub trait Real: Element + super::gemm::Element + PartialOrd + 'static + Copy + Add<Output=Self> + Sub<Output=Self> + Mul<Output=Self> + Div<Output=Self> + Neg<Output=Self> + AddAssign + MulAssign {
    const ZERO: Self;
    fn from_f64(x: f64) -> Self; fn to_f64(self) -> f64;
    fn exp(self) -> Self; fn erf(self) -> Self; fn sqrt(self) -> Self;
}
impl Real for f32 { const ZERO: f32 = 0.0; 
    fn from_f64(x: f64) -> f32 { x as f32 } fn to_f64(self) -> f64 { self as f64 }
    fn exp(self) -> f32 { f32::exp(self) } fn erf(self) -> f32 { libm::erff(self) } fn sqrt(self) -> f32 { f32::sqrt(self) } }
impl Real for f64 { const ZERO: f64 = 0.0; 
    fn from_f64(x: f64) -> f64 { x } fn to_f64(self) -> f64 { self }
    fn exp(self) -> f64 { f64::exp(self) } fn erf(self) -> f64 { libm::erf(self) } fn sqrt(self) -> f64 { f64::sqrt(self) } }
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R { pulp::Arch::new().dispatch(f) }
#[inline(always)]
pub fn sum<F: Real>(x: &[F]) -> F { let (c, r) = x.as_chunks::<16>(); let mut l = [F::ZERO; 16];
 for c in c { for i in 0..16 { l[i] += c[i]; } } for i in 0..r.len() { l[i] += r[i]; }
 let mut n = 8; while n > 0 { for i in 0..n { l[i] = l[i] + l[i + n]; } n /= 2; } l[0] }
#[inline(always)]
pub fn dot<F: Real>(x: &[F], y: &[F]) -> F { let (c, r) = x.as_chunks::<16>(); let (d, s) = y.as_chunks::<16>(); let mut l = [F::ZERO; 16];
 for (c, d) in c.iter().zip(d) { for i in 0..16 { l[i] += c[i] * d[i]; } } for i in 0..r.len() { l[i] += r[i] * s[i]; }
 let mut n = 8; while n > 0 { for i in 0..n { l[i] = l[i] + l[i + n]; } n /= 2; } l[0] }
