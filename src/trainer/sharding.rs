//! ZeRO stage 1 (arXiv 1910.02054): each rank updates a part of the weights, and has master weights and moments of that
//! part alone. It gets the sum of the gradients of its part, and the others get what it makes of it.

use super::Trainer;
use crate::{
    DType, Result,
    backend::{ALIGNMENT, Mut, Stream, Tensor},
    comm::{Collective, Comm, Ticket},
    machine::size,
    model::{Arriving, param::Table, plan::Plan},
    ops::{
        Ops,
        pieces::{self, Pieces, RowSettings},
    },
    state::{State, common},
};
use std::{cell::RefCell, mem::take, ops::Range};

/// Muon takes as long for an element as elementwise optimizers, times the smaller side of its matrix by this one: on an
/// H100, about 28 bytes of memory traffic for each against the 27 operations for each unit of the smaller side.
const MUON_SIDE: usize = 200;

/// Who updates what: a contiguous part of the arena for each rank, or all of it on every rank.
pub(super) struct Shards(Vec<Range<usize>>);

impl Shards {
    /// Parts of about equal cost for `world` ranks. They begin where pieces do, on borders of memory, and a matrix of
    /// Muon's has one owner; so a part may be empty.
    pub fn new(table: &Table, settings: &[RowSettings], world: usize) -> Self {
        let items = items(table, settings);
        let total: usize = items.iter().map(|&(_, cost)| cost).sum();
        // What begins closest to an equal share of the cost.
        let border = |rank: usize| {
            let away = |before: usize| (before * world).abs_diff(total * rank);
            let mut sum = 0;
            let starts = items.iter().map(|&(start, cost)| {
                sum += cost;
                (start, sum - cost)
            });
            let nearest = starts.chain([(table.arena, total)]).min_by_key(|&(_, before)| away(before));
            nearest.map_or(0, |(start, _)| start)
        };
        Self((0..world).map(|rank| border(rank)..border(rank + 1)).collect())
    }

    /// Whether each rank updates a part only.
    pub fn are_many(&self) -> bool {
        self.0.len() > 1
    }

    /// What a rank updates.
    pub fn of(&self, rank: usize) -> Range<usize> {
        if self.are_many() { self.0[rank].clone() } else { self.0[0].clone() }
    }

    /// A range of the arena by owner.
    fn split(&self, range: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let parts = self.0.iter().map(|owned| common(range, owned)).enumerate();
        parts.filter(|(_, part)| !part.is_empty())
    }

    /// Begins the sum over ranks of a group's gradients in `sums`, behind what the compute stream has done so far. With
    /// a type of their own for the way they are rounded to it, into the group's gradients in `memory`, which were taken
    /// into the sums and are of no use any more.
    pub fn begin_sums<B: Ops>(
        &self,
        backend: &B,
        comm: &dyn Comm<B>,
        group: &Range<usize>,
        sums: &mut Tensor<B>,
        memory: Option<(Mut<'_, B>, DType)>,
    ) -> Result<Vec<Sum<B>>> {
        let mut wire = memory.map(|(memory, dtype)| memory.retyped(dtype).slice(0..group.len()));
        if let Some(wire) = &mut wire {
            backend.accumulate(wire.reborrow(), sums.slice(group.clone()), false);
        }
        backend.wait(Stream::Communication, &backend.record(Stream::Compute));
        let begin = |(owner, part): (usize, Range<usize>)| {
            let values = match &mut wire {
                Some(wire) => wire.reborrow().slice(part.start - group.start..part.end - group.start),
                None => sums.slice_mut(part.clone()),
            };
            let what = if self.are_many() { Collective::SumTo(owner) } else { Collective::Sum };
            let ticket = comm.begin(backend, Stream::Communication, what, values)?;
            Ok(Sum { part, group: group.clone(), ticket })
        };
        self.split(group).map(begin).collect()
    }

    /// Lets the compute stream go on with these sums.
    pub fn finish_sums<B: Ops>(
        &self,
        backend: &B,
        comm: &dyn Comm<B>,
        under_way: Vec<Sum<B>>,
        sums: &mut Tensor<B>,
        gradients: &mut Tensor<B>,
        wire: Option<DType>,
    ) -> Result<()> {
        let mut rounded = Vec::new();
        for Sum { part, group, ticket } in under_way {
            let Some(dtype) = wire else {
                comm.finish(backend, Stream::Communication, ticket, sums.slice_mut(part))?;
                continue;
            };
            let within = part.start - group.start..part.end - group.start;
            let values = gradients.slice_mut(group.clone()).retyped(dtype).slice(within.clone());
            comm.finish(backend, Stream::Communication, ticket, values)?;
            if !self.are_many() || !common(&part, &self.of(comm.rank())).is_empty() {
                rounded.push((part, group, within, dtype));
            }
        }
        backend.wait(Stream::Compute, &backend.record(Stream::Communication));
        for (part, group, within, dtype) in rounded {
            let values = gradients.slice_mut(group).retyped(dtype).slice(within);
            backend.accumulate(sums.slice_mut(part), values.as_ref(), false);
        }
        Ok(())
    }

    /// Begins to send all ranks what each has updated, behind what the compute stream has done so far.
    pub fn begin_gather<B: Ops>(
        &self,
        backend: &B,
        comm: &dyn Comm<B>,
        table: &Table,
        weights: &mut Tensor<B>,
    ) -> Result<Gathering<B>> {
        let mut begin = |(owner, part): (usize, Range<usize>)| {
            let what = Collective::CopyFrom(owner);
            let ticket = comm.begin(backend, Stream::Compute, what, weights.slice_mut(part.clone()))?;
            Ok((part, ticket))
        };
        let groups = (0..table.groups()).map(|group| self.split(&table.group(group)).map(&mut begin).collect());
        Ok(Gathering { groups: groups.collect::<Result<_>>()?, fault: Ok(()) })
    }
}

/// A sum over ranks under way, of a part of a group.
pub(super) struct Sum<B: Ops> {
    part: Range<usize>,
    group: Range<usize>,
    ticket: Ticket<B>,
}

/// Weights on their way from the ranks that updated them, by group; or none.
pub(super) struct Gathering<B: Ops> {
    groups: Vec<Vec<(Range<usize>, Ticket<B>)>>,
    /// The first failure of a wait.
    pub fault: Result<()>,
}

impl<B: Ops> Default for Gathering<B> {
    fn default() -> Self {
        Self { groups: Vec::new(), fault: Ok(()) }
    }
}

impl<B: Ops> Gathering<B> {
    /// Whether nothing was on its way.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The weights in `arena`, each group of which is there when it is asked for.
    pub fn weights<'a>(
        gathering: &'a RefCell<Self>,
        backend: &'a B,
        comm: &'a dyn Comm<B>,
        table: &'a Table,
        arena: Mut<'a, B>,
    ) -> Arriving<'a, B> {
        Arriving::new(table, arena, move |group, part| {
            let gathering = &mut *gathering.borrow_mut();
            let Some(tickets) = gathering.groups.get_mut(group) else { return };
            let arrived = finish(backend, comm, take(tickets), table.group(group).start, part);
            if gathering.fault.is_ok() {
                gathering.fault = arrived;
            }
        })
    }
}

