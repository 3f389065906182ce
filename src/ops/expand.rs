//! Expansion: every value of a target tensor from one value of a source tensor, times a scale, plus noise. Widening
//! is expansion with the map "repeat"; loading a checkpoint is expansion with the identity; initial values are noise
//! alone; other growth operators are other maps.

mod cuda;

use super::{
    convert::{Float, with_float},
    gradient::square_sum,
};
use crate::{
    backend::{
        Backend, Mut, Ref,
        cpu::{Cpu, Element, Pool, Real, math::vectorize, parallel::RowsMut, stream::past_caches},
    },
    rng,
};

/// Where a target's values come from. Row-major matrices; a vector is a matrix with one column.
pub struct Source<'a, B: Backend> {
    /// The whole source tensor, any float type.
    pub values: Ref<'a, B>,
    /// Its columns.
    pub columns: usize,
    /// u32, one for each row of the target: the row of the source that it copies.
    pub rows_map: Ref<'a, B>,
    /// u32, one for each column of the target: the column of the source.
    pub columns_map: Ref<'a, B>,
    /// Factor on every value.
    pub scale: f64,
    /// f64, one for each row of the target: a further factor on its values. None: 1.
    pub rows_scale: Option<Ref<'a, B>>,
    /// f64, one for each column of the target: a further factor on its values. None: 1.
    pub columns_scale: Option<Ref<'a, B>>,
}

/// Noise ~ N(0, amount²) to add, a function of (stream, index in the full target tensor).
#[derive(Clone)]
pub struct Noise {
    /// Seed and tensor name.
    pub stream: rng::Stream,
    /// Standard deviation.
    pub amount: f64,
    /// Take from the noise its mean over the k ≥ 2 copies of each source column, so that the function is kept: what is
    /// added is (amount · √(k/(k−1))) · (ξ − (Σ ξ)/k), summed in the order of the columns; the root keeps the deviation.
    pub paired: Option<u32>,
}

/// Expansion and initial values.
pub trait Expand: Backend {
    /// target[i] = scale · source[map(start + i)] + noise[start + i], for a range of the target that starts at element
    /// `start` of a tensor with `columns` columns. Computed in f64 for an f64 target, otherwise in f32 with no fused
    /// multiply-add, rounded once to the target's type. (The factors scale · row's · column's are multiplied in f64, in
    /// this order.) The same however the target is cut into ranges.
    fn expand(
        &self,
        target: Mut<'_, Self>,
        start: usize,
        columns: usize,
        source: Source<'_, Self>,
        noise: Option<&Noise>,
    );

    /// target[i] = mean + noise[start + i].
    fn fill(&self, target: Mut<'_, Self>, start: usize, mean: f64, noise: Option<&Noise>);

    /// out[0] = mean of squares of `x` (f64, summed in a fixed order), 0 if it is empty: for noise relative to a
    /// tensor's own size.
    fn mean_square(&self, out: Mut<'_, Self>, x: Ref<'_, Self>);
}

/// Elements that one task writes.
const TASK: usize = 1 << 16;
/// Elements computed in cache before they are stored.
const BLOCK: usize = 1 << 11;

impl<F: Real> Expand for Cpu<F> {
    fn expand(
        &self,
        target: Mut<'_, Self>,
        start: usize,
        columns: usize,
        source: Source<'_, Self>,
        noise: Option<&Noise>,
    ) {
        with_float!(source.values.dtype(), S => {
            let map = Map::<S>::new(&source, columns);
            with_float!(target.dtype(), T => {
                write(self.pool(), target.into_slice::<T>(), start, &|at, values, paired| {
                    map.read(at, values, source.scale);
                    match noise {
                        Some(noise) if noise.paired.is_some() => paired.add(noise, at, values, map.copies()),
                        Some(noise) => add(noise, at, values),
                        None => {}
                    }
                })
            })
        });
    }

    fn fill(&self, target: Mut<'_, Self>, start: usize, mean: f64, noise: Option<&Noise>) {
        assert!(noise.is_none_or(|n| n.paired.is_none()), "without a source there are no copies to pair");
        with_float!(target.dtype(), T => write(self.pool(), target.into_slice::<T>(), start, &|at, values, _| {
            values.fill(Real::from_f64(mean));
            if let Some(noise) = noise {
                add(noise, at, values);
            }
        }));
    }

