//! What a device must offer beneath the operations: memory, streams, events, copies, captured graphs.
//!
//! Memory is opaque. [`Tensor`] owns a region, [`Ref`] and [`Mut`] borrow one; none of them shows its contents. Code
//! that is generic over [`Backend`] moves data by ops and by the explicit copies below, so it runs unchanged where
//! memory lies on a device. Only [`cpu`] turns a view of its own memory into a slice, for the ops' CPU code.
//!
//! Borrowing is Rust's: two mutable views never overlap, because they come from `&mut` of a region or from
//! [`Mut::split`]. What an asynchronous device adds (order between streams) is said by events.

pub mod cpu;
pub mod cuda;

use crate::{
    DType, Result,
    comm::{
        Comm,
        tcp::{Tcp, Tree},
    },
    trace::{self, Lane, Stamp},
};
use std::{collections::BTreeMap, fmt, marker::PhantomData, ops::Range, sync::Arc, time::Instant};

/// The queues of a device. Ops run on [`Stream::Compute`]; collectives and copies may run beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Ops.
    Compute,
    /// Collectives.
    Communication,
    /// Copies to and from the host.
    Copy,
}

/// A device address that can be moved by a number of bytes. Dereferencing is the backend's business.
pub trait Address: Copy + Send + Sync + fmt::Debug + 'static {
    /// The address `bytes` further on. The caller has checked that it lies within the same allocation.
    fn offset(self, bytes: usize) -> Self;
}

/// A device. One value per process and device; shared by reference.
pub trait Backend: Sized + Send + Sync + 'static {
    /// Where device memory is.
    type Address: Address;
    /// One allocation of device memory, freed on drop.
    type Memory: Send + Sync;
    /// Host memory that the device can copy from and to while the host goes on (pinned, on a GPU).
    type Host: HostBuffer;
    /// A point in a stream that another stream, or the host, can wait for.
    type Event: Send;
    /// Recorded work; see [`Backend::begin`].
    type Graph: Default + Send;
    /// Whether work is recorded.
    const RECORDS: bool;

    /// The device in words, for logs: `CPU, 2 threads`.
    fn describe(&self) -> String;
    /// Type of activations and of the working copy of weights.
    fn compute(&self) -> DType;
    /// Type of statistics that ops keep for backward (means, log-sum-exp, losses per row).
    fn statistics(&self) -> DType;
    /// Type of the gradients of parameters, as backward of a micro-batch writes them.
    fn gradient(&self) -> DType;
    /// Type in which gradients of micro-steps and ranks are summed.
    fn reduction(&self) -> DType;
    /// Type of the copy of the weights that the optimizer updates; none where it updates the weights that the forward
    /// pass reads.
    fn master(&self) -> Option<DType>;
    /// Type of the optimizer's moments; in bf16 they are rounded stochastically.
    fn moment(&self) -> DType;

    /// Allocates `bytes` of zeroed memory, aligned to [`ALIGNMENT`]. The error says how much was asked for.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;
    /// Address of an allocation's first byte.
    fn address(&self, memory: &Self::Memory) -> Self::Address;
    /// Bytes allocated so far by this backend and still alive: constant while training.
    fn allocated(&self) -> usize;
    /// Bytes that may be allocated now, as far as the system or the device can say.
    fn available(&self) -> Result<usize>;
    /// Whether tensors lie in the memory of the host, which then serves both.
    fn in_host_memory(&self) -> bool {
        false
    }
    /// Allocates zeroed host memory for asynchronous copies.
    fn host(&self, bytes: usize) -> Result<Self::Host>;

    /// Makes bytes that lie in host memory (a mapped file) readable by ops: the bytes themselves on a CPU, a staged
    /// copy on a GPU. The view is valid until the next call with the same `staging`.
    fn stage<'a>(&'a self, staging: &'a mut Staging<Self>, bytes: &'a [u8], dtype: DType) -> Result<Ref<'a, Self>>;

    /// Copies host → device, asynchronously: `source` must not change until an event recorded after it has passed.
    fn upload(&self, stream: Stream, source: &Self::Host, range: Range<usize>, target: Mut<'_, Self>);
    /// Copies device → host, asynchronously: `target` is valid once an event recorded after it has passed.
    fn download(&self, stream: Stream, source: Ref<'_, Self>, target: &mut Self::Host, at: usize);
    /// Copies device → device. Lengths and types are equal.
    fn copy(&self, stream: Stream, source: Ref<'_, Self>, target: Mut<'_, Self>);
    /// Sets all bytes to zero.
    fn zero(&self, stream: Stream, target: Mut<'_, Self>);

    /// Marks the present end of `stream`.
    fn record(&self, stream: Stream) -> Self::Event;
    /// Lets what is enqueued on `stream` from now on wait for `event`.
    fn wait(&self, stream: Stream, event: &Self::Event);
    /// Blocks the host until `event` has passed; reports a fault of the device.
    fn synchronize(&self, event: &Self::Event) -> Result<()>;

    /// Begins work whose ops have the same arguments at every call with the same `graph` (whatever changes from step to
    /// step is read from device memory). A device with graphs records it once and replays it afterwards. True: the
    /// caller shall enqueue the work now, and then call [`Backend::end`] even if that failed. False: it was replayed.
    fn begin(&self, graph: &mut Self::Graph) -> Result<bool>;
    /// Ends what [`Backend::begin`] asked for; `worked` is how that went, and what this returns if it failed.
    fn end(&self, graph: &mut Self::Graph, worked: Result<()>) -> Result<()>;

    /// What was measured to choose between ways of computing that round differently, as text to keep with a run. None
    /// where nothing is measured.
    fn tuning(&self) -> Option<String> {
        None
    }

    /// Takes over what [`Backend::tuning`] gave, so that the same bits are computed. False if it was measured elsewhere.
    fn tune(&self, _text: &str) -> bool {
        true
    }

    /// Measures what is used by several ranks, which leave that to one of them; the others [`Backend::tune`].
    fn measure(&self) -> Result<()> {
        Ok(())
    }

    /// A point in `stream`, for a trace; none where it cannot be told, as within recorded work. Where calls return when
    /// they are done, that is now.
    fn stamp(&self, _: Stream) -> Option<Stamp> {
        Some(Stamp::Now(Instant::now()))
    }

    /// Shows in a trace, if one is made, what is enqueued on `stream` until the span is dropped.
    fn span(&self, stream: Stream, lane: Lane, name: impl fmt::Display) -> Span<'_, Self> {
        let open = if trace::is_on() { self.stamp(stream).map(|from| (lane, name.to_string(), from)) } else { None };
        Span { backend: self, stream, open }
    }

    /// The way to the devices of the ranks that this one's host is connected with.
    fn connect(&self, tree: Tree) -> Result<Box<dyn Comm<Self>>> {
        Ok(Box::new(Tcp::new(tree)?))
    }

    /// Returns the profile gathered so far, and goes on gathering or stops. None where there is none, as on devices
    /// that have profilers of their own.
    fn profile(&self, _go_on: bool) -> Option<Profile> {
        None
    }
}

/// Work that is being enqueued; see [`Backend::span`].
pub struct Span<'a, B: Backend> {
    backend: &'a B,
    stream: Stream,
    open: Option<(Lane, String, Stamp)>,
}

