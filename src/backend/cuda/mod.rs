//! The CUDA backend: one GPU through its driver, cuBLASLt for matrix products, and our own kernels.
//!
//! ```text
//! library → driver → module (images, or nvrtc) → launch        ops/*/cuda.rs: kernels! { … }
//!                  → gemm (cuBLASLt), epilogue                  ops/linear, linear_activation, head, muon
//!                  → graph (capture and replay)                 trainer::recorded
//!                  → nccl (sums over ranks)                     comm::Comm
//!                  → clock (when work ran)                      trace
//! ```
//!
//! Calls enqueue work and return nothing: what fails is kept, and told by the next [`Backend::synchronize`], as a
//! device's own faults are. The type of activations and working weights, f32 or bf16, is a value and no parameter of
//! the type, so that the program is compiled for a GPU once. Statistics and master weights are f32 with either, parameter
//! gradients (of a micro-batch; sums of them are f32) and moments unless bf16 is asked for.
#![allow(unsafe_code, reason = "allocates and copies through the driver")]

mod clock;
pub mod driver;
mod epilogue;
mod gemm;
mod graph;
pub(crate) mod launch;
pub mod library;
pub mod module;
pub mod nccl;
pub mod nvrtc;
mod options;
mod tuning;

pub use driver::{Event, Properties};
pub use graph::Graph;
pub use options::Options;
pub(crate) use {
    epilogue::Epilogue,
    gemm::Matrix,
    launch::{Launch, Teams, kernels, warps},
};

use super::{ALIGNMENT, Address, Backend, HostBuffer, Mut, Ref, Staging, Stream, Tensor, aligned};
use crate::{
    DType, Error, Result,
    comm::{Comm, tcp::Tree},
    trace::Stamp,
};
use clock::Clock;
use driver::{Context, EventPool, Queue, cuda};
use gemm::Products;
use module::Modules;
use nccl::{Group, Nccl};
use std::{
    ops::Range,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// A GPU.
pub struct Cuda {
    options: Options,
    properties: Properties,
    // Dropped in this order: what lives in the context before it.
    group: OnceLock<Group>,
    products: Mutex<Products>,
    modules: Modules,
    workspace: Mutex<Vec<Tensor<Self>>>,
    product_workspace: Memory,
    bounce: Mutex<Option<[Bounce; 2]>>,
    queues: [Queue; 3],
    events: Arc<EventPool>,
    clock: Clock,
    fault: Mutex<Option<Error>>,
    allocated: Arc<AtomicUsize>,
    context: Arc<Context>,
}

impl Cuda {
    /// Takes hold of a GPU: checks driver, GPU and libraries, and says what is missing.
    pub fn new(options: Options) -> Result<Self> {
        assert!(matches!(options.compute, DType::F32 | DType::BF16), "compute type {}", options.compute);
        let gradients = [DType::F32, options.compute];
        assert!(gradients.contains(&options.gradient), "gradients of {} beside {}", options.gradient, options.compute);
        assert!(matches!(options.moment, DType::F32 | DType::BF16), "moments of {}", options.moment);
        let driver = driver::version()?;
        let properties = driver::properties(options.ordinal)?;
        if properties.capability < driver::OLDEST_GPU {
            let why = format!(
                "GPU {} ({}) has compute capability {}.{}, but 8.0 (Ampere) is needed: use --device cpu",
                options.ordinal,
                properties.name,
                properties.capability / 10,
                properties.capability % 10
            );
            return Err(Error::Device(why));
        }
        let context = Context::new(options.ordinal)?;
        context.bind()?;
        let (road, why) = module::road(properties.capability, driver);
        tracing::debug!("kernels: {road} ({why})");
        let modules = Modules::new(&context, &properties, options.compute, road);
        let allocated = Arc::default();
        let queues = [Queue::new(&context)?, Queue::new(&context)?, Queue::new(&context)?];
        Ok(Self {
            group: OnceLock::new(),
            products: Mutex::new(Products::new(options.autotune.then_some(properties.name.as_str()))?),
            modules,
            workspace: Mutex::default(),
            product_workspace: Memory::new(&context, &allocated, gemm::WORKSPACE)?,
            bounce: Mutex::default(),
            queues,
            events: Arc::default(),
            clock: Clock::default(),
            fault: Mutex::default(),
            allocated,
            context,
            properties,
            options,
        })
    }

    /// What the GPU is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// How it is used.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Elements of the compute type in 16 bytes, which a thread reads and writes at once: kernels' WIDE<real>.
    pub(crate) fn piece(&self) -> usize {
        16 / self.options.compute.size()
    }

    /// Bytes of shared memory that a block can ask for.
    pub(crate) fn shared_limit(&self) -> usize {
        self.properties.shared_limit
    }

    /// Scratch memory for one op, with undefined contents; the next op that asks gets the same. It grows at first uses,
    /// and what it grew out of is kept, since recorded graphs hold its address.
    pub(crate) fn workspace(&self, dtype: DType, len: usize) -> Mut<'_, Self> {
        let mut all = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = len * dtype.size();
        if all.last().is_none_or(|last| last.len() < bytes) {
            match Tensor::new(self, DType::U8, aligned(bytes).next_power_of_two()) {
                Ok(tensor) => all.push(tensor),
                Err(error) => {
                    self.note(Err(error));
                    // Nothing is enqueued any more after a failure, so the address is never used.
                    return Mut { address: Device(0), len, dtype, lifetime: std::marker::PhantomData };
                }
            }
        }
        let address = all.last().expect("pushed above").view().address();
        Mut { address, len, dtype, lifetime: std::marker::PhantomData }
    }

    fn product_workspace(&self) -> u64 {
        self.product_workspace.address.0
    }

    fn products(&self) -> MutexGuard<'_, Products> {
        self.products.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn function(&self, kernel: &'static launch::Kernel) -> Result<cudarc::driver::sys::CUfunction> {
        self.fault()?;
        self.modules.function(kernel)
    }

    fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    fn queue(&self, stream: Stream) -> &Queue {
        &self.queues[stream as usize]
    }

    /// Keeps the first failure.
    fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// The failure that was kept, if any; it stays, since the device's state is unknown after it.
    fn fault(&self) -> Result<()> {
        match &*self.fault.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(Error::Fault(why)) => Err(Error::Fault(why.clone())),
            Some(error) => Err(Error::Device(error.to_string())),
        }
    }
}

