//! Norm, decision, and update of the weights, or of the part of them that this rank owns.

use super::{Trainer, graphs::Work};
use crate::{
    Result,
    backend::{Stream, Tensor},
    config::OnNan,
    model::param::Table,
    ops::{
        Ops,
        gradient::Decision,
        muon::{self, MuonMatrix},
        optimizer::Arenas,
        pieces::{Pieces, RowSettings},
    },
    state::State,
    trace::Lane,
};
use std::ops::Range;

impl<B: Ops> Trainer<B> {
    /// The update where every rank makes all of it.
    pub(super) fn update(&mut self) -> Result<()> {
        self.norms();
        self.change();
        self.backend.finish_update(self.scalars.view_mut(), self.partials.view());
        Ok(())
    }

    /// The update where other ranks make the rest of it. Each has partial sums of its own pieces and 0 for the others,
    /// which changes no sum over ranks, so norms are sums of the same numbers in the same order as in [`Self::update`].
    pub(super) fn update_part(&mut self) -> Result<()> {
        let pieces = 0..self.pieces.list.len();
        self.backend.zero(Stream::Compute, self.partials.view_mut());
        self.norms();
        self.comm.all_reduce(&self.backend, Stream::Compute, self.partials.slice_mut(pieces))?;
        self.recorded(Work::Update, |trainer| {
            trainer.change();
            Ok(())
        })?;
        self.comm.all_reduce(&self.backend, Stream::Compute, self.partials.view_mut())?;
        self.backend.finish_update(self.scalars.view_mut(), self.partials.view());
        self.stale = true;
        Ok(())
    }

    /// Partial sums for the norm of the gradients.
    fn norms(&mut self) {
        let Self { backend, gradients, sums, own, partials, .. } = self;
        // Sums stay in the type that they are made in.
        let gradients = sums.first().unwrap_or(gradients);
        let partials = partials.slice_mut(own.among.clone());
        backend.square_norms(partials, gradients.slice(own.range.clone()), &own.pieces);
    }

    /// From partial sums of the norm of the gradients to new weights, and partial sums for the norm of their change.
    fn change(&mut self) {
        let decision = self.decision();
        let Self { backend, network, state, gradients, sums, pieces, own, partials, muon_scratch, scalars, .. } = self;
        let gradients = sums.first().unwrap_or(gradients);
        let _update = backend.span(Stream::Compute, Lane::Compute, "update");
        backend.decide(scalars.view_mut(), partials.slice(0..pieces.list.len()), pieces, decision);
        if self.shards.are_many() {
            backend.zero(Stream::Compute, partials.view_mut());
        }
        let arenas = Arenas {
            weights: state.weights.slice_mut(own.range.clone()),
            master: state.master.as_mut().map(Tensor::view_mut),
            first: state.first.as_mut().map(Tensor::view_mut),
            second: state.second.as_mut().map(Tensor::view_mut),
            maximum: state.maximum.as_mut().map(Tensor::view_mut),
            gradients: gradients.slice(own.range.clone()),
        };
        let (changes, method) = (partials.slice_mut(own.among.clone()), self.optimizer.method());
        backend.update(arenas, changes, scalars.view(), &own.pieces, method);
        if let Some(scratch) = muon_scratch {
            muon_update(backend, network.table(), state, gradients, pieces, partials, scratch, scalars);
        }
    }

    fn decision(&self) -> Decision {
        let clip = if self.optimizer.clip > 0.0 { self.optimizer.clip } else { f64::INFINITY };
        Decision { clip, nominal: self.nominal(), halt: self.config.on_nan == OnNan::Stop }
    }
}

/// Elements of scratch for the largest matrix that Muon updates here; None if there is none.
pub(super) fn muon_scratch(table: &Table, settings: &[RowSettings], owned: &Range<usize>) -> Option<usize> {
    let rows = muon_rows(table, settings, owned).map(|i| &table.rows[i]);
    rows.map(|row| muon::scratch(row.axes[0].size(), row.columns())).max()
}

/// Muon's rows in this part of the arena; each has one owner.
fn muon_rows(table: &Table, settings: &[RowSettings], owned: &Range<usize>) -> impl Iterator<Item = usize> {
    (0..table.rows.len()).filter(move |&i| settings[i].muon != 0 && owned.contains(&table.offsets[i]))
}

#[allow(clippy::too_many_arguments, reason = "the disjoint parts of a trainer")]
fn muon_update<B: Ops>(
    backend: &B,
    table: &Table,
    state: &mut State<B>,
    gradients: &Tensor<B>,
    pieces: &Pieces<B>,
    partials: &mut Tensor<B>,
    scratch: &mut Tensor<B>,
    scalars: &Tensor<B>,
) {
    let Some(first) = state.first.as_mut() else { return };
    for i in muon_rows(table, &pieces.rows, &state.owned) {
        let (row, values) = (&table.rows[i], table.values(i));
        let kept = values.start - state.owned.start..values.end - state.owned.start;
        let matrix = MuonMatrix {
            weight: state.weights.slice_mut(values.clone()),
            master: state.master.as_mut().map(|m| m.slice_mut(kept.clone())),
            first: first.slice_mut(kept),
            offset: values.start,
            gradient: gradients.slice(values),
            rows: row.axes[0].size(),
            columns: row.columns(),
            settings: pieces.rows[i],
        };
        let at = pieces.list.len() + i;
        let needed = 0..muon::scratch(matrix.rows, matrix.columns);
        backend.muon(matrix, partials.slice_mut(at..at + 1), scratch.slice_mut(needed), scalars.view());
    }
}
