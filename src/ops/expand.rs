//! Expansion: every value of a target tensor from one value of a source tensor, times a scale, plus noise. Widening
//! is expansion with the map "repeat"; loading a checkpoint is expansion with the identity; initial values are noise
//! alone; other growth operators are other maps.

use crate::{
    backend::{Backend, Mut, Ref},
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
}

/// Noise ~ N(0, amount²) to add, a function of (stream, index in the full target tensor).
#[derive(Clone)]
pub struct Noise {
    /// Seed and tensor name.
    pub stream: rng::Stream,
    /// Standard deviation.
    pub amount: f64,
    /// Take from the noise its mean over the copies of each source column (times √(k/(k−1)) to keep its deviation), so
    /// that the function is kept. k copies each, k ≥ 2.
    pub paired: Option<u32>,
}

/// Expansion and initial values.
pub trait Expand: Backend {
    /// target[i] = scale · source[map(start + i)] + noise[start + i], for a range of the target that starts at element
    /// `start` of a tensor with `columns` columns. Computed in f64 for an f64 target, otherwise in f32 with no fused
    /// multiply-add, rounded once to the target's type. The same however the target is cut into ranges.
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

    /// out[0] = mean of squares of `x` (f64, summed in a fixed order): for noise relative to a tensor's own size.
    fn mean_square(&self, out: Mut<'_, Self>, x: Ref<'_, Self>);
}
