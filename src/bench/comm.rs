//! Gigabytes a second of what ranks do together, by the definitions of nccl-tests (doc/PERFORMANCE.md there): the
//! algorithm's bandwidth is the bytes of a rank's values over the time; the bus bandwidth is that times the share of
//! them that has to cross a rank's link, 2(n−1)/n for an all-reduce of n ranks, so that it compares with the hardware.

use crate::{
    DType, Error, Result,
    backend::{Backend, HostBuffer, Stream, Tensor},
    comm::{Comm, environment::Master},
    config::Device,
    model::float_tensor,
    ops::Ops,
    run::{Place, Ranks, Work},
};
use std::time::{Duration, Instant};

/// Calls before the clock runs: the first ones open connections and touch memory.
const WARM_UP: usize = 3;
/// From one size to the next.
const GROWTH: usize = 4;
/// Longest wait for ranks that have to start.
const MEETING: Duration = Duration::from_secs(120);

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct CommBench {
    /// Bytes of a rank's values, at least.
    pub smallest: usize,
    /// Bytes of a rank's values, at most.
    pub largest: usize,
    /// Calls that are timed at each size.
    pub calls: usize,
}

/// What was measured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CommSpeed {
    /// Rank 0's device in words.
    pub device: String,
    /// What carries the values: `nccl` or `tcp`; `nothing` for a process that no launcher started.
    pub over: &'static str,
    /// Ranks.
    pub ranks: usize,
    /// Ranks on rank 0's host.
    pub ranks_on_host: usize,
    /// Type of the values.
    pub dtype: String,
    /// Calls that were timed at each size.
    pub calls: usize,
    /// By size.
    pub sizes: Vec<SizeSpeed>,
}

/// What was measured at one size.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SizeSpeed {
    /// `all-reduce`.
    pub operation: &'static str,
    /// Bytes of a rank's values.
    pub bytes: usize,
    /// Mean milliseconds of a call, on the slowest rank.
    pub ms: f64,
    /// Bytes over the time, in 10⁹ a second.
    pub algorithm_gb_per_second: f64,
    /// The part of it that crosses a rank's link.
    pub bus_gb_per_second: f64,
}

/// Measures with the other ranks of this process's run. None on all ranks but the first.
///
/// # Errors
/// Those of meeting the others; a sum that is wrong.
pub fn comm(place: Place, bench: CommBench) -> Result<Option<CommSpeed>> {
    if bench.smallest < 8 || bench.smallest > bench.largest {
        let why = format!("must be from 8 to --largest = {} bytes", bench.largest);
        return Err(Error::config("--smallest", bench.smallest, why));
    }
    let ranks = Ranks::join(MEETING)?;
    let rank = ranks.world.rank;
    let speed = match place.among(&ranks.world) {
        Ok(place) => {
            let over = match place.device {
                _ if ranks.world.master == Master::Alone => "nothing",
                Device::Cuda => "nccl",
                _ => "tcp",
            };
            place.run(Measuring { bench, ranks, over })
        }
        Err(error) => Err(ranks.refuse(error)),
    };
    Ok(Some(speed?).filter(|_| rank == 0))
}

struct Measuring {
    bench: CommBench,
    ranks: Ranks,
    over: &'static str,
}

impl Work for Measuring {
    type Output = CommSpeed;

    fn on<B: Ops>(self, backend: B) -> Result<CommSpeed> {
        let Self { bench, ranks, over } = self;
        let world = ranks.world.clone();
        let comm = ranks.comm(&backend)?;
        let sizes = std::iter::successors(Some(bench.smallest), |bytes| bytes.checked_mul(GROWTH));
        let measured: Result<Vec<_>> = sizes
            .take_while(|bytes| *bytes <= bench.largest)
            .map(|bytes| all_reduce(&backend, &*comm, bytes, bench.calls))
            .collect();
        if let Err(error) = &measured {
            comm.leave(&format!("rank {} ended: {error}", world.rank));
        }
        Ok(CommSpeed {
            device: backend.describe(),
            over,
            ranks: world.world,
            ranks_on_host: world.local_world,
            dtype: backend.reduction().to_string(),
            calls: bench.calls,
            sizes: measured?,
        })
    }

    fn refused(self, error: Error) -> Error {
        self.ranks.refuse(error)
    }
}

/// Checks a sum of this many bytes, and times it.
fn all_reduce<B: Ops>(backend: &B, comm: &dyn Comm<B>, bytes: usize, calls: usize) -> Result<SizeSpeed> {
    let (dtype, world) = (backend.reduction(), comm.world());
    let len = bytes / dtype.size();
    let mut values = float_tensor(backend, dtype, &vec![(comm.rank() + 1) as f64; len])?;
    comm.all_reduce(backend, Stream::Compute, values.view_mut())?;
    check(backend, &values, (world * (world + 1) / 2) as f64)?;
    // Zeros, as sums of sums would grow without end.
    backend.zero(Stream::Compute, values.view_mut());
    let mut run = |count: usize| -> Result<f64> {
        // All begin together.
        backend.synchronize(&backend.record(Stream::Compute))?;
        comm.exchange(&[])?;
        let start = Instant::now();
        (0..count).try_for_each(|_| comm.all_reduce(backend, Stream::Compute, values.view_mut()))?;
        backend.synchronize(&backend.record(Stream::Compute))?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    };
    run(WARM_UP)?;
    let mine = run(calls)?;
    let all = comm.exchange(&mine.to_le_bytes())?;
    let seconds = all.iter().filter_map(|bytes| Some(f64::from_le_bytes(bytes[..].try_into().ok()?)));
    let seconds = seconds.fold(0.0, f64::max);
    let speed = bytes as f64 / seconds / 1e9;
    Ok(SizeSpeed {
        operation: "all-reduce",
        bytes,
        ms: seconds * 1e3,
        algorithm_gb_per_second: speed,
        bus_gb_per_second: speed * 2.0 * (world - 1) as f64 / world as f64,
    })
}

/// Every value is what it should be.
fn check<B: Backend>(backend: &B, values: &Tensor<B>, wanted: f64) -> Result<()> {
    let size = values.dtype().size();
    let mut host = backend.host(values.len() * size)?;
    backend.download(Stream::Compute, values.view(), &mut host, 0);
    backend.synchronize(&backend.record(Stream::Compute))?;
    let mut found = vec![0; values.len() * 8];
    crate::dtype::convert(host.bytes(), values.dtype(), &mut found, DType::F64);
    let found = bytemuck::pod_collect_to_vec::<u8, f64>(&found);
    match found.iter().position(|value| *value != wanted) {
        None => Ok(()),
        Some(at) => {
            let why = format!("value {at} of a sum over ranks is {}, not {wanted}", found[at]);
            Err(Error::Fault(format!("{why}: the network, a GPU, or NCCL is broken")))
        }
    }
}
