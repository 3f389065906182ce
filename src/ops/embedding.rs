//! Token and position embeddings.

mod cuda;

use crate::backend::{
    Backend, Mut, Ref,
    cpu::{Cpu, Real, math::vectorize, parallel::RowsMut},
};

/// Sizes of an embedding.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingShape {
    /// Tokens: batch × sequence.
    pub rows: usize,
    /// Residual width.
    pub width: usize,
    /// Tokens of one sequence: row r stands at position `start + r % sequence`.
    pub sequence: usize,
    /// Position of the first token of each sequence (not 0 when generating with a cache).
    pub start: usize,
    /// Forward multiplier of the token embedding.
    pub scale: f64,
}

/// Embeddings.
pub trait Embedding: Backend {
    /// x[r] = scale · weight[tokens[r]] + positions[start + r % sequence].
    ///
    /// `x` is rows × width, `tokens` i32, each inside `weight`'s rows; without `positions` the second term is absent.
    fn embed(
        &self,
        x: Mut<'_, Self>,
        tokens: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        positions: Option<Ref<'_, Self>>,
        shape: EmbeddingShape,
    );

    /// dweight[t] (+)= scale · Σ over r with tokens[r] = t of dx[r], in the order of r; without `accumulate` rows of
    /// tokens that do not occur become zero. dpositions[p] = Σ of dx[r] at position p, overwritten, zero beyond
    /// `sequence`; `start` is 0.
    fn embed_backward(
        &self,
        dweight: Mut<'_, Self>,
        dpositions: Option<Mut<'_, Self>>,
        dx: Ref<'_, Self>,
        tokens: Ref<'_, Self>,
        shape: EmbeddingShape,
        accumulate: bool,
    );
}

/// Parts that the vocabulary is cut into for backward: each task looks through all tokens for its own.
const VOCABULARY_PARTS: usize = 64;

/// Elements of a task.
const TASK: usize = 1 << 14;

impl<F: Real> Embedding for Cpu<F> {
    fn embed(
        &self,
        x: Mut<'_, Self>,
        tokens: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        positions: Option<Ref<'_, Self>>,
        shape: EmbeddingShape,
    ) {
        let EmbeddingShape { rows, width, sequence, start, scale } = shape;
        let (tokens, weight) = (tokens.as_slice::<i32>(), weight.as_slice::<F>());
        let positions = positions.map(|p| p.as_slice::<F>());
        assert!(x.len() == rows * width && tokens.len() == rows);
        let scale = F::from_f64(scale);
        self.pool().for_rows(RowsMut::new(x.into_slice::<F>(), width), (TASK / width).max(1), |range, x| {
            for ((r, x), &token) in range.clone().zip(x.chunks_exact_mut(width)).zip(&tokens[range]) {
                let word = &weight[token as usize * width..][..width];
                match positions {
                    Some(positions) => {
                        let position = &positions[(start + r % sequence) * width..][..width];
                        vectorize!(x.iter_mut().zip(word).zip(position).for_each(|((x, &w), &p)| *x = scale * w + p));
                    }
                    None => vectorize!(x.iter_mut().zip(word).for_each(|(x, &w)| *x = scale * w)),
                }
            }
        });
    }