impl<B: Backend> Drop for Span<'_, B> {
    fn drop(&mut self) {
        let Some((lane, name, from)) = self.open.take() else { return };
        if let Some(to) = self.backend.stamp(self.stream) {
            trace::note(lane, name, from, to);
        }
    }
}

/// Time spent in parallel regions, by file and line: how often, and seconds in all.
pub type Profile = BTreeMap<(&'static str, u32), (u64, f64)>;

/// Every tensor starts on a multiple of this many bytes.
pub const ALIGNMENT: usize = 256;

/// Host memory as bytes.
pub trait HostBuffer: Send {
    /// The bytes.
    fn bytes(&self) -> &[u8];
    /// The bytes, to fill. The last copy from them must have passed.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Memory that [`Backend::stage`] may keep between calls; grows to the largest tensor staged.
pub struct Staging<B: Backend>(pub(in crate::backend) Option<Tensor<B>>);

impl<B: Backend> Default for Staging<B> {
    fn default() -> Self {
        Self(None)
    }
}

/// A region of device memory that is owned: part of an allocation that no other `Tensor` shares.
pub struct Tensor<B: Backend> {
    _memory: Arc<B::Memory>,
    address: B::Address,
    len: usize,
    dtype: DType,
}

impl<B: Backend> Tensor<B> {
    /// Allocates a tensor of its own. For many at once, and a printed plan, see [`crate::model::plan`].
    pub fn new(backend: &B, dtype: DType, len: usize) -> Result<Self> {
        let memory = Arc::new(backend.allocate(len * dtype.size())?);
        let address = backend.address(&memory);
        Ok(Self { _memory: memory, address, len, dtype })
    }

    /// A tensor with these contents; waits until they are there.
    pub fn from_bytes(backend: &B, dtype: DType, bytes: &[u8]) -> Result<Self> {
        let mut tensor = Self::new(backend, dtype, bytes.len() / dtype.size())?;
        let mut host = backend.host(bytes.len())?;
        host.bytes_mut().copy_from_slice(bytes);
        backend.upload(Stream::Compute, &host, 0..bytes.len(), tensor.view_mut());
        backend.synchronize(&backend.record(Stream::Compute))?;
        Ok(tensor)
    }

    /// Cuts one allocation into tensors, each on its own [`ALIGNMENT`] border.
    pub fn carve(backend: &B, parts: &[(DType, usize)]) -> Result<Vec<Self>> {
        let total = parts.iter().map(|&(dtype, len)| aligned(len * dtype.size())).sum();
        let memory = Arc::new(backend.allocate(total)?);
        let mut address = backend.address(&memory);
        let mut tensors = Vec::with_capacity(parts.len());
        for &(dtype, len) in parts {
            tensors.push(Self { _memory: memory.clone(), address, len, dtype });
            address = address.offset(aligned(len * dtype.size()));
        }
        Ok(tensors)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Borrows all of it.
    pub fn view(&self) -> Ref<'_, B> {
        Ref { address: self.address, len: self.len, dtype: self.dtype, lifetime: PhantomData }
    }

    /// Borrows all of it to write.
    pub fn view_mut(&mut self) -> Mut<'_, B> {
        Mut { address: self.address, len: self.len, dtype: self.dtype, lifetime: PhantomData }
    }

    /// Borrows a range of elements.
    pub fn slice(&self, range: Range<usize>) -> Ref<'_, B> {
        self.view().slice(range)
    }

    /// Borrows a range of elements to write.
    pub fn slice_mut(&mut self, range: Range<usize>) -> Mut<'_, B> {
        self.view_mut().slice(range)
    }
}

