//! Scalar types of the CPU backend (provisional; the numerical floor replaces this file).
use super::Element;
/// A float that the CPU backend computes in.
pub trait Real: Element + PartialOrd + 'static {}
impl Real for f32 {}
impl Real for f64 {}
