//! Tools that the tests of several ops share: tensors from values and back, fixed pseudo-random values, and a check of
//! gradients by differences.

use crate::{
    DType,
    backend::{
        Tensor,
        cpu::{Cpu, Element, Real},
    },
};

/// A CPU backend with this many threads.
pub(crate) fn cpu<F: Real>(threads: usize) -> Cpu<F> {
    Cpu::new(threads).expect("a CPU backend")
}

/// A tensor of exactly these elements (tokens, bytes, or values of the compute type).
pub(crate) fn tensor<F: Real, T: Element>(cpu: &Cpu<F>, elements: &[T]) -> Tensor<Cpu<F>> {
    let mut tensor = Tensor::new(cpu, T::DTYPE, elements.len()).expect("memory");
    tensor.view_mut().into_slice::<T>().copy_from_slice(elements);
    tensor
}

/// A tensor of the compute type with these values, rounded to it.
pub(crate) fn floats<F: Real>(cpu: &Cpu<F>, values: &[f64]) -> Tensor<Cpu<F>> {
    match F::DTYPE {
        DType::F64 => tensor(cpu, values),
        _ => tensor(cpu, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
    }
}

/// A tensor of the compute type full of NaN: what an op leaves unwritten is seen.
pub(crate) fn unwritten<F: Real>(cpu: &Cpu<F>, len: usize) -> Tensor<Cpu<F>> {
    floats(cpu, &vec![f64::NAN; len])
}

/// The elements of a tensor.
pub(crate) fn elements<F: Real, T: Element>(tensor: &Tensor<Cpu<F>>) -> Vec<T> {
    tensor.view().as_slice::<T>().to_vec()
}

/// The values of a tensor of floats.
pub(crate) fn values<F: Real>(tensor: &Tensor<Cpu<F>>) -> Vec<f64> {
    match tensor.dtype() {
        DType::F64 => elements(tensor),
        _ => elements::<F, f32>(tensor).into_iter().map(f64::from).collect(),
    }
}

/// Fixed pseudo-random values, uniform in (−1, 1), each of them exact in f32 (so that f32 and f64 start from the same).
pub(crate) fn random(seed: u64, len: usize) -> Vec<f64> {
    // SplitMix64 (Steele et al., 2014).
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (0..len).map(|_| ((next() >> 41) as f64 + 0.5) / (1u64 << 22) as f64 - 1.0).collect()
}

/// Σ aᵢ bᵢ: a loss whose gradient by `b` is `a`.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Asserts that `gradient` is the gradient of `loss` at `x`, to 1e-8 of the gradient's largest element.
///
/// Differences are of fourth order, (8 (f(x+h) − f(x−h)) − (f(x+2h) − f(x−2h))) / 12h with h = 1e-3: for smooth
/// functions of values around 1 their own error is about h⁴/30 · f⁽⁵⁾ ≈ 1e-13 and the rounding's 1e-16 / h · f ≈ 1e-12.
pub(crate) fn assert_gradient(what: &str, x: &[f64], gradient: &[f64], mut loss: impl FnMut(&[f64]) -> f64) {
    const H: f64 = 1e-3;
    assert_eq!(x.len(), gradient.len(), "{what}");
    let largest = gradient.iter().fold(0.0f64, |a, &b| a.max(b.abs()));
    assert!(largest > 0.0 && largest.is_finite(), "{what}: the largest gradient is {largest}, nothing to compare");
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        let mut at = |steps: f64| {
            moved[i] = x[i] + steps * H;
            loss(&moved)
        };
        let difference = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * H);
        moved[i] = x[i];
        let error = (gradient[i] - difference).abs();
        assert!(error <= 1e-8 * largest, "{what}[{i}]: gradient {}, by differences {difference}", gradient[i]);
    }
}

/// Asserts that `result` (of f32 arithmetic) is `reference` (the same in f64), each element to `ulps` units of f32's
/// rounding (2⁻²⁴) of `scale(i)`, the size of what is summed for element i.
pub(crate) fn assert_f32(what: &str, result: &[f64], reference: &[f64], ulps: f64, scale: impl Fn(usize) -> f64) {
    assert_eq!(result.len(), reference.len(), "{what}");
    for (i, (a, b)) in result.iter().zip(reference).enumerate() {
        let bound = ulps * 2f64.powi(-24) * scale(i);
        assert!((a - b).abs() <= bound, "{what}[{i}]: {a} in f32, {b} in f64, apart by more than {bound:e}");
    }
}

#[test]
fn a_wrong_gradient_is_seen() {
    let x = [0.3, -0.7];
    let loss = |x: &[f64]| x[0].sin() * x[1];
    assert_gradient("right", &x, &[x[0].cos() * x[1], x[0].sin()], loss);
    let wrong =
        std::panic::catch_unwind(|| assert_gradient("wrong", &x, &[x[0].cos() * x[1], x[0].sin() + 1e-7], loss));
    assert!(wrong.is_err());
}