/// An address in the GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(pub(super) u64);

impl Device {
    /// Whether so many bytes divide it.
    pub(crate) fn is_multiple_of(self, bytes: usize) -> bool {
        self.0.is_multiple_of(bytes as u64)
    }
}

impl Address for Device {
    fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// One allocation of the GPU's memory.
pub struct Memory {
    address: Device,
    bytes: usize,
    allocated: Arc<AtomicUsize>,
    context: Arc<Context>,
}

impl Memory {
    fn new(context: &Arc<Context>, allocated: &Arc<AtomicUsize>, bytes: usize) -> Result<Self> {
        context.bind()?;
        let bytes = bytes.max(ALIGNMENT);
        let mut address = 0;
        // SAFETY: a plain out-parameter.
        if let Err(error) = cuda!(cuMemAlloc_v2(&mut address, bytes)) {
            let (free, total) = context.memory()?;
            let size = crate::machine::size;
            let why = format!("{error}; {} were asked for, {} of {} are free", size(bytes), size(free), size(total));
            return Err(if matches!(error, Error::Fault(_)) { error } else { Error::Device(why) });
        }
        allocated.fetch_add(bytes, Ordering::Relaxed);
        Ok(Self { address: Device(address), bytes, allocated: allocated.clone(), context: context.clone() })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.allocated.fetch_sub(self.bytes, Ordering::Relaxed);
        // SAFETY: allocated by `new`, freed once; the driver waits for work that uses it.
        let _ = self.context.bind().and_then(|()| cuda!(cuMemFree_v2(self.address.0)));
    }
}

/// Host memory that the GPU copies from and to by itself.
pub struct Pinned {
    start: ptr::NonNull<u8>,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: plain bytes with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.bind()?;
        let mut start = ptr::null_mut();
        // SAFETY: a plain out-parameter.
        cuda!(cuMemHostAlloc(&mut start, bytes.max(1), 0))?;
        let start = ptr::NonNull::new(start.cast::<u8>()).expect("the driver's memory has an address");
        // SAFETY: the driver gave as many bytes.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { start, bytes, context: context.clone() })
    }
}