/// Bytes rounded up to [`ALIGNMENT`].
pub fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// A borrowed region of device memory.
pub struct Ref<'a, B: Backend> {
    address: B::Address,
    len: usize,
    dtype: DType,
    lifetime: PhantomData<&'a [u8]>,
}

impl<B: Backend> Clone for Ref<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Ref<'_, B> {}

impl<'a, B: Backend> Ref<'a, B> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The address of the first element, for backends.
    pub fn address(&self) -> B::Address {
        self.address
    }

    /// A range of elements. Panics when it lies outside: an error of ours.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        Self { address: self.address.offset(range.start * self.dtype.size()), len: range.len(), ..self }
    }
}

/// A region of device memory borrowed to write.
pub struct Mut<'a, B: Backend> {
    address: B::Address,
    len: usize,
    dtype: DType,
    lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a, B: Backend> Mut<'a, B> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The address of the first element, for backends.
    pub fn address(&self) -> B::Address {
        self.address
    }

    /// Borrows again, for a shorter time.
    pub fn reborrow(&mut self) -> Mut<'_, B> {
        Mut { address: self.address, len: self.len, dtype: self.dtype, lifetime: PhantomData }
    }

    /// Borrows to read.
    pub fn as_ref(&self) -> Ref<'_, B> {
        Ref { address: self.address, len: self.len, dtype: self.dtype, lifetime: PhantomData }
    }

    /// What was borrowed to write, to be read from now on.
    pub fn into_ref(self) -> Ref<'a, B> {
        Ref { address: self.address, len: self.len, dtype: self.dtype, lifetime: PhantomData }
    }

    /// A range of elements. Panics when it lies outside: an error of ours.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        Self { address: self.address.offset(range.start * self.dtype.size()), len: range.len(), ..self }
    }

    /// The same memory as elements of another type, as many as fit. It starts on a border of that type, as tensors do.
    pub fn retyped(self, dtype: DType) -> Self {
        let bytes = self.len * self.dtype.size();
        Self { len: bytes / dtype.size(), dtype, ..self }
    }

    /// Two views: the elements before `at`, and the rest.
    pub fn split(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len, "{at} of {} elements", self.len);
        let rest = self.address.offset(at * self.dtype.size());
        (Self { len: at, ..self }, Self { address: rest, len: self.len - at, ..self })
    }

    /// Two disjoint ranges, in either order.
    pub fn pair(self, a: Range<usize>, b: Range<usize>) -> (Self, Self) {
        if a.start <= b.start {
            assert!(a.end <= b.start || b.is_empty(), "{a:?} and {b:?} overlap");
            let (low, high) = self.split(b.start);
            (low.slice(a), high.slice(0..b.len()))
        } else {
            let (second, first) = self.pair(b, a);
            (first, second)
        }
    }
}
