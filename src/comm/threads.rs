//! Ranks as threads of one process: the reference for every other communicator.

use super::{Collective, Comm, Ticket, halves};
use crate::{
    DType, Result,
    backend::{Backend, HostBuffer, Mut, Stream},
};
use std::sync::{Arc, Barrier, Mutex, PoisonError};

/// What the ranks share.
struct Shared {
    barrier: Barrier,
    posts: Vec<Mutex<Vec<f64>>>,
    notes: Vec<Mutex<Vec<u8>>>,
}

/// One rank of a group of threads.
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

impl Threads {
    /// A group of ranks, one for each thread.
    pub fn group(world: usize) -> Vec<Self> {
        let posts = (0..world).map(|_| Mutex::default()).collect();
        let notes = (0..world).map(|_| Mutex::default()).collect();
        let shared = Arc::new(Shared { barrier: Barrier::new(world), posts, notes });
        (0..world).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    /// Every rank's bytes.
    fn post(&self, mine: &[u8]) -> Vec<Vec<u8>> {
        let note = |rank: usize| self.shared.notes[rank].lock().unwrap_or_else(PoisonError::into_inner);
        *note(self.rank) = mine.to_vec();
        self.shared.barrier.wait();
        let all = (0..self.shared.notes.len()).map(|rank| note(rank).clone()).collect();
        // Nobody posts again before all have read.
        self.shared.barrier.wait();
        all
    }

    /// Every rank's values added up in tree order.
    fn sum(&self, values: Vec<f64>) -> Vec<f64> {
        let read = |rank: usize| self.shared.posts[rank].lock().unwrap_or_else(PoisonError::into_inner).clone();
        *self.shared.posts[self.rank].lock().unwrap_or_else(PoisonError::into_inner) = values;
        self.shared.barrier.wait();
        let mut stack: Vec<Vec<f64>> = Vec::new();
        for (rank, merges) in halves(self.shared.posts.len()).into_iter().enumerate() {
            stack.push(read(rank));
            for _ in 0..merges {
                let right = stack.pop().unwrap_or_default();
                if let Some(left) = stack.last_mut() {
                    left.iter_mut().zip(right).for_each(|(l, r)| *l += r);
                }
            }
        }
        self.shared.barrier.wait();
        stack.pop().unwrap_or_default()
    }
}

impl<B: Backend> Comm<B> for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.posts.len()
    }

    fn begin(&self, backend: &B, stream: Stream, what: Collective, values: Mut<'_, B>) -> Result<Ticket<B>> {
        let bytes = values.len() * values.dtype().size();
        let mut host = backend.host(bytes)?;
        backend.download(stream, values.as_ref(), &mut host, 0);
        backend.synchronize(&backend.record(stream))?;
        match what {
            Collective::CopyFrom(rank) => {
                let all = self.post(host.bytes());
                host.bytes_mut().copy_from_slice(&all[rank]);
            }
            Collective::Sum | Collective::SumTo(_) => {
                assert_eq!(values.dtype(), DType::F64);
                let sum = self.sum(bytemuck::pod_collect_to_vec(host.bytes()));
                host.bytes_mut().copy_from_slice(bytemuck::cast_slice(&sum));
            }
        }
        if matches!(what, Collective::SumTo(rank) if rank != self.rank) {
            // Whoever relies on what it has no right to is found out.
            host.bytes_mut().fill(0xff);
        }
        backend.upload(stream, &host, 0..bytes, values);
        backend.synchronize(&backend.record(stream))?;
        Ok(Ticket::Done)
    }

    fn finish(&self, _: &B, _: Stream, _: Ticket<B>, _: Mut<'_, B>) -> Result<()> {
        Ok(())
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.post(mine))
    }

    fn leave(&self, _: &str) {}
}
