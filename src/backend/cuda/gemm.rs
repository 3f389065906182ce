//! Matrix products by cuBLASLt.
//!
//! cuBLASLt's matrices are column-major. A row-major C = A·B is the column-major Cᵀ = Bᵀ·Aᵀ over the same memory, so the
//! operands change places. A shape's algorithm is the first one that the library's heuristic offers, among those whose
//! sums have a fixed order, or with `autotune` the fastest of the first eight; it is chosen at the shape's first use and
//! kept; of several ranks one measures for all. Products of f32 never use TF32.
#![allow(unsafe_code, reason = "calls cuBLASLt")]

use super::{Cuda, Epilogue, Memory, library, tuning::Tuning};
use crate::{
    DType, Error, Result,
    backend::{Backend, Mut, Ref, Stream, Tensor},
};
use cudarc::cublaslt::{
    result::CublasError,
    sys::{self, cublasLtMatmulDescAttributes_t as Desc, cublasLtMatmulPreferenceAttributes_t as Preference},
};
use std::{collections::HashMap, ffi::c_void, ptr, time::Instant};

/// Bytes that an algorithm may use beside its operands; NVIDIA's advice for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
/// Algorithms that are measured for a product.
const CANDIDATES: usize = 8;
/// Calls of each.
const CALLS: usize = 5;

/// An operand: a row-major matrix in memory, perhaps taken transposed.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// From its first element to its last.
    pub view: Ref<'a, Cuda>,
    /// Elements from one row in memory to the next.
    pub stride: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
}

impl<'a> Matrix<'a> {
    /// A matrix with this many elements from row to row.
    pub fn new(view: Ref<'a, Cuda>, stride: usize) -> Self {
        Self { view, stride, transposed: false }
    }

    /// Its transpose.
    pub fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// What a product is, apart from where its operands lie: the key of an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    /// Rows and columns of C, and the length of the sums.
    size: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    types: [DType; 3],
    epilogue: sys::cublasLtEpilogue_t,
    adds: bool,
}

/// The library's handle and the products prepared so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    /// None where the library does not offer the epilogue.
    prepared: HashMap<Shape, Option<Prepared>>,
    /// With `autotune`: what was measured.
    tuning: Option<Tuning>,
    /// Whether nothing is measured at first use, but when ranks do it together.
    waits: bool,
}

// SAFETY: a handle may be used from any thread; the descriptors lie behind this value's lock.
unsafe impl Send for Products {}

/// Descriptors and algorithm of a product.
struct Prepared {
    product: sys::cublasLtMatmulDesc_t,
    /// Of B, A and C: the order of the library's operands.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// What else the heuristic offered.
    others: Vec<sys::cublasLtMatmulAlgo_t>,
}

macro_rules! lt {
    ($call:ident ( $($argument:expr),* $(,)? )) => {
        // SAFETY: argued at each use.
        check(unsafe { sys::$call($($argument),*) }, stringify!($call))
    };
}

fn check(status: sys::cublasStatus_t, call: &str) -> Result<()> {
    status.result().map_err(|CublasError(status)| Error::Device(format!("{call}: cuBLASLt says {status:?}")))
}

impl Products {
    /// `tunes`: the GPU's name, if algorithms are to be measured.
    pub(super) fn new(tunes: Option<&str>) -> Result<Self> {
        library::require(library::CUBLASLT)?;
        let mut handle = ptr::null_mut();
        // A plain out-parameter; the context is current.
        lt!(cublasLtCreate(&mut handle))?;
        // SAFETY: takes nothing, and the library is there.
        let version = unsafe { sys::cublasLtGetVersion() };
        let tuning = tunes.map(|device| Tuning::new(device, version));
        Ok(Self { handle, prepared: HashMap::new(), tuning, waits: false })
    }

    /// See [`Cuda::measure_products`].
    pub(super) fn wait(&mut self) {
        self.waits = true;
    }

    /// See [`Backend::tuning`].
    pub(super) fn tuning(&self) -> Option<String> {
        self.tuning.as_ref().and_then(|tuning| serde_json::to_string_pretty(tuning).ok())
    }

    /// See [`Backend::tune`].
    pub(super) fn tune(&mut self, text: &str) -> bool {
        // What was prepared with another algorithm is prepared anew.
        self.prepared.clear();
        self.tuning.as_mut().is_none_or(|tuning| tuning.take_over(text))
    }

