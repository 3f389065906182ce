//! Rotary position embedding (RoPE, arXiv 2104.09864), in the rotate-half form of Llama.

mod cuda;

use super::attention::HeadShape;
use crate::backend::{
    Backend, Mut, Ref,
    cpu::{Cpu, Real, math::vectorize, parallel::RowsMut},
};

/// By which angles rows are turned: in a head of size e, elements i and i + e/2 by those of the row's position.
pub struct Rotation<'a, B: Backend> {
    /// Positions × e/2 × (cos, sin), in the statistics type.
    pub table: Ref<'a, B>,
    /// Rows of a sequence.
    pub sequence: usize,
    /// Row r stands at position `start + r % sequence`.
    pub start: usize,
}

impl<'a, B: Backend> Rotation<'a, B> {
    /// Where the angles of a row of heads of `size` begin in the table.
    pub(super) fn angles_of(&self, row: usize, size: usize) -> usize {
        (self.start + row % self.sequence) * size
    }
}

/// RoPE.
pub trait Rotary: Backend {
    /// Rotates the queries and keys of `qkv`, rows × [`HeadShape::row`], in place. `backward` turns the other way, which
    /// is the gradient.
    fn rotate(&self, qkv: Mut<'_, Self>, rotation: Rotation<'_, Self>, shape: HeadShape, backward: bool);
}

/// Elements of a task.
const TASK: usize = 1 << 14;

impl<F: Real> Rotary for Cpu<F> {
    fn rotate(&self, qkv: Mut<'_, Self>, rotation: Rotation<'_, Self>, shape: HeadShape, backward: bool) {
        let (width, size) = (shape.row(), shape.head_dim);
        let rotated = shape.queries() + shape.keys();
        let table = rotation.table.as_slice::<F>();
        assert!(qkv.len().is_multiple_of(width) && size.is_multiple_of(2));
        let sign = if backward { -F::ONE } else { F::ONE };
        self.pool().for_rows(RowsMut::new(qkv.into_slice::<F>(), width), (TASK / width).max(1), |range, qkv| {
            vectorize!({
                for (r, row) in range.zip(qkv.chunks_exact_mut(width)) {
                    let angles = &table[rotation.angles_of(r, size)..][..size];
                    row[..rotated].chunks_exact_mut(size).for_each(|head| turn(head, angles, sign));
                }
            });
        });
    }
}

/// Turns the pairs (head[i], head[i + e/2]) by the angles (cos, sin) of `angles`, the other way with sign −1.
#[inline(always)]
pub(super) fn turn<F: Real>(head: &mut [F], angles: &[F], sign: F) {
    let (low, high) = head.split_at_mut(head.len() / 2);
    for ((a, b), angle) in low.iter_mut().zip(high).zip(angles.as_chunks::<2>().0) {
        let (cos, sin) = (angle[0], sign * angle[1]);
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_f32, assert_gradient, cpu, dot, floats, random, values};

    const SHAPE: HeadShape = HeadShape { kv_heads: 3, group: 2, head_dim: 6 };

    fn table(positions: usize, head_dim: usize) -> Vec<f64> {
        let half = head_dim / 2;
        let angle = |p: usize, i: usize| p as f64 * 10_000f64.powf(-(i as f64) / half as f64);
        (0..positions * half)
            .flat_map(|at| [angle(at / half, at % half).cos(), angle(at / half, at % half).sin()])
            .collect()
    }

    fn rotate<F: Real>(
        threads: usize,
        qkv: &[f64],
        shape: HeadShape,
        sequence: usize,
        start: usize,
        back: bool,
    ) -> Vec<f64> {
        let cpu = cpu::<F>(threads);
        let table = floats(&cpu, &table(start + sequence, shape.head_dim));
        let mut qkv = floats(&cpu, qkv);
        cpu.rotate(qkv.view_mut(), Rotation { table: table.view(), sequence, start }, shape, back);
        values(&qkv)
    }

    #[test]
    fn pairs_turn_and_values_stay() {
        let qkv = random(1, 8 * SHAPE.row());
        let turned = rotate::<f64>(2, &qkv, SHAPE, 4, 3, false);
        for (i, &y) in turned.iter().enumerate() {
            let (r, j) = (i / SHAPE.row(), i % SHAPE.row());
            if j >= SHAPE.queries() + SHAPE.keys() {
                assert_eq!(y, qkv[i]);
                continue;
            }
            // The complex number head[i] + √−1 head[i + e/2] times e^(√−1 angle).
            let (pair, in_high) = (j % 3, j % 6 >= 3);
            let angle = (3 + r % 4) as f64 * 10_000f64.powf(-(pair as f64) / 3.0);
            let expected = match in_high {
                false => qkv[i] * angle.cos() - qkv[i + 3] * angle.sin(),
                true => qkv[i] * angle.cos() + qkv[i - 3] * angle.sin(),
            };
            assert!((y - expected).abs() < 1e-15);
        }
    }

    #[test]
    fn gradient() {
        let qkv = random(2, 4 * SHAPE.row());
        let dy = random(3, qkv.len());
        let d = rotate::<f64>(1, &dy, SHAPE, 2, 0, true);
        assert_gradient("qkv", &qkv, &d, |x| dot(&dy, &rotate::<f64>(1, x, SHAPE, 2, 0, false)));
    }

    #[test]
    fn threads_change_no_bit_and_f32_is_near() {
        let shape = HeadShape { kv_heads: 2, group: 3, head_dim: 34 };
        let qkv = random(4, 3 * 101 * shape.row());
        let one = rotate::<f32>(1, &qkv, shape, 101, 0, false);
        assert_eq!(one, rotate::<f32>(2, &qkv, shape, 101, 0, false));
        assert_eq!(one, rotate::<f32>(3, &qkv, shape, 101, 0, false));
        // Two products and a sum of numbers under 1, from a rounded cosine and sine.
        assert_f32("qkv", &one, &rotate::<f64>(1, &qkv, shape, 101, 0, false), 6.0, |_| 1.0);
    }
}