    fn mean_square(&self, out: Mut<'_, Self>, x: Ref<'_, Self>) {
        let len = x.len();
        let sum = with_float!(x.dtype(), T => {
            let x = x.as_slice::<T>();
            self.pool().sum(len.div_ceil(TASK), |i| square_sum(&x[i * TASK..len.min((i + 1) * TASK)], T::load))
        });
        out.into_slice::<f64>()[0] = sum / len.max(1) as f64;
    }
}

/// `compute(at, values, paired)` gives the elements from index `at` of the full tensor on. Behind a pointer, since there
/// are as many kinds as pairs of types.
type Compute<'a, A> = dyn Fn(usize, &mut [A], &mut Paired<A>) + Sync + 'a;

/// Computes a range of a tensor block by block, and stores it past the caches.
fn write<T: Float>(pool: &Pool, target: &mut [T], start: usize, compute: &Compute<T::Arithmetic>) {
    pool.for_rows(RowsMut::new(target, 1), TASK, |range, target| {
        let mut values = [T::Arithmetic::ZERO; BLOCK];
        let mut rounded = [T::store(0.0); BLOCK];
        let mut paired = Paired::default();
        past_caches(|stores| {
            for (i, block) in target.chunks_mut(BLOCK).enumerate() {
                let values = &mut values[..block.len()];
                compute(start + range.start + i * BLOCK, values, &mut paired);
                if T::DTYPE == T::Arithmetic::DTYPE {
                    stores.copy(block, bytemuck::cast_slice(values));
                } else {
                    let rounded = &mut rounded[..block.len()];
                    vectorize!(round(rounded, values));
                    stores.copy(block, rounded);
                }
            }
        });
    });
}

#[inline(always)]
fn round<T: Float>(rounded: &mut [T], values: &[T::Arithmetic]) {
    for (r, &v) in rounded.iter_mut().zip(values) {
        *r = T::round(v);
    }
}

/// The values to copy and where they go, as slices.
struct Map<'a, S> {
    values: &'a [S],
    source_columns: usize,
    rows: &'a [u32],
    columns: &'a [u32],
    /// Factors of rows and of columns.
    scales: [Option<&'a [f64]>; 2],
    /// k, if the columns are those of the source, each repeated k times; else 0.
    repeat: usize,
}

impl<'a, S: Float> Map<'a, S> {
    fn new<F: Real>(source: &Source<'a, Cpu<F>>, target_columns: usize) -> Self {
        let values = source.values.as_slice();
        let (mut rows, mut columns): (&[u32], &[u32]) = (source.rows_map.as_slice(), source.columns_map.as_slice());
        assert_eq!(columns.len(), target_columns);
        let mut scales = [source.rows_scale, source.columns_scale].map(|s| s.map(|s| s.as_slice::<f64>()));
        let mut source_columns = source.columns;
        if columns.len() == 1 && source_columns == 1 {
            // A vector is the same in memory as one row, and a row is copied in one go.
            (rows, columns, source_columns) = (&[0], rows, values.len());
            scales.swap(0, 1);
        }
        let k = columns.len() / source_columns;
        let repeats = k > 0 && columns.iter().enumerate().all(|(j, &c)| c as usize == j / k);
        Self { values, source_columns, rows, columns, scales, repeat: if repeats { k } else { 0 } }
    }

    fn copies(&self) -> Copies<'a> {
        Copies { of: self.columns, columns: self.source_columns }
    }