impl HostBuffer for Pinned {
    fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length and zeroed; borrowed as `self` is. Copies by the device into it are over
        // before it is read: callers synchronise first.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once; the driver waits for copies under way.
        let _ = self.context.bind().and_then(|()| cuda!(cuMemFreeHost(self.start.as_ptr().cast())));
    }
}

/// A pinned buffer, and when the copy from it is over.
type Bounce = (Pinned, Option<Event>);

/// Bytes of each of the two pinned buffers through which mapped files go to the device.
const BOUNCE: usize = 16 << 20;

impl Cuda {
    /// Copies bytes of pageable memory to the device through two pinned buffers: one is filled while the other is
    /// copied. The compute stream goes on behind the last copy.
    fn stream_in(&self, bytes: &[u8], target: Device) -> Result<()> {
        let mut bounce = self.bounce.lock().unwrap_or_else(PoisonError::into_inner);
        if bounce.is_none() {
            *bounce = Some([(self.host(BOUNCE)?, None), (self.host(BOUNCE)?, None)]);
        }
        let buffers = bounce.as_mut().expect("made above");
        let queue = self.queue(Stream::Compute);
        for (i, part) in bytes.chunks(BOUNCE).enumerate() {
            let (buffer, busy) = &mut buffers[i % 2];
            if let Some(event) = busy.take() {
                self.synchronize(&event)?;
            }
            buffer.bytes_mut()[..part.len()].copy_from_slice(part);
            let to = target.offset(i * BOUNCE).0;
            // SAFETY: the target has as many bytes as `bytes`; the buffer is not touched before its event has passed.
            cuda!(cuMemcpyHtoDAsync_v2(to, buffer.start.as_ptr().cast(), part.len(), queue.raw))?;
            *busy = Some(Event::record(&self.events, queue)?);
        }
        Ok(())
    }
}

impl Backend for Cuda {
    type Address = Device;
    type Memory = Memory;
    type Host = Pinned;
    type Event = Event;
    type Graph = Graph;
    const RECORDS: bool = true;

    fn describe(&self) -> String {
        format!("{} (GPU {}), {}", self.properties.name, self.properties.ordinal, self.options.compute)
    }

    fn compute(&self) -> DType {
        self.options.compute
    }

    fn statistics(&self) -> DType {
        DType::F32
    }

    fn gradient(&self) -> DType {
        self.options.gradient
    }

    fn reduction(&self) -> DType {
        DType::F32
    }

    fn master(&self) -> Option<DType> {
        (self.options.compute != DType::F32).then_some(DType::F32)
    }

    fn moment(&self) -> DType {
        self.options.moment
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        self.fault()?;
        let memory = Memory::new(&self.context, &self.allocated, bytes)?;
        let queue = self.queue(Stream::Compute);
        // SAFETY: the allocation has as many bytes.
        cuda!(cuMemsetD8Async(memory.address.0, 0, memory.bytes, queue.raw))?;
        // What the queue holds already may wait for other ranks.
        self.synchronize(&Event::record(&self.events, queue)?)?;
        Ok(memory)
    }

    fn address(&self, memory: &Memory) -> Device {
        memory.address
    }

    fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    fn available(&self) -> Result<usize> {
        // The rest is for what ops and the driver need beside the plan.
        Ok(self.context.memory()?.0 / 16 * 15)
    }

    fn host(&self, bytes: usize) -> Result<Pinned> {
        self.fault()?;
        Pinned::new(&self.context, bytes)
    }