/// Lets the compute stream go on with parts of an arena, of which `arena` is what lies from `start` on.
fn finish<B: Ops>(
    backend: &B,
    comm: &dyn Comm<B>,
    parts: Vec<(Range<usize>, Ticket<B>)>,
    start: usize,
    mut arena: Mut<'_, B>,
) -> Result<()> {
    parts.into_iter().try_for_each(|(part, ticket)| {
        let values = arena.reborrow().slice(part.start - start..part.end - start);
        comm.finish(backend, Stream::Compute, ticket, values)
    })
}

/// The pieces of what a rank updates.
pub(super) struct Own<B: Ops> {
    /// Elements of the arena.
    pub range: Range<usize>,
    /// Their pieces, which count elements from the first of the range.
    pub pieces: Pieces<B>,
    /// Those pieces among all of the arena's.
    pub among: Range<usize>,
}

impl<B: Ops> Own<B> {
    /// `all`: pieces of the whole arena.
    pub fn new(backend: &B, all: &Pieces<B>, range: Range<usize>) -> Result<Self> {
        let before = |end: usize| all.list.partition_point(|piece| piece.range().start < end);
        let among = before(range.start)..before(range.end);
        let mut list = all.list[among.clone()].to_vec();
        for piece in &mut list {
            piece.offset -= range.start as u64;
        }
        let pieces = Pieces { origin: range.start as u64, ..Pieces::new(backend, list, all.rows.clone())? };
        Ok(Self { pieces, range, among })
    }
}

impl<B: Ops> Trainer<B> {
    /// What this rank leaves to others, in words; None if nothing.
    pub fn sharding(&self) -> Option<String> {
        if !self.shards.are_many() {
            return None;
        }
        let table = self.network.table();
        let bytes = |owned: &Range<usize>| {
            let mut plan = Plan::default();
            State::plan_part(&self.backend, &mut plan, table, Some(&self.optimizer), owned.clone());
            plan.bytes()
        };
        let (whole, owned) = (0..table.arena, &self.own.range);
        Some(format!(
            "ZeRO: of {} weights this rank updates {}; the others' master weights and moments would take {} more \
             (comm.zero = false)",
            table.arena,
            owned.len(),
            size(bytes(&whole) - bytes(owned)),
        ))
    }
}

/// What cannot be divided: the first element of each in the arena, and its cost in elementwise updates.
fn items(table: &Table, settings: &[RowSettings]) -> Vec<(usize, usize)> {
    let mut items: Vec<(usize, usize)> = Vec::new();
    for (i, (row, settings)) in table.rows.iter().zip(settings).enumerate() {
        let values = table.values(i);
        let parts = match settings.muon {
            0 => pieces::cut([values.clone()], values).iter().map(|p| (p.range().start, p.len as usize)).collect(),
            _ => {
                let side = row.columns().min(row.axes[0].size());
                vec![(values.start, values.len() * (MUON_SIDE + side) / MUON_SIDE)]
            }
        };
        for (start, cost) in parts {
            match items.last_mut() {
                // Nothing begins off the borders of memory.
                Some(last) if !start.is_multiple_of(ALIGNMENT / 2) => last.1 += cost,
                _ => items.push((start, cost)),
            }
        }
    }
    items
}
