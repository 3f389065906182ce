//! The driver's calls that we make, with their status turned into words. cudarc looks symbols up by name at their first
//! use and panics at a missing one, so the driver's presence and version are checked before.
#![allow(unsafe_code, reason = "calls the CUDA driver")]

use super::library;
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::{
    cell::Cell,
    ffi::{CStr, c_char, c_int},
    ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// The oldest driver that is supported: 12.4 (r550), the first that tells a kernel's parameters.
pub const OLDEST_DRIVER: i32 = 12_040;
/// The oldest GPU that is supported: bf16 tensor cores and asynchronous copies came with Ampere.
pub const OLDEST_GPU: u32 = 80;

/// A call's status as an error, which names the call. A GPU's fault is told from a refusal.
pub(super) fn check(status: CUresult, call: &str) -> Result<()> {
    use CUresult as R;
    match status {
        R::CUDA_SUCCESS => Ok(()),
        R::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::Device(format!(
            "out of GPU memory in {call}: use a smaller batch.size, recompute = \"block\", or a smaller model"
        ))),
        R::CUDA_ERROR_NO_DEVICE => {
            Err(Error::Device("no NVIDIA GPU is visible: see `nvidia-smi` and CUDA_VISIBLE_DEVICES".into()))
        }
        status => {
            let why = format!("{call}: {} ({}, code {})", words(status), name(status), status as u32);
            let hint = "; the GPU cannot be used any more by this process: resume from the last checkpoint";
            Err(if is_fault(status) { Error::Fault(why + hint) } else { Error::Device(why) })
        }
    }
}

/// Whether the context is lost after this status (illegal address, assert, hardware errors).
fn is_fault(status: CUresult) -> bool {
    (700..=722).contains(&(status as u32)) || matches!(status as u32, 214 | 220 | 226 | 999)
}

fn name(status: CUresult) -> String {
    let mut text: *const c_char = ptr::null();
    // SAFETY: the driver writes a pointer to a string that lives as long as the process, or leaves null.
    unsafe { sys::cuGetErrorName(status, &mut text) };
    read(text)
}

fn words(status: CUresult) -> String {
    let mut text: *const c_char = ptr::null();
    // SAFETY: as in `name`.
    unsafe { sys::cuGetErrorString(status, &mut text) };
    read(text)
}