    /// `measure` gives the seconds that a product takes. None where the library does not offer an epilogue that is
    /// `optional`.
    fn prepare(
        &mut self,
        shape: Shape,
        optional: bool,
        measure: impl Fn(&Prepared) -> Result<f64>,
    ) -> Result<Option<&Prepared>> {
        if !self.prepared.contains_key(&shape) {
            let candidates = if self.tuning.is_some() { CANDIDATES } else { 1 };
            let mut prepared = match Prepared::new(self.handle, shape, candidates) {
                Err(error) if optional => {
                    tracing::debug!("kernels of our own instead: {error}");
                    None
                }
                prepared => Some(prepared?),
            };
            if let (Some(tuning), Some(prepared)) = (&mut self.tuning, &mut prepared) {
                let key = format!("{shape:?}");
                match tuning.algorithms.get(&key) {
                    Some(&data) => prepared.algorithm.data = data,
                    None if self.waits => {}
                    None => {
                        prepared.keep_fastest(measure)?;
                        tuning.algorithms.insert(key, prepared.algorithm.data);
                    }
                }
            }
            self.prepared.insert(shape, prepared);
        }
        Ok(self.prepared[&shape].as_ref())
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.prepared.clear();
        // Created by `new`, dropped once.
        let _ = lt!(cublasLtDestroy(self.handle));
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        other => panic!("products of {other}"),
    }
}

impl Prepared {
    fn new(handle: sys::cublasLtHandle_t, shape: Shape, candidates: usize) -> Result<Self> {
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let mut product = ptr::null_mut();
        lt!(cublasLtMatmulDescCreate(&mut product, compute, scale))?;
        // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        describe(product, Desc::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(shape.transposed[1]))?;
        describe(product, Desc::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(shape.transposed[0]))?;
        describe_epilogue(product, shape)?;
        let [m, n, k] = shape.size;
        // As the library sees it: rows and columns of the memory's columns-first reading.
        let read = |transposed, rows, columns| if transposed { (rows, columns) } else { (columns, rows) };
        let sizes = [read(shape.transposed[1], k, n), read(shape.transposed[0], m, k), (n, m)];
        let mut layouts = [ptr::null_mut(); 3];
        for (i, operand) in [1, 0, 2].into_iter().enumerate() {
            let (dtype, (rows, columns)) = (data_type(shape.types[operand]), sizes[i]);
            let stride = shape.strides[operand] as i64;
            lt!(cublasLtMatrixLayoutCreate(&mut layouts[i], dtype, rows as u64, columns as u64, stride))?;
        }
        let algorithms = choose(handle, product, layouts, candidates).map_err(|error| {
            Error::Device(format!(
                "{error}: no algorithm for the product {m} x {n} x {k} of {:?}, {:?}",
                shape.types, shape.epilogue
            ))
        });
        let none = sys::cublasLtMatmulAlgo_t { data: [0; 8] };
        let mut prepared = Self { product, layouts, algorithm: none, others: Vec::new() };
        let mut algorithms = algorithms?.into_iter();
        prepared.algorithm = algorithms.next().unwrap_or(none);
        prepared.others = algorithms.collect();
        Ok(prepared)
    }
}

impl Prepared {
    /// Measures every algorithm that the heuristic offered, and keeps the fastest.
    fn keep_fastest(&mut self, measure: impl Fn(&Self) -> Result<f64>) -> Result<()> {
        let (mut best, mut fastest) = (measure(self)?, self.algorithm);
        for other in std::mem::take(&mut self.others) {
            self.algorithm = other;
            let seconds = measure(self)?;
            if seconds < best {
                (best, fastest) = (seconds, other);
            }
        }
        self.algorithm = fastest;
        Ok(())
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        for layout in self.layouts {
            let _ = lt!(cublasLtMatrixLayoutDestroy(layout));
        }
        let _ = lt!(cublasLtMatmulDescDestroy(self.product));
    }
}

fn describe<T>(product: sys::cublasLtMatmulDesc_t, attribute: Desc, value: &T) -> Result<()> {
    // The library copies as many bytes as the attribute has from the value.
    lt!(cublasLtMatmulDescSetAttribute(product, attribute, ptr::from_ref(value).cast(), size_of::<T>()))
}