    /// The elements from index `at` of the full target on, times `scale`.
    fn read<A: Real>(&self, mut at: usize, mut out: &mut [A], whole: f64) {
        let scale = A::from_f64(whole);
        while !out.is_empty() {
            let (row, column) = (at / self.columns.len(), at % self.columns.len());
            let (segment, rest) = out.split_at_mut(out.len().min(self.columns.len() - column));
            let source = &self.values[self.rows[row] as usize * self.source_columns..][..self.source_columns];
            let scaled = |part: Option<&[f64]>, i: usize| part.map_or(1.0, |factors| factors[i]);
            vectorize!(match self.repeat {
                _ if self.scales != [None; 2] => {
                    let of_row = whole * scaled(self.scales[0], row);
                    for (j, value) in segment.iter_mut().enumerate() {
                        let factor = A::from_f64(of_row * scaled(self.scales[1], column + j));
                        *value = factor * A::from_f64(source[self.columns[column + j] as usize].load());
                    }
                }
                1 => repeat::<1, S, A>(segment, source, column, scale),
                2 => repeat::<2, S, A>(segment, source, column, scale),
                3 => repeat::<3, S, A>(segment, source, column, scale),
                4 => repeat::<4, S, A>(segment, source, column, scale),
                _ => gather(segment, source, &self.columns[column..], scale),
            });
            at += segment.len();
            out = rest;
        }
    }
}

/// out[j] = scale · source[columns[j]].
#[inline(always)]
fn gather<S: Float, A: Real>(out: &mut [A], source: &[S], columns: &[u32], scale: A) {
    for (value, &column) in out.iter_mut().zip(columns) {
        *value = scale * A::from_f64(source[column as usize].load());
    }
}

/// out[j] = scale · source[(column + j) / K].
#[inline(always)]
fn repeat<const K: usize, S: Float, A: Real>(out: &mut [A], source: &[S], column: usize, scale: A) {
    let first = column.div_ceil(K);
    let (head, out) = out.split_at_mut((first * K - column).min(out.len()));
    for value in head {
        *value = scale * A::from_f64(source[column / K].load());
    }
    let (groups, tail) = out.as_chunks_mut::<K>();
    for value in tail {
        *value = scale * A::from_f64(source[first + groups.len()].load());
    }
    for (group, s) in groups.iter_mut().zip(&source[first..]) {
        *group = [scale * A::from_f64(s.load()); K];
    }
}

/// values[i] += amount · ξ(at + i).
fn add<A: Real>(noise: &Noise, at: usize, values: &mut [A]) {
    let mut normals = [0.0; BLOCK];
    let normals = &mut normals[..values.len()];
    noise.stream.normal_fill(at as u64, normals);
    let amount = A::from_f64(noise.amount);
    vectorize!({
        for (value, &normal) in values.iter_mut().zip(&*normals) {
            *value += amount * A::from_f64(f64::from(normal));
        }
    });
}

/// Which column of a source each column of the target copies.
#[derive(Clone, Copy)]
struct Copies<'a> {
    of: &'a [u32],
    /// Columns of the source.
    columns: usize,
}

/// The paired noise of one row of the target, kept while blocks of that row are written.
struct Paired<A> {
    row: Option<usize>,
    normals: Vec<f32>,
    /// Of each column of the source.
    means: Vec<A>,
}

impl<A> Default for Paired<A> {
    fn default() -> Self {
        Self { row: None, normals: Vec::new(), means: Vec::new() }
    }
}

impl<A: Real> Paired<A> {
    fn add(&mut self, noise: &Noise, at: usize, values: &mut [A], copies: Copies) {
        let k = f64::from(noise.paired.expect("the caller has seen it"));
        let amount = A::from_f64(noise.amount * (k / (k - 1.0)).sqrt());
        for (i, value) in values.iter_mut().enumerate() {
            let (row, column) = ((at + i) / copies.of.len(), (at + i) % copies.of.len());
            if self.row != Some(row) {
                self.draw(row, noise, copies, A::from_f64(k));
            }
            let normal = A::from_f64(f64::from(self.normals[column]));
            *value += amount * (normal - self.means[copies.of[column] as usize]);
        }
    }

    fn draw(&mut self, row: usize, noise: &Noise, copies: Copies, k: A) {
        self.row = Some(row);
        self.normals.resize(copies.of.len(), 0.0);
        noise.stream.normal_fill((row * copies.of.len()) as u64, &mut self.normals);
        self.means.clear();
        self.means.resize(copies.columns, A::ZERO);
        for (&column, &normal) in copies.of.iter().zip(&self.normals) {
            self.means[column as usize] += A::from_f64(f64::from(normal));
        }
        self.means.iter_mut().for_each(|m| *m /= k);
    }
}

#[cfg(test)]
mod tests;
