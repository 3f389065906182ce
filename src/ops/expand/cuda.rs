//! Expansion on a GPU: the CPU's bits.

use super::{Expand, Noise, Source, TASK};
use crate::{
    DType,
    backend::{
        Mut, Ref,
        cuda::{Cuda, Launch, kernels},
    },
    ops::convert::tag,
};

kernels! { "expand":
    PLAIN expand(
        target: Mut, target_type: u32, start: u64, len: u64, values: Ref, source_type: u32, source_columns: u32,
        rows_map: Ref, columns_map: Ref, columns: u32, scale: f64, rows_scale: Option<Ref>,
        columns_scale: Option<Ref>, drawn: u32, amount: f64, seed: u64, name: u64,
        given: Option<Ref>, origin: u64,
    );
    PLAIN fill(
        target: Mut, target_type: u32, start: u64, len: u64, mean: f64, drawn: u32, amount: f64, seed: u64, name: u64,
    );
    PLAIN copies_of_columns(first_copy: Mut, next_copy: Mut, columns_map: Ref, columns: u32, source_columns: u32);
    PLAIN paired_noise(
        noise: Mut, in_f64: u32, first_row: u64, columns: u32, first_copy: Ref, next_copy: Ref, source_columns: u32,
        copies: f64, seed: u64, name: u64,
    );
    PLAIN square_sums(sums: Mut, x: Ref, x_type: u32, len: u64);
    PLAIN mean_of_sums(out: Mut, sums: Mut, count: u32, len: u64);
}

/// A group of elements that four threads write.
const GROUP: usize = 64;
/// Elements of paired noise that exist at a time, or one row.
const PAIRED: usize = 1 << 24;

/// Blocks for a range of a target.
fn blocks(start: usize, len: usize) -> Launch {
    Launch::blocks((((start + len).div_ceil(GROUP) - start / GROUP) * 4).div_ceil(256))
}

/// What an element's noise is computed from.
#[derive(Clone, Copy, Default)]
struct Added<'a> {
    drawn: bool,
    amount: f64,
    key: [u64; 2],
    /// Noise that was made before instead of being drawn, and where in the full target it starts.
    given: Option<(Ref<'a, Cuda>, usize)>,
}

impl Added<'_> {
    fn new(noise: Option<&Noise>) -> Self {
        let drawn = |noise: &Noise| Self { drawn: true, amount: noise.amount, key: noise.stream.key(), given: None };
        noise.map_or_else(Self::default, drawn)
    }
}

impl Expand for Cuda {
    fn expand(
        &self,
        target: Mut<'_, Self>,
        start: usize,
        columns: usize,
        source: Source<'_, Self>,
        noise: Option<&Noise>,
    ) {
        assert_eq!(source.columns_map.len(), columns);
        match noise {
            _ if target.is_empty() => (),
            Some(noise) if noise.paired.is_some() => self.expand_paired(target, start, &source, noise),
            _ => self.expand_range(target, start, &source, Added::new(noise)),
        }
    }

    fn fill(&self, target: Mut<'_, Self>, start: usize, mean: f64, noise: Option<&Noise>) {
        assert!(noise.is_none_or(|n| n.paired.is_none()), "without a source there are no copies to pair");
        if target.is_empty() {
            return;
        }
        let (len, target_type) = (target.len(), tag(target.dtype()));
        let Added { drawn, amount, key: [seed, name], .. } = Added::new(noise);
        let (launch, start, drawn) = (blocks(start, len), start as u64, u32::from(drawn));
        fill(self, launch, target, target_type, start, len as u64, mean, drawn, amount, seed, name);
    }

    fn mean_square(&self, out: Mut<'_, Self>, x: Ref<'_, Self>) {
        let (tasks, len) = (x.len().div_ceil(TASK), x.len() as u64);
        let mut sums = self.workspace(DType::F64, tasks.max(1));
        if tasks > 0 {
            square_sums(self, Launch::blocks(tasks), sums.reborrow(), x, tag(x.dtype()), len);
        }
        mean_of_sums(self, Launch::blocks(1).threads(1024), out, sums, tasks as u32, len);
    }
}

impl Cuda {
    fn expand_range(&self, target: Mut<'_, Self>, start: usize, source: &Source<'_, Self>, noise: Added) {
        let (len, target_type, columns) = (target.len(), tag(target.dtype()), source.columns_map.len());
        let (given, origin) = noise.given.unzip();
        expand(
            self,
            blocks(start, len),
            target,
            target_type,
            start as u64,
            len as u64,
            source.values,
            tag(source.values.dtype()),
            source.columns as u32,
            source.rows_map,
            source.columns_map,
            columns as u32,
            source.scale,
            source.rows_scale,
            source.columns_scale,
            u32::from(noise.drawn),
            noise.amount,
            noise.key[0],
            noise.key[1],
            given,
            origin.unwrap_or(0) as u64,
        );
    }

    /// Makes the noise of some rows at a time, then writes them.
    fn expand_paired(&self, mut target: Mut<'_, Self>, start: usize, source: &Source<'_, Self>, noise: &Noise) {
        let (columns, end) = (source.columns_map.len(), start + target.len());
        let copies = f64::from(noise.paired.expect("the caller has seen it"));
        let arithmetic = if target.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let rows = (PAIRED / columns).clamp(1, end.div_ceil(columns) - start / columns);
        // Chains of columns, u32, lie before the noise.
        let words = |len: usize| (len * DType::U32.size()).div_ceil(arithmetic.size());
        let chains = words(source.columns) + words(columns);
        let (chains, mut values) = self.workspace(arithmetic, chains + rows * columns).split(chains);
        let (mut first, mut next) = chains.split(words(source.columns));
        let (wide, narrow) = (columns as u32, source.columns as u32);
        let launch = Launch::blocks(columns.max(source.columns).div_ceil(256));
        copies_of_columns(self, launch, first.reborrow(), next.reborrow(), source.columns_map, wide, narrow);
        let [seed, name] = noise.stream.key();
        let added = Added { amount: noise.amount * (copies / (copies - 1.0)).sqrt(), ..Added::new(Some(noise)) };
        let mut at = start;
        while at < end {
            let row = at / columns;
            let stop = end.min((row + rows) * columns);
            let launch = Launch::blocks(stop.div_ceil(columns) - row);
            let (in_f64, first, next) = (u32::from(arithmetic == DType::F64), first.as_ref(), next.as_ref());
            let noise = values.reborrow();
            paired_noise(self, launch, noise, in_f64, row as u64, wide, first, next, narrow, copies, seed, name);
            let (part, rest) = target.split(stop - at);
            self.expand_range(part, at, source, Added { given: Some((values.as_ref(), row * columns)), ..added });
            (target, at) = (rest, stop);
        }
    }
}