/// The epilogue, with pointers of which the heuristic looks at the alignment only. GELU's argument lies in memory as the
/// result does.
fn describe_epilogue(product: sys::cublasLtMatmulDesc_t, shape: Shape) -> Result<()> {
    use sys::cublasLtEpilogue_t as Kind;
    let Shape { epilogue, strides, .. } = shape;
    if epilogue == Kind::CUBLASLT_EPILOGUE_DEFAULT {
        return Ok(());
    }
    let somewhere = crate::backend::ALIGNMENT as u64;
    describe(product, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
    if !matches!(epilogue, Kind::CUBLASLT_EPILOGUE_GELU_AUX | Kind::CUBLASLT_EPILOGUE_DGELU) {
        describe(product, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &somewhere)?;
    }
    if !matches!(epilogue, Kind::CUBLASLT_EPILOGUE_BIAS | Kind::CUBLASLT_EPILOGUE_BGRADB) {
        describe(product, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &somewhere)?;
        describe(product, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(strides[2] as i64))?;
    }
    Ok(())
}

/// The heuristic's first algorithms, at least one, among those that add in a fixed order: split sums are added by a second
/// pass, never in place.
fn choose(
    handle: sys::cublasLtHandle_t,
    product: sys::cublasLtMatmulDesc_t,
    [a, b, c]: [sys::cublasLtMatrixLayout_t; 3],
    most: usize,
) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
    use sys::cublasLtReductionScheme_t as Reduction;
    let mut preference = ptr::null_mut();
    lt!(cublasLtMatmulPreferenceCreate(&mut preference))?;
    let prefer = |attribute, value: *const c_void, size| {
        lt!(cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, size))
    };
    let fixed = Reduction::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32
        | Reduction::CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE as u32;
    let chosen = prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, ptr::from_ref(&WORKSPACE).cast(), 8)
        .and_then(|()| prefer(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, ptr::from_ref(&fixed).cast(), 4))
        .and_then(|()| {
            let mut found = Vec::<sys::cublasLtMatmulHeuristicResult_t>::with_capacity(most);
            let (to, mut count) = (found.as_mut_ptr(), 0);
            lt!(cublasLtMatmulAlgoGetHeuristic(handle, product, a, b, c, c, preference, most as i32, to, &mut count))?;
            // SAFETY: the library wrote as many results as it counted, which are no more than there is room for.
            unsafe { found.set_len(count as usize) };
            let usable = found.iter().filter(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
            let algorithms: Vec<_> = usable.map(|f| f.algo).collect();
            match algorithms.is_empty() {
                true => Err(Error::Device("cublasLtMatmulAlgoGetHeuristic: none found".into())),
                false => Ok(algorithms),
            }
        });
    let _ = lt!(cublasLtMatmulPreferenceDestroy(preference));
    chosen
}

