//! Comparing a device's results with the CPU's.

use crate::{
    DType, Result,
    backend::{Backend, HostBuffer, Stream, Tensor, cpu::Cpu, cuda::Cuda},
    dtype, rng,
};
use serde::Serialize;

/// What became of one comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The op, its output and its shape.
    pub name: String,
    /// Elements compared.
    pub elements: usize,
    /// The largest difference, as a part of its bound: at most 1 where all is well.
    pub worst: f64,
    /// Where that was.
    pub at: usize,
    /// Whether every element is within its bound.
    pub ok: bool,
}

/// A device under test, the reference, and the results so far.
pub struct Agreement<'a> {
    cuda: &'a Cuda,
    cpu: Cpu<f64>,
    rows: Vec<Row>,
}

impl<'a> Agreement<'a> {
    /// Nothing compared yet.
    pub fn new(cuda: &'a Cuda) -> Result<Self> {
        Ok(Self { cuda, cpu: Cpu::new(0)?, rows: Vec::new() })
    }

    /// The device.
    pub fn cuda(&self) -> &'a Cuda {
        self.cuda
    }

    /// The reference.
    pub fn cpu(&self) -> &Cpu<f64> {
        &self.cpu
    }

    /// What was compared.
    pub fn into_rows(self) -> Vec<Row> {
        self.rows
    }

    /// Half the distance from 1 to the next number of the device's compute type: the error of one rounding, relatively.
    pub fn rounding(&self) -> f64 {
        rounding(self.cuda.compute())
    }

    /// The error of rounding a sum in f32 to the device's type of gradients, relatively.
    pub fn gradient_rounding(&self) -> f64 {
        match self.cuda.gradient() {
            DType::F32 => 0.0,
            narrow => rounding(narrow) * 1.01,
        }
    }

    /// Fixed pseudo-random numbers, normal with this deviation, that the device's compute type holds exactly.
    pub fn normal(&self, seed: u64, len: usize, deviation: f64) -> Vec<f64> {
        let mut drawn = vec![0.0f32; len];
        rng::Stream::new(seed, "selftest").normal_fill(0, &mut drawn);
        drawn.into_iter().map(|x| round(f64::from(x) * deviation, self.cuda.compute())).collect()
    }

    /// A number rounded to the device's compute type.
    pub fn rounded(&self, x: f64) -> f64 {
        round(x, self.cuda.compute())
    }

    /// Checks that each element is, bit for bit, the first of the `copies` that it belongs to. One row of the table.
    pub fn compare_copies(&mut self, name: impl Into<String>, got: &[f64], copies: usize) {
        let first: Vec<f64> = got.iter().step_by(copies).copied().collect();
        self.compare(name, got, &repeated(&first, copies), |_| 0.0);
    }

    /// Compares outputs: |got − wanted| ≤ bound(i) for every element i; what is not finite must be the same. One row of
    /// the table.
    pub fn compare(&mut self, name: impl Into<String>, got: &[f64], wanted: &[f64], bound: impl Fn(usize) -> f64) {
        let mut row = Row { name: name.into(), elements: got.len(), worst: 0.0, at: 0, ok: got.len() == wanted.len() };
        for (i, (&got, &wanted)) in got.iter().zip(wanted).enumerate() {
            let same = got == wanted || got.is_nan() && wanted.is_nan();
            let part = if same { 0.0 } else { (got - wanted).abs() / bound(i) };
            // NaN, from a NaN on one side or a bound of 0, is worse than anything.
            if part.is_nan() || part > row.worst {
                (row.worst, row.at) = (if part.is_nan() { f64::INFINITY } else { part }, i);
            }
        }
        row.ok &= row.worst <= 1.0;
        if !row.ok {
            tracing::debug!(
                "{}: element {}: {:?} instead of {:?}",
                row.name,
                row.at,
                got.get(row.at),
                wanted.get(row.at)
            );
        }
        self.rows.push(row);
    }
}

/// Values of which each stands `copies` times in a row: what a widened model has.
pub fn repeated(values: &[f64], copies: usize) -> Vec<f64> {
    values.iter().flat_map(|&x| std::iter::repeat_n(x, copies)).collect()
}

/// See [`Agreement::rounding`].
pub fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-53),
        DType::F32 => 2f64.powi(-24),
        DType::BF16 => 2f64.powi(-8),
        other => panic!("{other} has no rounding of ours"),
    }
}

/// A number rounded to a type.
pub fn round(x: f64, to: DType) -> f64 {
    let mut narrow = vec![0; to.size()];
    dtype::convert(&x.to_ne_bytes(), DType::F64, &mut narrow, to);
    let mut wide = [0; 8];
    dtype::convert(&narrow, to, &mut wide, DType::F64);
    f64::from_ne_bytes(wide)
}

/// A tensor of floats with these values, rounded to its type.
pub fn put<B: Backend>(backend: &B, dtype: DType, values: &[f64]) -> Result<Tensor<B>> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    dtype::convert(bytemuck::cast_slice(values), DType::F64, &mut bytes, dtype);
    Tensor::from_bytes(backend, dtype, &bytes)
}

/// A tensor of the compute type.
pub fn put_real<B: Backend>(backend: &B, values: &[f64]) -> Result<Tensor<B>> {
    put(backend, backend.compute(), values)
}

/// A tensor of integers (i32).
pub fn put_integers<B: Backend>(backend: &B, values: &[i32]) -> Result<Tensor<B>> {
    Tensor::from_bytes(backend, DType::I32, bytemuck::cast_slice(values))
}

/// A tensor full of NaN: what an op leaves unwritten is seen.
pub fn unwritten<B: Backend>(backend: &B, dtype: DType, len: usize) -> Result<Tensor<B>> {
    put(backend, dtype, &vec![f64::NAN; len])
}

/// The values of a tensor of floats.
pub fn get<B: Backend>(backend: &B, tensor: &Tensor<B>) -> Result<Vec<f64>> {
    let mut host = backend.host(tensor.len() * tensor.dtype().size())?;
    backend.download(Stream::Compute, tensor.view(), &mut host, 0);
    backend.synchronize(&backend.record(Stream::Compute))?;
    let mut bytes = vec![0; tensor.len() * 8];
    dtype::convert(host.bytes(), tensor.dtype(), &mut bytes, DType::F64);
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}
