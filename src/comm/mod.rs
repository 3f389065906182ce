//! Collectives between ranks. A rank is a process (or, in [`threads`], a thread) with its own device.

pub mod environment;
pub mod meeting;
pub mod store;
pub mod tcp;
pub mod threads;

use crate::{
    Error, Result,
    backend::{Backend, Mut, Stream},
};
use std::{ops::Range, sync::mpsc::Receiver};

/// A group of ranks. All of them make the same calls in the same order.
pub trait Comm<B: Backend>: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world(&self) -> usize;
    /// Begins what all ranks do together with `values`, behind what `stream` has been given so far. On CPUs sums are of
    /// f64 values, in a binary tree over ranks, halves first (see [`halves`]), so that a power of two of ranks adds as one
    /// rank with as many micro-batches does. The values are not to be touched before [`Comm::finish`].
    fn begin(&self, backend: &B, stream: Stream, what: Collective, values: Mut<'_, B>) -> Result<Ticket<B>>;
    /// Lets `stream` go on with what became of `values`, which are those that `ticket` was given for. What was begun is
    /// finished in the same order.
    fn finish(&self, backend: &B, stream: Stream, ticket: Ticket<B>, values: Mut<'_, B>) -> Result<()>;
    /// Every rank's bytes, by rank: for what hosts have to say to each other.
    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Tells the others that this rank ends, and why: what they wait for fails with this cause.
    fn leave(&self, cause: &str);

    /// Begins and finishes a sum on all ranks.
    fn all_reduce(&self, backend: &B, stream: Stream, mut values: Mut<'_, B>) -> Result<()> {
        let ticket = self.begin(backend, stream, Collective::Sum, values.reborrow())?;
        self.finish(backend, stream, ticket, values)
    }
}

/// What becomes of a tensor that every rank has, of the same length and type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// The sum over ranks, the same on every rank.
    Sum,
    /// That sum on this rank; on the others nothing that is of use.
    SumTo(usize),
    /// What this rank has, on every rank, bit for bit.
    CopyFrom(usize),
}

impl Collective {
    /// What it is called in traces.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum | Self::SumTo(_) => "sum",
            Self::CopyFrom(_) => "copy",
        }
    }
}

/// A collective under way; what it holds is its communicator's business.
pub enum Ticket<B: Backend> {
    /// Nothing is left to do.
    Done,
    /// The values are there once this has passed.
    Event(B::Event),
    /// The communicating thread's answer, and whether its bytes are to go into the values.
    Answer(Receiver<Result<B::Host>>, bool),
}

/// A way to all ranks' bytes, as [`Comm::exchange`].
pub type Exchange<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Vec<Vec<u8>>>;

/// Every rank gives what it has done. If that failed on some, it fails on all: the first of them has the error, the
/// others an [`Error::Elsewhere`].
pub fn settle<T>(rank: usize, result: Result<T>, exchange: Exchange) -> Result<T> {
    let mine: Vec<u8> = result.as_ref().err().map(Error::exit_code).into_iter().collect();
    let all = match exchange(&mine) {
        Ok(all) => all,
        // Ranks that cannot even say that they failed: the first cause is this one's own.
        Err(lost) => return Err(result.err().unwrap_or(lost)),
    };
    match all.iter().enumerate().find_map(|(rank, code)| Some((rank, *code.first()?))) {
        Some((first, code)) if first != rank => Err(Error::Elsewhere { code }),
        _ => result,
    }
}

/// A world of one rank.
pub struct Solo;

impl<B: Backend> Comm<B> for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world(&self) -> usize {
        1
    }
    fn begin(&self, _: &B, _: Stream, _: Collective, _: Mut<'_, B>) -> Result<Ticket<B>> {
        Ok(Ticket::Done)
    }
    fn finish(&self, _: &B, _: Stream, _: Ticket<B>, _: Mut<'_, B>) -> Result<()> {
        Ok(())
    }
    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec()])
    }
    fn leave(&self, _: &str) {}
}

/// The part of `count` items that a rank takes: contiguous, sizes differ by at most one, and equal to a subtree of
/// [`halves`] where `world` is a power of two that divides `count`.
pub fn share(count: usize, rank: usize, world: usize) -> Range<usize> {
    count * rank / world..count * (rank + 1) / world
}

/// The one order of addition for `count` items that arrive by index: a binary tree by halves, evaluated with a stack.
/// Entry i is the number of times that the two topmost sums are added after item i was pushed.
pub fn halves(count: usize) -> Vec<usize> {
    fn visit(range: Range<usize>, merges: &mut [usize]) {
        if range.len() > 1 {
            let middle = range.start + range.len() / 2;
            visit(range.start..middle, merges);
            visit(middle..range.end, merges);
            merges[range.end - 1] += 1;
        }
    }
    let mut merges = vec![0; count];
    visit(0..count, &mut merges);
    merges
}

/// Sums that are on the stack at once, at most, for `count` items.
pub fn depth(count: usize) -> usize {
    let (mut now, mut most) = (0, 0);
    for merges in halves(count) {
        now += 1;
        most = most.max(now);
        now -= merges;
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_add_everything_once() {
        for count in 1..40 {
            assert_eq!(halves(count).iter().sum::<usize>(), count - 1);
            assert!(depth(count) <= count.ilog2() as usize + 2, "{count}");
        }
        assert_eq!(halves(4), [0, 1, 0, 2]);
    }

    #[test]
    fn shares_cover_everything() {
        for (count, world) in [(8, 4), (7, 3), (5, 5), (64, 8)] {
            let joined: Vec<usize> = (0..world).flat_map(|rank| share(count, rank, world)).collect();
            assert_eq!(joined, (0..count).collect::<Vec<_>>());
        }
    }
}