impl Cuda {
    /// c = alpha · a · b + beta · c. `size` is c's rows and columns, and the length of the sums; c has `stride` elements
    /// from row to row. Sums are f32, whatever the operands.
    pub(crate) fn gemm(
        &self,
        c: (Mut<'_, Self>, usize),
        a: Matrix<'_>,
        b: Matrix<'_>,
        size: [usize; 3],
        factors: (f64, f64),
    ) {
        self.gemm_with(c, a, b, size, factors, Epilogue::Plain);
    }

    /// The same, with something done to the sums on the way. False, and nothing is done at all, where an epilogue other
    /// than the bias is left to kernels of our own: see [`Cuda::fuses`].
    pub(crate) fn gemm_with(
        &self,
        c: (Mut<'_, Self>, usize),
        a: Matrix<'_>,
        b: Matrix<'_>,
        size: [usize; 3],
        (alpha, beta): (f64, f64),
        epilogue: Epilogue<'_>,
    ) -> bool {
        self.try_gemm(c, a, b, size, (alpha as f32, beta as f32), &epilogue).unwrap_or_else(|error| {
            self.note(Err(error));
            true
        })
    }

    fn try_gemm(
        &self,
        (c, stride): (Mut<'_, Self>, usize),
        a: Matrix<'_>,
        b: Matrix<'_>,
        size: [usize; 3],
        (alpha, beta): (f32, f32),
        epilogue: &Epilogue<'_>,
    ) -> Result<bool> {
        let [m, n, k] = size;
        let needed = |matrix: Matrix, rows: usize, columns: usize| {
            let (rows, columns) = if matrix.transposed { (columns, rows) } else { (rows, columns) };
            (rows - 1) * matrix.stride + columns
        };
        let of_result = needed(Matrix::new(c.as_ref(), stride), m, n);
        assert!(a.view.len() >= needed(a, m, k) && b.view.len() >= needed(b, k, n), "operands of {size:?}");
        assert!(c.len() >= of_result, "result of {size:?}");
        let entries = if matches!(epilogue, Epilogue::RowSums(_)) { m } else { n };
        let fits = |view: Option<Ref<'_, Self>>, len| view.is_none_or(|v| v.len() >= len && v.dtype() == c.dtype());
        assert!(fits(epilogue.vector(), entries) && fits(epilogue.matrix(), of_result), "epilogue of {size:?}");
        let shape = Shape {
            size,
            strides: [a.stride, b.stride, stride],
            transposed: [a.transposed, b.transposed],
            types: [a.view.dtype(), b.view.dtype(), c.dtype()],
            epilogue: epilogue.kind(),
            adds: beta != 0.0,
        };
        if epilogue.is_optional() && !self.fuses(shape.types[0], shape.strides) {
            return Ok(false);
        }
        self.bind()?;
        let mut products = self.products();
        let handle = products.handle;
        let operands = [b.view.address().0, a.view.address().0];
        let prepared = products.prepare(shape, epilogue.is_optional(), |prepared| {
            // Into memory of its own: what c holds may be added to.
            let result = Memory::new(&self.context, &self.allocated, c.len() * c.dtype().size())?;
            self.seconds(|| self.multiply(handle, prepared, operands, result.address.0, (alpha, 0.0), epilogue))
        })?;
        let Some(prepared) = prepared else { return Ok(false) };
        self.multiply(handle, prepared, operands, c.address().0, (alpha, beta), epilogue)?;
        Ok(true)
    }

    /// Measures the products of several ranks that were used so far, on one of them for all: until then they take the
    /// library's first choice, and so do those that none of them used before.
    pub(super) fn measure_products(&self) -> Result<()> {
        self.bind()?;
        let mut products = self.products();
        let Products { handle, prepared, tuning: Some(tuning), .. } = &mut *products else { return Ok(()) };
        for (shape, prepared) in prepared {
            let Some(prepared) = prepared else { continue };
            let key = format!("{shape:?}");
            if tuning.algorithms.contains_key(&key) {
                continue;
            }
            let [m, n, k] = shape.size;
            let rows = [if shape.transposed[0] { k } else { m }, if shape.transposed[1] { n } else { k }, m];
            let operand = |i: usize| Tensor::new(self, shape.types[i], rows[i] * shape.strides[i]);
            let (a, b, c) = (operand(0)?, operand(1)?, operand(2)?);
            // What its epilogue reads or writes: a number for each row or column, and what lies in memory as c does.
            let (mut vector, mut matrix) = (Tensor::new(self, shape.types[2], m.max(n))?, operand(2)?);
            let epilogue = Epilogue::of(shape.epilogue, &mut vector, &mut matrix);
            let operands = [b.view().address().0, a.view().address().0];
            let result = c.view().address().0;
            prepared.keep_fastest(|prepared| {
                self.seconds(|| self.multiply(*handle, prepared, operands, result, (1.0, 0.0), &epilogue))
            })?;
            tuning.algorithms.insert(key, prepared.algorithm.data);
        }
        Ok(())
    }

    /// Seconds of some work, once it is warm.
    fn seconds(&self, work: impl Fn() -> Result<()>) -> Result<f64> {
        work()?;
        self.synchronize(&self.record(Stream::Compute))?;
        let start = Instant::now();
        (0..CALLS).try_for_each(|_| work())?;
        self.synchronize(&self.record(Stream::Compute))?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn multiply(
        &self,
        handle: sys::cublasLtHandle_t,
        prepared: &Prepared,
        [left, right]: [u64; 2],
        result: u64,
        (alpha, beta): (f32, f32),
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        let Prepared { product, layouts, algorithm, .. } = prepared;
        if let Some(vector) = epilogue.vector() {
            describe(*product, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector.address().0)?;
        }
        if let Some(matrix) = epilogue.matrix() {
            describe(*product, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &matrix.address().0)?;
        }
        let result = result as *mut c_void;
        // The descriptors are those of these operands, whose lengths were checked; alpha and beta are read before the
        // call returns; the workspace belongs to the compute stream.
        lt!(cublasLtMatmul(
            handle,
            *product,
            ptr::from_ref(&alpha).cast(),
            left as *const c_void,
            layouts[0],
            right as *const c_void,
            layouts[1],
            ptr::from_ref(&beta).cast(),
            result,
            layouts[2],
            result,
            layouts[2],
            algorithm,
            self.product_workspace() as *mut c_void,
            WORKSPACE,
            self.queue(Stream::Compute).raw as sys::cudaStream_t
        ))
    }
}