    fn embed_backward(
        &self,
        dweight: Mut<'_, Self>,
        dpositions: Option<Mut<'_, Self>>,
        dx: Ref<'_, Self>,
        tokens: Ref<'_, Self>,
        shape: EmbeddingShape,
        accumulate: bool,
    ) {
        let EmbeddingShape { rows, width, sequence, start, scale } = shape;
        let (dx, tokens) = (dx.as_slice::<F>(), tokens.as_slice::<i32>());
        assert!(dx.len() == rows * width && tokens.len() == rows && start == 0);
        let scale = F::from_f64(scale);
        let vocabulary = dweight.len() / width;
        let part = vocabulary.div_ceil(VOCABULARY_PARTS);
        self.pool().for_rows(RowsMut::new(dweight.into_slice::<F>(), width), part, |range, dweight| {
            if !accumulate {
                dweight.fill(F::ZERO);
            }
            for (&token, dx) in tokens.iter().zip(dx.chunks_exact(width)) {
                if range.contains(&(token as usize)) {
                    let sum = &mut dweight[(token as usize - range.start) * width..][..width];
                    vectorize!(sum.iter_mut().zip(dx).for_each(|(s, &d)| *s += scale * d));
                }
            }
        });
        let Some(dpositions) = dpositions else { return };
        let per_task = (TASK / (width * rows.div_ceil(sequence))).max(1);
        self.pool().for_rows(RowsMut::new(dpositions.into_slice::<F>(), width), per_task, |range, dpositions| {
            dpositions.fill(F::ZERO);
            for (position, sum) in range.zip(dpositions.chunks_exact_mut(width)).filter(|(p, _)| *p < sequence) {
                for dx in dx.chunks_exact(width).skip(position).step_by(sequence) {
                    vectorize!(sum.iter_mut().zip(dx).for_each(|(s, &d)| *s += d));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_f32, assert_gradient, cpu, dot, floats, random, tensor, unwritten, values};

    const SHAPE: EmbeddingShape = EmbeddingShape { rows: 12, width: 5, sequence: 4, start: 0, scale: 1.5 };
    const VOCABULARY: usize = 9;
    const CONTEXT: usize = 6;
    const TOKENS: [i32; 12] = [3, 0, 8, 3, 3, 1, 0, 5, 8, 8, 2, 3];

    fn embed<F: Real>(weight: &[f64], positions: Option<&[f64]>, tokens: &[i32], shape: EmbeddingShape) -> Vec<f64> {
        let cpu = cpu::<F>(2);
        let mut x = unwritten(&cpu, shape.rows * shape.width);
        let positions = positions.map(|p| floats(&cpu, p));
        let (weight, tokens) = (floats(&cpu, weight), tensor(&cpu, tokens));
        cpu.embed(x.view_mut(), tokens.view(), weight.view(), positions.as_ref().map(|p| p.view()), shape);
        values(&x)
    }

    /// (dweight, dpositions); dweight starts from `held`, if given, and otherwise from NaN.
    fn backward<F: Real>(
        threads: usize,
        dx: &[f64],
        tokens: &[i32],
        (vocabulary, context): (usize, usize),
        shape: EmbeddingShape,
        held: Option<&[f64]>,
    ) -> (Vec<f64>, Vec<f64>) {
        let cpu = cpu::<F>(threads);
        let mut dweight = held.map_or_else(|| unwritten(&cpu, vocabulary * shape.width), |held| floats(&cpu, held));
        let mut dpositions = unwritten(&cpu, context * shape.width);
        let (dx, tokens) = (floats(&cpu, dx), tensor(&cpu, tokens));
        let positions = Some(dpositions.view_mut());
        cpu.embed_backward(dweight.view_mut(), positions, dx.view(), tokens.view(), shape, held.is_some());
        (values(&dweight), values(&dpositions))
    }

    #[test]
    fn rows_are_looked_up() {
        let weight = random(1, VOCABULARY * 5);
        let positions = random(2, CONTEXT * 5);
        let shape = EmbeddingShape { start: 2, ..SHAPE };
        let x = embed::<f64>(&weight, Some(&positions), &TOKENS, shape);
        let plain = embed::<f64>(&weight, None, &TOKENS, shape);
        for (i, (x, plain)) in x.iter().zip(plain).enumerate() {
            let (r, j) = (i / 5, i % 5);
            let word = 1.5 * weight[TOKENS[r] as usize * 5 + j];
            assert_eq!(plain, word);
            assert_eq!(*x, word + positions[(2 + r % 4) * 5 + j]);
        }
    }

    #[test]
    fn gradients() {
        let (weight, positions) = (random(1, VOCABULARY * 5), random(2, CONTEXT * 5));
        let dx = random(3, SHAPE.rows * 5);
        let loss = |w: &[f64], p: &[f64]| dot(&dx, &embed::<f64>(w, Some(p), &TOKENS, SHAPE));
        let (dweight, dpositions) = backward::<f64>(2, &dx, &TOKENS, (VOCABULARY, CONTEXT), SHAPE, None);
        assert_gradient("weight", &weight, &dweight, |w| loss(w, &positions));
        assert_gradient("positions", &positions, &dpositions, |p| loss(&weight, p));

        let held = random(4, weight.len());
        let (added, _) = backward::<f64>(2, &dx, &TOKENS, (VOCABULARY, CONTEXT), SHAPE, Some(&held));
        for ((added, held), dweight) in added.iter().zip(held).zip(dweight) {
            assert!((added - held - dweight).abs() < 1e-15);
        }
    }

    #[test]
    fn threads_change_no_bit_and_f32_is_near() {
        let shape = EmbeddingShape { rows: 3 * 129, width: 33, sequence: 129, start: 0, scale: 0.7 };
        let tokens: Vec<i32> = (0..shape.rows).map(|i| ((i * i + i / 3) % 211) as i32).collect();
        let sizes = (217, 140);
        let dx = random(5, shape.rows * shape.width);
        let one = backward::<f32>(1, &dx, &tokens, sizes, shape, None);
        assert_eq!(one, backward::<f32>(2, &dx, &tokens, sizes, shape, None));
        assert_eq!(one, backward::<f32>(3, &dx, &tokens, sizes, shape, None));
        // Sums of at most `most` terms under 1 in size: a rounding for each term and each addition.
        let most = (0..211).map(|t| tokens.iter().filter(|&&u| u == t).count()).max().unwrap() as f64;
        let exact = backward::<f64>(1, &dx, &tokens, sizes, shape, None);
        assert_f32("weight", &one.0, &exact.0, 2.0 * most, |_| most);
        assert_f32("positions", &one.1, &exact.1, 3.0, |_| 3.0);
    }
}
