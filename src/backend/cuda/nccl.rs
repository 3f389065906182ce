//! Sums and copies between GPUs by NCCL; what their hosts have to say to each other goes over TCP.
//!
//! NCCL's twelve functions are declared here: cudarc's binding opens `libnccl.so` only, which the packages that people have
//! (`libnccl.so.2`) do not bring. The communicator is non-blocking, so that no call waits for a rank that is lost, and
//! the host waits for no result without looking, beside it, for errors: those of NCCL, those of the hosts' connections
//! (a rank that is gone leaves NCCL's kernels within a host spinning, without an error), and the time.
//!
//! Source of declarations and constants: NCCL's user guide, "API", 2.18.
#![allow(unsafe_code, reason = "calls NCCL")]

use super::{
    Cuda,
    driver::{self, Context, Event},
    library,
};
use crate::{
    DType, Error, Result,
    backend::{Backend, Mut, Stream},
    comm::{
        Collective, Comm, Ticket, settle,
        tcp::{Tcp, Tree},
    },
    machine,
    trace::Lane,
};
use std::{
    env,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    mem, ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTE: c_int = 1;
/// `ncclFloat32`.
const F32: c_int = 7;
/// `ncclFloat64`.
const F64: c_int = 8;
/// `ncclBfloat16`.
const BF16: c_int = 9;
/// `ncclSum`.
const SUM: c_int = 0;

/// The oldest version that is supported, as it writes it: 2.18.
const OLDEST: c_int = 21_800;

/// How long a host that waits sleeps, and how often it looks for errors.
const PAUSE: Duration = Duration::from_micros(50);
const LOOK: Duration = Duration::from_millis(20);
/// Time for the hosts to find the rank whose loss NCCL has noticed.
const NAMING: Duration = Duration::from_secs(3);
/// Time for an abort, and for a regular end.
const ENDING: Duration = Duration::from_secs(10);

type Handle = *mut c_void;
type Id = [u8; 128];

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
struct UniqueId(Id);

/// `ncclConfig_t` as of [`OLDEST`]; newer versions know it by its size and version.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cluster: c_int,
    least_blocks: c_int,
    most_blocks: c_int,
    network: *const c_char,
    share: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER`, but non-blocking.
    fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: mem::size_of::<Self>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            cluster: UNDEFINED,
            least_blocks: UNDEFINED,
            most_blocks: UNDEFINED,
            network: ptr::null(),
            share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($field:ident = $name:ident ($($type:ty),*) -> $result:ty;)*) => {
        /// NCCL's functions.
        #[derive(Clone, Copy)]
        struct Api {
            $($field: unsafe extern "C" fn($($type),*) -> $result),*
        }

        impl Api {
            fn load() -> Result<Self> {
                let library = library::load(library::NCCL)?;
                Ok(Self {
                    // SAFETY: the type is that of NCCL's function of this name; the library stays open.
                    $($field: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }
                        .map_err(|e| Error::Device(format!("NCCL is older than 2.18, or not whole: {e}")))?),*
                })
            }
        }
    };
}

functions! {
    version = ncclGetVersion(*mut c_int) -> c_int;
    unique_id = ncclGetUniqueId(*mut UniqueId) -> c_int;
    init = ncclCommInitRankConfig(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
    state = ncclCommGetAsyncError(Handle, *mut c_int) -> c_int;
    last_error = ncclGetLastError(Handle) -> *const c_char;
    words = ncclGetErrorString(c_int) -> *const c_char;
    all_reduce = ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    reduce = ncclReduce(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Handle, *mut c_void) -> c_int;
    broadcast = ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    finalize = ncclCommFinalize(Handle) -> c_int;
    destroy = ncclCommDestroy(Handle) -> c_int;
    abort = ncclCommAbort(Handle) -> c_int;
}

impl Api {
    /// Of a call without a communicator.
    fn check(&self, status: c_int) -> Result<()> {
        let why = || Error::Device(format!("NCCL cannot start: {}", self.explain(ptr::null_mut(), status)));
        if status == SUCCESS { Ok(()) } else { Err(why()) }
    }

    /// The version as NCCL writes it.
    fn number(&self) -> Result<c_int> {
        let mut version = 0;
        // SAFETY: a plain out-parameter.
        self.check(unsafe { (self.version)(&mut version) })?;
        Ok(version)
    }

    /// What NCCL has to say of a failure.
    fn explain(&self, handle: Handle, status: c_int) -> String {
        let read = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: NCCL's strings are terminated, and live until its next call.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string(),
        };
        // SAFETY: both take anything, and give a string or null.
        let (words, more) = unsafe { (read((self.words)(status)), read((self.last_error)(handle))) };
        let hint = "NCCL_DEBUG=WARN tells more";
        if more.is_empty() { format!("{words} ({hint})") } else { format!("{words}: {more} ({hint})") }
    }
}

/// What a rank tells the others before they join: its GPU, its NCCL, and rank 0's id.
const CARD: usize = 16 + 4 + 128;

fn card(cuda: &Cuda, rank: usize) -> Result<(Api, Vec<u8>)> {
    let api = Api::load()?;
    let version = api.number()?;
    if version < OLDEST {
        return Err(Error::Device(format!("NCCL {} is too old: 2.18 or newer is needed", dotted(version))));
    }
    let mut id = UniqueId([0; 128]);
    if rank == 0 {
        // SAFETY: a plain out-parameter.
        api.check(unsafe { (api.unique_id)(&mut id) })?;
    }
    let gpu = driver::uuid(cuda.properties.ordinal)?;
    Ok((api, [&gpu[..], &version.to_le_bytes(), &id.0].concat()))
}

/// Makes sure that the ranks' cards go together; gives the id of rank 0. `sharing`: several ranks may have one GPU.
fn compare(cards: &[Vec<u8>], sharing: bool) -> Result<Id> {
    let version = |card: &[u8]| dotted(card[16..20].try_into().map_or(0, c_int::from_le_bytes));
    for (rank, card) in cards.iter().enumerate() {
        if card.len() != CARD {
            return Err(Error::Usage(format!("rank {rank} tells nonsense of its GPU: do all run one version?")));
        }
        if card[16..20] != cards[0][16..20] {
            let (first, other) = (version(&cards[0]), version(card));
            let why = format!("rank {rank} has NCCL {other}, rank 0 has {first}: install the same on all hosts");
            return Err(Error::Usage(why));
        }
        let twin = cards[..rank].iter().position(|other| other[..16] == card[..16]);
        if let Some(twin) = twin.filter(|_| !sharing) {
            return Err(Error::Usage(format!(
                "ranks {twin} and {rank} have the same GPU: start one process for each GPU of a host, and show each its \
                 own (CUDA_VISIBLE_DEVICES) or all"
            )));
        }
    }
    Ok(cards[0][20..].try_into().unwrap_or([0; 128]))
}

/// NCCL's version, for example `2.27.3`.
pub fn version() -> Result<String> {
    Ok(dotted(Api::load()?.number()?))
}

/// 22703 as `2.27.3`.
fn dotted(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// NCCL's communicator of a GPU.
pub(super) struct Group {
    api: Api,
    handle: Handle,
    rank: usize,
    hosts: Arc<Tcp<Cuda>>,
    timeout: Duration,
    context: Arc<Context>,
    aborted: AtomicBool,
}

// SAFETY: a communicator may be used from any thread, by one at a time; see below.
unsafe impl Send for Group {}
// SAFETY: sums are begun by the one thread that trains; NCCL allows asking for its state, and to abort, beside them.
unsafe impl Sync for Group {}

impl Group {
    fn join(cuda: &Cuda, hosts: Arc<Tcp<Cuda>>, timeout: Duration) -> Result<Self> {
        let (rank, world) = (hosts.rank(), hosts.world());
        let mut exchange = |mine: &[u8]| hosts.exchange(mine);
        let (api, mine) = settle(rank, card(cuda, rank), &mut exchange)?;
        let sharing = ["NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_HOSTID"].iter().any(|name| env::var_os(name).is_some());
        let id = compare(&exchange(&mine)?, sharing);
        let id = settle(rank, id, &mut exchange)?;
        cuda.bind()?;
        let (mut handle, mut config) = (ptr::null_mut(), Config::non_blocking());
        // SAFETY: plain out-parameters; the GPU's context is current.
        let status = unsafe { (api.init)(&mut handle, world as c_int, UniqueId(id), rank as c_int, &mut config) };
        let group = Self {
            api,
            handle,
            rank,
            hosts: hosts.clone(),
            timeout,
            context: cuda.context.clone(),
            aborted: AtomicBool::new(false),
        };
        let joined = group.checked(status, "NCCL to connect the GPUs");
        if let Err(error) = &joined {
            hosts.leave(&format!("rank {rank} ended: {error}"));
        }
        joined.map(|()| group)
    }

    /// Waits until a call that was begun is enqueued.
    fn checked(&self, status: c_int, what: &str) -> Result<()> {
        match status {
            SUCCESS | IN_PROGRESS if !self.handle.is_null() => self.until(what, || Ok(self.state() == SUCCESS)),
            status => Err(Error::Fault(format!("rank {} waits for {what}: {}", self.rank, self.explain(status)))),
        }
    }

    fn explain(&self, status: c_int) -> String {
        self.api.explain(self.handle, status)
    }

    fn state(&self) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: a live communicator, a plain out-parameter.
        let asked = unsafe { (self.api.state)(self.handle, &mut state) };
        if asked == SUCCESS { state } else { asked }
    }

    /// Enqueues a collective on the communication stream.
    fn enqueue(&self, cuda: &Cuda, what: Collective, values: &Mut<'_, Cuda>) -> Result<()> {
        let dtype = || match values.dtype() {
            DType::BF16 => BF16,
            DType::F32 => F32,
            DType::F64 => F64,
            other => panic!("sums over ranks of {other}"),
        };
        cuda.bind()?;
        let Api { all_reduce, reduce, broadcast, .. } = self.api;
        let (handle, len, bytes) = (self.handle, values.len(), values.len() * values.dtype().size());
        let (at, stream) = (values.address().0 as *mut c_void, cuda.queue(Stream::Communication).raw.cast());
        // SAFETY: memory of the current GPU with as many values, in place, as NCCL allows; all on a live stream.
        let status = unsafe {
            match what {
                Collective::Sum => all_reduce(at, at, len, dtype(), SUM, handle, stream),
                Collective::SumTo(rank) => reduce(at, at, len, dtype(), SUM, rank as c_int, handle, stream),
                Collective::CopyFrom(rank) => broadcast(at, at, bytes, BYTE, rank as c_int, handle, stream),
            }
        };
        self.checked(status, "a sum over ranks, or a copy from one, to begin")
    }

    /// Blocks the host until `event` has passed, or cannot pass any more.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        self.until("what the GPU computes", || event.passed(&self.context))
    }

    /// Waits for something as long as all ranks go on, for at most the timeout.
    fn until(&self, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        let mut looked = start;
        while !done()? {
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                if let Some(cause) = self.failure(start, what) {
                    self.abort();
                    return Err(Error::Fault(cause));
                }
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Why there is no use in waiting any more.
    fn failure(&self, start: Instant, what: &str) -> Option<String> {
        let state = self.state();
        if state != SUCCESS && state != IN_PROGRESS {
            // The hosts know the name of who is lost, a little later perhaps.
            let noticed = Instant::now();
            while self.hosts.lost().is_none() && noticed.elapsed() < NAMING {
                thread::sleep(LOOK);
            }
            let ours = || format!("rank {} waits for {what}: {}", self.rank, self.explain(state));
            return Some(self.hosts.lost().unwrap_or_else(ours));
        }
        if let Some(cause) = self.hosts.lost() {
            return Some(cause);
        }
        (start.elapsed() >= self.timeout).then(|| {
            let seconds = self.timeout.as_secs_f64();
            format!("rank {} waits for {what} since {seconds:.0} s (comm.timeout): a rank or its GPU hangs", self.rank)
        })
    }

    /// Stops what NCCL does on the GPU. On a thread, as this may itself hang.
    fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        let (abort, address) = (self.api.abort, self.handle as usize);
        let (done, ended) = mpsc::channel();
        let thread = thread::Builder::new().name("abort".into()).spawn(move || {
            // SAFETY: a communicator that is not used after this: its backend has failed for good.
            unsafe { abort(address as Handle) };
            let _ = done.send(());
        });
        if thread.is_ok() {
            let _ = ended.recv_timeout(ENDING);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Without the others it cannot end regularly, but with the process.
        let alone = self.aborted.load(Ordering::Relaxed) || self.hosts.lost().is_some();
        if alone || self.handle.is_null() || self.context.bind().is_err() {
            return;
        }
        // SAFETY: a live communicator, which nobody uses any more.
        let mut status = unsafe { (self.api.finalize)(self.handle) };
        let start = Instant::now();
        while status == IN_PROGRESS && start.elapsed() < ENDING {
            thread::sleep(PAUSE);
            status = self.state();
        }
        if status == SUCCESS {
            // SAFETY: as above.
            unsafe { (self.api.destroy)(self.handle) };
        }
    }
}

/// One rank's GPU among those that NCCL connects.
pub(super) struct Nccl {
    hosts: Arc<Tcp<Cuda>>,
}

impl Nccl {
    pub(super) fn new(cuda: &Cuda, tree: Tree) -> Result<Self> {
        let timeout = tree.timeout();
        let hosts = Arc::new(Tcp::new(tree)?);
        let group = Group::join(cuda, hosts.clone(), timeout)?;
        assert!(cuda.group.set(group).is_ok(), "a GPU joins one group");
        Ok(Self { hosts })
    }
}

/// Lets a stream wait for what another has been given so far.
fn follow(cuda: &Cuda, behind: Stream, stream: Stream) {
    if behind != stream {
        cuda.wait(stream, &cuda.record(behind));
    }
}

impl Comm<Cuda> for Nccl {
    fn rank(&self) -> usize {
        self.hosts.rank()
    }

    fn world(&self) -> usize {
        self.hosts.world()
    }

    /// Sums are of bf16, f32 or f64, in NCCL's own order, which depends on the number of ranks and on how they are
    /// connected; each addition rounds to the type.
    fn begin(&self, cuda: &Cuda, stream: Stream, what: Collective, values: Mut<'_, Cuda>) -> Result<Ticket<Cuda>> {
        follow(cuda, stream, Stream::Communication);
        cuda.fault()?;
        let group = cuda.group.get().expect("joined by `new`");
        let bytes = values.len() * values.dtype().size();
        let _span = cuda.span(
            Stream::Communication,
            Lane::Communication,
            format_args!("{} of {}", what.name(), machine::size(bytes)),
        );
        group.enqueue(cuda, what, &values)?;
        // Whoever waits for these values does not wait for what is begun after them.
        Ok(Ticket::Event(cuda.record(Stream::Communication)))
    }

    fn finish(&self, cuda: &Cuda, stream: Stream, ticket: Ticket<Cuda>, _: Mut<'_, Cuda>) -> Result<()> {
        if let (Ticket::Event(event), true) = (ticket, stream != Stream::Communication) {
            cuda.wait(stream, &event);
        }
        Ok(())
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.hosts.exchange(mine)
    }

    fn leave(&self, cause: &str) {
        self.hosts.leave(cause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(gpu: u8, version: c_int, id: u8) -> Vec<u8> {
        [&[gpu; 16][..], &version.to_le_bytes(), &[id; 128]].concat()
    }

    #[test]
    fn cards_that_do_not_go_together_are_told() {
        let [a, b] = [card(1, 22_703, 7), card(2, 22_703, 0)];
        assert_eq!(compare(&[a.clone(), b.clone()], false).unwrap(), [7; 128]);
        let said = |cards: &[Vec<u8>]| compare(cards, false).unwrap_err().to_string();
        let old = said(&[a.clone(), b.clone(), card(3, 21_805, 0)]);
        assert!(old.contains("rank 2 has NCCL 2.18.5, rank 0 has 2.27.3"), "{old}");
        let twins = [a, b.clone(), b];
        assert!(said(&twins).contains("ranks 1 and 2 have the same GPU"), "{}", said(&twins));
        assert!(compare(&twins, true).is_ok());
        assert!(said(&[vec![0; 3]]).contains("rank 0 tells nonsense"));
    }
}