    fn stage<'a>(&'a self, staging: &'a mut Staging<Self>, bytes: &'a [u8], dtype: DType) -> Result<Ref<'a, Self>> {
        if staging.0.as_ref().is_none_or(|tensor| tensor.len() < bytes.len()) {
            // What read the old memory has run once it is freed.
            staging.0 = None;
            staging.0 = Some(Tensor::new(self, DType::U8, bytes.len())?);
        }
        let tensor = staging.0.as_ref().expect("made above");
        self.stream_in(bytes, tensor.view().address())?;
        Ok(Ref { dtype, len: bytes.len() / dtype.size(), ..tensor.view() })
    }

    fn upload(&self, stream: Stream, source: &Pinned, range: Range<usize>, target: Mut<'_, Self>) {
        let from = &source.bytes()[range];
        assert_eq!(from.len(), target.len() * target.dtype().size());
        let queue = self.queue(stream);
        // SAFETY: both sides have as many bytes; the caller leaves the source alone until an event has passed.
        self.note(
            self.bind().and_then(|()| {
                cuda!(cuMemcpyHtoDAsync_v2(target.address.0, from.as_ptr().cast(), from.len(), queue.raw))
            }),
        );
    }

    fn download(&self, stream: Stream, source: Ref<'_, Self>, target: &mut Pinned, at: usize) {
        let bytes = source.len() * source.dtype().size();
        let to = &mut target.bytes_mut()[at..at + bytes];
        let queue = self.queue(stream);
        // SAFETY: both sides have as many bytes; the caller reads the target once an event has passed.
        self.note(
            self.bind()
                .and_then(|()| cuda!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), source.address.0, bytes, queue.raw))),
        );
    }

    fn copy(&self, stream: Stream, source: Ref<'_, Self>, target: Mut<'_, Self>) {
        assert!(source.dtype() == target.dtype() && source.len() == target.len());
        let bytes = source.len() * source.dtype().size();
        let queue = self.queue(stream);
        // SAFETY: both sides have as many bytes and do not overlap, as one of them is borrowed to write.
        self.note(
            self.bind()
                .and_then(|()| cuda!(cuMemcpyDtoDAsync_v2(target.address.0, source.address.0, bytes, queue.raw))),
        );
    }

    fn zero(&self, stream: Stream, target: Mut<'_, Self>) {
        let queue = self.queue(stream);
        let bytes = target.len() * target.dtype().size();
        // SAFETY: the target has as many bytes.
        self.note(self.bind().and_then(|()| cuda!(cuMemsetD8Async(target.address.0, 0, bytes, queue.raw))));
    }

    fn record(&self, stream: Stream) -> Event {
        match Event::record(&self.events, self.queue(stream)) {
            Ok(event) => event,
            Err(error) => {
                self.note(Err(error));
                Event::none(&self.events)
            }
        }
    }

    fn stamp(&self, stream: Stream) -> Option<Stamp> {
        self.clock_stamp(stream)
    }

    fn wait(&self, stream: Stream, event: &Event) {
        self.note(event.hold(self.queue(stream)));
    }

    fn synchronize(&self, event: &Event) -> Result<()> {
        self.fault()?;
        match self.group.get() {
            // What other ranks have a part in may never come.
            Some(group) => {
                self.note(group.wait(event));
                self.fault()
            }
            None => event.synchronize(&self.context),
        }
    }

    fn tuning(&self) -> Option<String> {
        self.products().tuning()
    }

    fn tune(&self, text: &str) -> bool {
        self.products().tune(text)
    }

    fn measure(&self) -> Result<()> {
        self.measure_products()
    }

    fn begin(&self, graph: &mut Graph) -> Result<bool> {
        self.fault()?;
        self.begin_graph(graph)
    }

    fn end(&self, graph: &mut Graph, worked: Result<()>) -> Result<()> {
        self.end_graph(graph, worked)
    }

    fn connect(&self, tree: Tree) -> Result<Box<dyn Comm<Self>>> {
        self.products().wait();
        Ok(Box::new(Nccl::new(self, tree)?))
    }
}