fn read(text: *const c_char) -> String {
    if text.is_null() {
        return "an unknown error".into();
    }
    // SAFETY: a string of the driver's, terminated, constant.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Calls a driver function and turns its status into a `Result`; the caller argues the call's safety.
macro_rules! cuda {
    ($call:ident ( $($argument:expr),* $(,)? )) => {
        // SAFETY: argued at each use.
        $crate::backend::cuda::driver::check(
            unsafe { cudarc::driver::sys::$call($($argument),*) },
            stringify!($call),
        )
    };
}
pub(super) use cuda;

/// The driver's version, for example 13000; an error that says what to do where it is absent or too old.
pub fn version() -> Result<i32> {
    library::require(library::DRIVER)?;
    // SAFETY: the driver was found; plain out-parameters.
    cuda!(cuInit(0))?;
    let mut version = 0;
    // SAFETY: as above.
    cuda!(cuDriverGetVersion(&mut version))?;
    if version < OLDEST_DRIVER {
        let why = format!(
            "the NVIDIA driver knows CUDA {}, but {} is needed: install driver 550 or newer, or use --device cpu",
            dotted(version),
            dotted(OLDEST_DRIVER)
        );
        return Err(Error::Device(why));
    }
    Ok(version)
}

/// 13000 as `13.0`.
pub fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// How many GPUs this process may use.
pub fn devices() -> Result<u32> {
    version()?;
    let mut count = 0;
    // SAFETY: a plain out-parameter.
    cuda!(cuDeviceGetCount(&mut count))?;
    Ok(count as u32)
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Properties {
    /// Its number among the visible ones.
    pub ordinal: u32,
    /// `NVIDIA H200`
    pub name: String,
    /// Compute capability times ten: 90 for 9.0.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can ask for.
    pub shared_limit: usize,
    /// Bytes of level-2 cache.
    pub cache: usize,
    /// Bytes of memory.
    pub memory: usize,
}

/// Reads what a GPU is, without taking hold of it.
pub fn properties(ordinal: u32) -> Result<Properties> {
    use sys::CUdevice_attribute_enum as A;
    let count = devices()?;
    if ordinal >= count {
        let why = format!("GPU {ordinal} was asked for, but {count} are visible (CUDA_VISIBLE_DEVICES, nvidia-smi)");
        return Err(Error::Device(why));
    }
    let mut device = 0;
    // SAFETY: plain out-parameters; the ordinal was checked.
    cuda!(cuDeviceGet(&mut device, ordinal as c_int))?;
    let attribute = |which| {
        let mut value = 0;
        // SAFETY: a plain out-parameter, and a device that exists.
        cuda!(cuDeviceGetAttribute(&mut value, which, device)).map(|()| value as u32)
    };
    let mut name = [0u8; 256];
    // SAFETY: the driver writes at most 256 bytes, terminated, into the buffer.
    cuda!(cuDeviceGetName(name.as_mut_ptr().cast(), 256, device))?;
    let mut memory = 0;
    // SAFETY: a plain out-parameter.
    cuda!(cuDeviceTotalMem_v2(&mut memory, device))?;
    let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let text = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(Properties {
        ordinal,
        name: text.to_string_lossy().into_owned(),
        capability: 10 * major + minor,
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_limit: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        cache: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        memory,
    })
}

/// What tells a GPU (or a part of one that is used as one) from all others, on any host.
pub fn uuid(ordinal: u32) -> Result<[u8; 16]> {
    let mut device = 0;
    // SAFETY: a plain out-parameter; the driver refuses an ordinal that is none.
    cuda!(cuDeviceGet(&mut device, ordinal as c_int))?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: a plain out-parameter, and a device that exists.
    cuda!(cuDeviceGetUuid_v2(&mut uuid, device))?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

thread_local! {
    /// The context that this thread uses, as an address.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The primary context of a GPU; all calls of a thread go to the one that is current.
#[derive(Debug)]
pub(super) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
}

// SAFETY: a context may be used from any thread; `bind` makes it the calling thread's own before each call.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks inside.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn new(ordinal: u32) -> Result<Arc<Self>> {
        let (mut device, mut raw) = (0, ptr::null_mut());
        // SAFETY: plain out-parameters; the ordinal was checked by `properties`.
        cuda!(cuDeviceGet(&mut device, ordinal as c_int))?;
        // SAFETY: as above.
        cuda!(cuDevicePrimaryCtxRetain(&mut raw, device))?;
        Ok(Arc::new(Self { raw, device }))
    }

    /// Makes this the calling thread's context.
    pub(super) fn bind(&self) -> Result<()> {
        if CURRENT.get() == self.raw as usize {
            return Ok(());
        }
        // SAFETY: a context that this value keeps alive.
        cuda!(cuCtxSetCurrent(self.raw))?;
        CURRENT.set(self.raw as usize);
        Ok(())
    }

    /// Free and total bytes of memory.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: plain out-parameters.
        cuda!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free, total))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        CURRENT.set(0);
        // SAFETY: retained once by `new`. A failure at the end of a process changes nothing.
        let _ = cuda!(cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

/// A queue of work.
pub(super) struct Queue {
    pub(super) raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Queue {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a plain out-parameter.
        cuda!(cuStreamCreate(&mut raw, flags))?;
        Ok(Self { raw, context: context.clone() })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: created by `new`, not used any more; work under way finishes first.
        let _ = self.context.bind().and_then(|()| cuda!(cuStreamDestroy_v2(self.raw)));
    }
}

/// Events that wait to be used again: a step makes some, and creating one costs more than recording it.
#[derive(Default)]
pub(super) struct EventPool {
    spare: Mutex<Vec<usize>>,
    /// Whether they tell times, which makes recording them dearer.
    timed: bool,
}

impl EventPool {
    /// Of events that tell times.
    pub(super) fn timed() -> Self {
        Self { spare: Mutex::default(), timed: true }
    }
}

/// `cuEventElapsedTime`.
type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;

/// Every driver has it; the binding knows only its successor, of CUDA 12.8.
fn elapsed_time() -> Result<ElapsedTime> {
    static FOUND: OnceLock<ElapsedTime> = OnceLock::new();
    if let Some(&found) = FOUND.get() {
        return Ok(found);
    }
    let library = library::load(library::DRIVER)?;
    let missing = |e| Error::Device(format!("cuEventElapsedTime is missing: {e}"));
    // SAFETY: the type is that of the driver's function of this name; the driver stays open.
    let found = *unsafe { library.get::<ElapsedTime>(b"cuEventElapsedTime\0") }.map_err(missing)?;
    Ok(*FOUND.get_or_init(|| found))
}

/// A point in a queue.
pub struct Event {
    raw: sys::CUevent,
    pool: Arc<EventPool>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above; recording takes a new one.
unsafe impl Sync for Event {}

impl Event {
    /// Marks the present end of a queue.
    pub(super) fn record(pool: &Arc<EventPool>, queue: &Queue) -> Result<Self> {
        queue.context.bind()?;
        let spare = pool.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut raw = spare.map_or(ptr::null_mut(), |address| address as sys::CUevent);
        if raw.is_null() {
            let flags = if pool.timed { 0 } else { sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32 };
            // SAFETY: a plain out-parameter.
            cuda!(cuEventCreate(&mut raw, flags))?;
        }
        let event = Self { raw, pool: pool.clone() };
        // SAFETY: a live event and a live stream of the same context.
        cuda!(cuEventRecord(event.raw, queue.raw))?;
        Ok(event)
    }

    /// A point that never comes, in place of one that could not be marked: the failure is told before it is waited for.
    pub(super) fn none(pool: &Arc<EventPool>) -> Self {
        Self { raw: ptr::null_mut(), pool: pool.clone() }
    }

    /// Lets what is enqueued from now on wait for this point.
    pub(super) fn hold(&self, queue: &Queue) -> Result<()> {
        queue.context.bind()?;
        // SAFETY: a live event and a live stream.
        cuda!(cuStreamWaitEvent(queue.raw, self.raw, 0))
    }

    /// Seconds from an earlier point to this one; both are timed, and have passed.
    pub(super) fn seconds_since(&self, earlier: &Self, context: &Context) -> Result<f64> {
        let (elapsed, mut milliseconds) = (elapsed_time()?, 0.0);
        context.bind()?;
        // SAFETY: live events; a plain out-parameter.
        check(unsafe { elapsed(&mut milliseconds, earlier.raw, self.raw) }, "cuEventElapsedTime")?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Whether this point has passed.
    pub(super) fn passed(&self, context: &Context) -> Result<bool> {
        context.bind()?;
        // SAFETY: a live event.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => check(status, "cuEventQuery").map(|()| true),
        }
    }

    /// Blocks the host until this point has passed.
    pub(super) fn synchronize(&self, context: &Context) -> Result<()> {
        context.bind()?;
        // SAFETY: a live event.
        cuda!(cuEventSynchronize(self.raw))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            self.pool.spare.lock().unwrap_or_else(PoisonError::into_inner).push(self.raw as usize);
        }
    }
}
