//! The CPU backend, `Cpu<f32>` or `Cpu<f64>`: the reference for every other backend, and the one that runs everywhere.
#![allow(unsafe_code, reason = "turns views of its own allocations into slices")]

use super::{ALIGNMENT, Address, Backend, HostBuffer, Mut, Ref, Staging, Stream};
use crate::{DType, Error, Result};
use bytemuck::Pod;
#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;
use std::{
    marker::PhantomData,
    ops::Range,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

pub(crate) mod gemm;
pub(crate) mod math;
pub(crate) mod parallel;
pub(crate) mod stream;

pub use math::Real;
pub(crate) use parallel::Pool;

/// More threads than any machine has cores: starting many more would take minutes before the system refuses.
const MAX_THREADS: usize = 4096;

/// The CPU with compute type `F`: activations, weights, gradients and moments (unless asked otherwise) are `F`, sums over
/// micro-steps `f64`.
pub struct Cpu<F> {
    pool: Pool,
    allocated: Arc<AtomicUsize>,
    moment: DType,
    compute: PhantomData<F>,
}

impl<F: Real> Cpu<F> {
    /// A CPU backend with this many threads; 0 means one for each core this process may use.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        if threads > MAX_THREADS {
            return Err(Error::config("threads", threads, format!("must be at most {MAX_THREADS}; 0: all cores")));
        }
        let pool = Pool::new(threads)
            .map_err(|error| Error::Device(format!("{threads} threads were refused ({error}); ask for fewer")))?;
        Ok(Self { pool, allocated: Arc::default(), moment: F::DTYPE, compute: PhantomData })
    }

    /// The same with moments in another type: bf16, rounded stochastically.
    pub fn with_moments(self, moment: DType) -> Self {
        assert!(moment == F::DTYPE || moment == DType::BF16, "moments of {moment}");
        Self { moment, ..self }
    }

    /// The threads that ops run on.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// A pointer into an allocation of this module.
#[derive(Clone, Copy, Debug)]
pub struct Pointer(NonNull<u8>);

// SAFETY: a pointer is only turned into a slice through `Ref` and `Mut`, whose lifetimes carry the borrow of the
// `Tensor` (or mapped bytes) it points into; those are Send and Sync as plain bytes are.
unsafe impl Send for Pointer {}
// SAFETY: as above.
unsafe impl Sync for Pointer {}

impl Address for Pointer {
    fn offset(self, bytes: usize) -> Self {
        // SAFETY: callers (`Ref`, `Mut`, `Tensor`) have checked that the result lies in the same allocation or one
        // past its end, so it neither wraps nor is null.
        Self(unsafe { self.0.add(bytes) })
    }
}

/// One allocation of zeroed bytes: pages of its own, which the system gives when they are first written.
pub struct Memory {
    start: Pointer,
    pages: MmapMut,
    allocated: Arc<AtomicUsize>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.allocated.fetch_sub(self.pages.len(), Ordering::Relaxed);
    }
}

impl HostBuffer for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl<F: Real> Backend for Cpu<F> {
    type Address = Pointer;
    type Memory = Memory;
    type Host = Vec<u8>;
    type Event = ();
    type Graph = ();
    const RECORDS: bool = false;

    fn describe(&self) -> String {
        format!("CPU, {} threads, {}", self.pool.threads(), if F::DTYPE == DType::F64 { "f64" } else { "f32" })
    }

    fn compute(&self) -> DType {
        F::DTYPE
    }

    fn statistics(&self) -> DType {
        F::DTYPE
    }

    fn gradient(&self) -> DType {
        F::DTYPE
    }

    fn reduction(&self) -> DType {
        DType::F64
    }

    fn master(&self) -> Option<DType> {
        None
    }

    fn moment(&self) -> DType {
        self.moment
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        let refused = |error| {
            Error::Device(format!("out of memory: {bytes} bytes were refused ({error}); use a smaller batch or model"))
        };
        let mut pages = MmapMut::map_anon(bytes.max(ALIGNMENT)).map_err(refused)?;
        // Pages of 2 MiB make fewer misses in the translation of addresses, which costs matrix products a good part of
        // their speed, and fewer faults. A system that has none says no, and nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(Advice::HugePage);
        let start = Pointer(NonNull::from(&mut pages[..]).cast());
        self.allocated.fetch_add(pages.len(), Ordering::Relaxed);
        Ok(Memory { start, pages, allocated: self.allocated.clone() })
    }

    fn address(&self, memory: &Memory) -> Pointer {
        memory.start
    }

    fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    fn available(&self) -> Result<usize> {
        // The rest is for the page cache, which the data are read through.
        Ok(crate::machine::available_memory().map_or(usize::MAX, |bytes| bytes / 5 * 4))
    }

    fn in_host_memory(&self) -> bool {
        true
    }

    fn host(&self, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn stage<'a>(&'a self, _: &'a mut Staging<Self>, bytes: &'a [u8], dtype: DType) -> Result<Ref<'a, Self>> {
        assert!(
            bytes.len().is_multiple_of(dtype.size()) && bytes.as_ptr().align_offset(dtype.size()) == 0,
            "staged bytes are aligned"
        );
        let address = Pointer(NonNull::from(bytes).cast());
        Ok(Ref { address, len: bytes.len() / dtype.size(), dtype, lifetime: PhantomData })
    }

    fn upload(&self, _: Stream, source: &Vec<u8>, range: Range<usize>, target: Mut<'_, Self>) {
        target.bytes_mut().copy_from_slice(&source[range]);
    }

    fn download(&self, _: Stream, source: Ref<'_, Self>, target: &mut Vec<u8>, at: usize) {
        let bytes = source.bytes();
        target[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn copy(&self, _: Stream, source: Ref<'_, Self>, target: Mut<'_, Self>) {
        assert_eq!(source.dtype(), target.dtype());
        target.bytes_mut().copy_from_slice(source.bytes());
    }

    fn zero(&self, _: Stream, target: Mut<'_, Self>) {
        target.bytes_mut().fill(0);
    }

    fn record(&self, _: Stream) {}
    fn wait(&self, _: Stream, (): &()) {}
    fn synchronize(&self, (): &()) -> Result<()> {
        Ok(())
    }

    fn begin(&self, (): &mut ()) -> Result<bool> {
        Ok(true)
    }
    fn end(&self, (): &mut (), worked: Result<()>) -> Result<()> {
        worked
    }

    fn profile(&self, go_on: bool) -> Option<super::Profile> {
        self.pool.profile(go_on)
    }
}

/// A Rust type whose slices the CPU's ops work on.
pub trait Element: Pod + Send + Sync {
    /// Its tag.
    const DTYPE: DType;
}

macro_rules! element {
    ($($type:ty => $tag:ident),*) => { $(impl Element for $type { const DTYPE: DType = DType::$tag; })* };
}
element!(f64 => F64, f32 => F32, half::bf16 => BF16, half::f16 => F16, i32 => I32, u32 => U32, u8 => U8);

impl<'a, F: Real> Ref<'a, Cpu<F>> {
    /// The elements. Panics when their type is another: an error of ours.
    pub(crate) fn as_slice<T: Element>(self) -> &'a [T] {
        assert_eq!(self.dtype, T::DTYPE);
        // SAFETY: the view's range lies in an allocation that lives for 'a and that nobody writes during 'a (it came
        // from `&Tensor` or from mapped bytes); it is aligned for every element type (allocations to ALIGNMENT,
        // slices of them to multiples of the element, staged bytes by assertion); all bit patterns are valid (Pod).
        unsafe { std::slice::from_raw_parts(self.address.0.as_ptr().cast(), self.len) }
    }

    fn bytes(self) -> &'a [u8] {
        // SAFETY: as in `as_slice`.
        unsafe { std::slice::from_raw_parts(self.address.0.as_ptr(), self.len * self.dtype.size()) }
    }
}

impl<'a, F: Real> Mut<'a, Cpu<F>> {
    /// The elements, to write. Panics when their type is another: an error of ours.
    pub(crate) fn into_slice<T: Element>(self) -> &'a mut [T] {
        assert_eq!(self.dtype, T::DTYPE);
        // SAFETY: as in `Ref::as_slice`; and no other view of this range exists during 'a, since a `Mut` comes from
        // `&mut Tensor` or from splitting one, and is consumed here.
        unsafe { std::slice::from_raw_parts_mut(self.address.0.as_ptr().cast(), self.len) }
    }

    fn bytes_mut(self) -> &'a mut [u8] {
        // SAFETY: as in `into_slice`.
        unsafe { std::slice::from_raw_parts_mut(self.address.0.as_ptr(), self.len * self.dtype.size()) }
    }
}
