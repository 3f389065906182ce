//! RMSNorm of each query and key head with one gain for all query heads and one for all key heads (Qwen3), and rotary
//! position embedding behind it, in one pass.

mod cuda;

use super::{
    attention::HeadShape,
    norm::add_up,
    rotary::{Rotation, turn},
};
use crate::backend::{
    Backend, Mut, Ref,
    cpu::{
        Cpu, Real,
        math::{dot, vectorize},
        parallel::{RowsMut, scratch},
    },
};

/// Q/K norm.
pub trait HeadNorm: Backend {
    /// out = qkv with each query head and key head normalised, multiplied by its gain and, with a rotation, turned as
    /// [`super::rotary::Rotary::rotate`] does; values are copied.
    /// `qkv` and `out` are rows × [`HeadShape::row`], `statistics` rows × (heads + kv_heads): 1/deviation.
    fn head_norm(
        &self,
        out: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        rotation: Option<Rotation<'_, Self>>,
        shape: HeadShape,
        eps: f64,
    );

    /// Turns the gradient by `out` into the gradient by `qkv`, in place; dq_gain and dk_gain are overwritten, summed in
    /// a fixed order.
    fn head_norm_backward(
        &self,
        d: Mut<'_, Self>,
        dq_gain: Mut<'_, Self>,
        dk_gain: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        rotation: Option<Rotation<'_, Self>>,
        shape: HeadShape,
    );
}

/// Rows of a task, and of a partial sum of gain gradients.
const BLOCK: usize = 32;

impl<F: Real> HeadNorm for Cpu<F> {
    fn head_norm(
        &self,
        out: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        rotation: Option<Rotation<'_, Self>>,
        shape: HeadShape,
        eps: f64,
    ) {
        let (width, size, normed) = (shape.row(), shape.head_dim, shape.queries() + shape.keys());
        let (qkv, q_gain, k_gain) = (qkv.as_slice::<F>(), q_gain.as_slice::<F>(), k_gain.as_slice::<F>());
        assert!(out.len() == qkv.len() && q_gain.len() == size && k_gain.len() == size);
        let (count, eps) = (F::from_f64(size as f64), F::from_f64(eps));
        let angles = |row| rotation.as_ref().map(|r| &r.table.as_slice::<F>()[r.angles_of(row, size)..][..size]);
        let out = RowsMut::new(out.into_slice::<F>(), width);
        let statistics = RowsMut::new(statistics.into_slice::<F>(), normed / size);
        self.pool().for_rows((out, statistics), BLOCK, |range, (out, statistics)| {
            let qkv = &qkv[range.start * width..range.end * width];
            let rows = out.chunks_exact_mut(width).zip(qkv.chunks_exact(width));
            vectorize!({
                for (row, ((out, qkv), statistics)) in range.zip(rows.zip(statistics.chunks_exact_mut(normed / size))) {
                    out[normed..].copy_from_slice(&qkv[normed..]);
                    let heads = out.chunks_exact_mut(size).zip(qkv.chunks_exact(size)).zip(statistics);
                    for (head, ((out, x), statistic)) in heads.enumerate() {
                        let gain = if head * size < shape.queries() { q_gain } else { k_gain };
                        let inverse = F::ONE / (dot(x, x) / count + eps).sqrt();
                        *statistic = inverse;
                        out.iter_mut().zip(x).zip(gain).for_each(|((out, &x), &gain)| *out = x * inverse * gain);
                    }
                    if let Some(angles) = angles(row) {
                        out[..normed].chunks_exact_mut(size).for_each(|head| turn(head, angles, F::ONE));
                    }
                }
            });
        });
    }

    fn head_norm_backward(
        &self,
        d: Mut<'_, Self>,
        dq_gain: Mut<'_, Self>,
        dk_gain: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        rotation: Option<Rotation<'_, Self>>,
        shape: HeadShape,
    ) {
        let (width, size, normed) = (shape.row(), shape.head_dim, shape.queries() + shape.keys());
        let (qkv, statistics) = (qkv.as_slice::<F>(), statistics.as_slice::<F>());
        let (q_gain, k_gain) = (q_gain.as_slice::<F>(), k_gain.as_slice::<F>());
        assert!(d.len() == qkv.len() && q_gain.len() == size && k_gain.len() == size);
        let angles = |row| rotation.as_ref().map(|r| &r.table.as_slice::<F>()[r.angles_of(row, size)..][..size]);
        let blocks = (qkv.len() / width).div_ceil(BLOCK);
        scratch(blocks * 2 * size, |partials: &mut [F]| {
            let d = RowsMut::blocks(d.into_slice::<F>(), BLOCK * width);
            self.pool().for_rows((d, RowsMut::new(partials, 2 * size)), 1, |block, (d, partial)| {
                let qkv = qkv[block.start * BLOCK * width..].chunks_exact(width);
                let statistics = statistics[block.start * BLOCK * (normed / size)..].chunks_exact(normed / size);
                let (dq_gain, dk_gain) = partial.split_at_mut(size);
                dq_gain.fill(F::ZERO);
                dk_gain.fill(F::ZERO);
                vectorize!({
                    let rows = d.chunks_exact_mut(width).zip(qkv).zip(statistics);
                    for (row, ((d, qkv), statistics)) in (block.start * BLOCK..).zip(rows) {
                        if let Some(angles) = angles(row) {
                            d[..normed].chunks_exact_mut(size).for_each(|head| turn(head, angles, -F::ONE));
                        }
                        let (dq, dk) = d[..normed].split_at_mut(shape.queries());
                        let (q, k) = qkv[..normed].split_at(shape.queries());
                        let (q_statistics, k_statistics) = statistics.split_at(shape.queries() / size);
                        heads_backward(dq, dq_gain, q, q_statistics, q_gain);
                        heads_backward(dk, dk_gain, k, k_statistics, k_gain);
                    }
                });
            });
            let (q, k) = (0..size, size..2 * size);
            add_up(dq_gain.into_slice(), partials.chunks_exact(2 * size).map(|p| &p[q.clone()]));
            add_up(dk_gain.into_slice(), partials.chunks_exact(2 * size).map(|p| &p[k.clone()]));
        });
    }
}

/// With r = 1/deviation of a head: dgain += d · x · r, then d = r · (d · gain − x · r² · mean(d · gain · x)).
#[inline(always)]
fn heads_backward<F: Real>(d: &mut [F], dgain: &mut [F], x: &[F], statistics: &[F], gain: &[F]) {
    let size = gain.len();
    let count = F::from_f64(size as f64);
    for ((d, x), &inverse) in d.chunks_exact_mut(size).zip(x.chunks_exact(size)).zip(statistics) {
        for (((d, dgain), &x), &gain) in d.iter_mut().zip(&mut *dgain).zip(x).zip(gain) {
            *dgain += *d * x * inverse;
            *d *= gain;
        }
        let slope = dot(d, x) / count * inverse * inverse;
        d.iter_mut().zip(x).for_each(|(d, &x)| *d = inverse * (*d - x * slope));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rotary::Rotary;
    use crate::ops::tests::{assert_f32, assert_gradient, cpu, dot, floats, random, unwritten, values};

    const EPS: f64 = 1e-6;

    struct Case {
        qkv: Vec<f64>,
        q_gain: Vec<f64>,
        k_gain: Vec<f64>,
        d: Vec<f64>,
        shape: HeadShape,
        /// (cos, sin) for `SEQUENCE + START` positions, where heads are turned.
        angles: Option<Vec<f64>>,
    }

    const SEQUENCE: usize = 7;
    const START: usize = 2;

    impl Case {
        fn new(rows: usize, shape: HeadShape) -> Self {
            Self {
                qkv: random(1, rows * shape.row()),
                q_gain: random(2, shape.head_dim).iter().map(|v| 1.0 + 0.5 * v).collect(),
                k_gain: random(3, shape.head_dim).iter().map(|v| 1.0 + 0.5 * v).collect(),
                d: random(4, rows * shape.row()),
                shape,
                angles: None,
            }
        }

        /// The same with angles, which rotate nothing evenly: they need not be a circle's to have a gradient.
        fn turned(rows: usize, shape: HeadShape) -> Self {
            Self { angles: Some(random(5, (SEQUENCE + START) * shape.head_dim)), ..Self::new(rows, shape) }
        }

        /// (out, statistics)
        fn forward<F: Real>(&self, threads: usize) -> (Vec<f64>, Vec<f64>) {
            let cpu = cpu::<F>(threads);
            let heads = (self.shape.queries() + self.shape.keys()) / self.shape.head_dim;
            let mut out = unwritten(&cpu, self.qkv.len());
            let mut statistics = unwritten(&cpu, self.qkv.len() / self.shape.row() * heads);
            let (qkv, q, k) = (floats(&cpu, &self.qkv), floats(&cpu, &self.q_gain), floats(&cpu, &self.k_gain));
            let table = self.angles.as_ref().map(|angles| floats(&cpu, angles));
            let rotation = table.as_ref().map(|t| Rotation { table: t.view(), sequence: SEQUENCE, start: START });
            let (to, inverse) = (out.view_mut(), statistics.view_mut());
            cpu.head_norm(to, inverse, qkv.view(), q.view(), k.view(), rotation, self.shape, EPS);
            (values(&out), values(&statistics))
        }

        /// [dqkv, dq_gain, dk_gain]
        fn backward<F: Real>(&self, threads: usize) -> [Vec<f64>; 3] {
            let statistics = self.forward::<F>(threads).1;
            let cpu = cpu::<F>(threads);
            let mut there = floats(&cpu, &self.d);
            let mut dq = unwritten(&cpu, self.shape.head_dim);
            let mut dk = unwritten(&cpu, self.shape.head_dim);
            let (qkv, statistics) = (floats(&cpu, &self.qkv), floats(&cpu, &statistics));
            let (q, k) = (floats(&cpu, &self.q_gain), floats(&cpu, &self.k_gain));
            let (dq_gain, dk_gain) = (dq.view_mut(), dk.view_mut());
            let (q, k) = (q.view(), k.view());
            let table = self.angles.as_ref().map(|angles| floats(&cpu, angles));
            let rotation = table.as_ref().map(|t| Rotation { table: t.view(), sequence: SEQUENCE, start: START });
            let (d, qkv) = (there.view_mut(), qkv.view());
            cpu.head_norm_backward(d, dq_gain, dk_gain, qkv, statistics.view(), q, k, rotation, self.shape);
            [values(&there), values(&dq), values(&dk)]
        }
    }

    const SHAPE: HeadShape = HeadShape { kv_heads: 2, group: 3, head_dim: 5 };

    #[test]
    fn values_are_the_formulas() {
        let case = Case::new(3, SHAPE);
        let (out, _) = case.forward::<f64>(2);
        for (x, y) in case.qkv.chunks(SHAPE.row()).zip(out.chunks(SHAPE.row())) {
            for (h, (x, y)) in x.chunks(5).zip(y.chunks(5)).enumerate() {
                let deviation = (x.iter().map(|x| x * x).sum::<f64>() / 5.0 + EPS).sqrt();
                for j in 0..5 {
                    let expected = match h {
                        0..6 => x[j] / deviation * case.q_gain[j],
                        6..8 => x[j] / deviation * case.k_gain[j],
                        _ => x[j],
                    };
                    assert!((y[j] - expected).abs() < 1e-14, "head {h}");
                }
            }
        }
    }

    #[test]
    fn gradients() {
        let turned = HeadShape { head_dim: 6, ..SHAPE };
        for make in [|| Case::new(3, SHAPE), || Case::turned(SEQUENCE + 2, HeadShape { head_dim: 6, ..SHAPE })] {
            let case = make();
            assert!(case.angles.is_none() || case.shape == turned);
            let with = |change: &dyn Fn(&mut Case)| {
                let mut moved = make();
                change(&mut moved);
                dot(&case.d, &moved.forward::<f64>(1).0)
            };
            let [dqkv, dq_gain, dk_gain] = case.backward::<f64>(2);
            assert_gradient("qkv", &case.qkv, &dqkv, |x| with(&|c| c.qkv = x.to_vec()));
            assert_gradient("q_gain", &case.q_gain, &dq_gain, |g| with(&|c| c.q_gain = g.to_vec()));
            assert_gradient("k_gain", &case.k_gain, &dk_gain, |g| with(&|c| c.k_gain = g.to_vec()));
        }
    }

    /// One pass gives the bits of a norm and a rotation after it.
    #[test]
    fn turned_is_normalised_and_rotated() {
        let case = Case::turned(3 * SEQUENCE, HeadShape { kv_heads: 2, group: 2, head_dim: 38 });
        let (together, _) = case.forward::<f32>(2);
        let (normed, _) = Case { angles: None, ..Case::turned(3 * SEQUENCE, case.shape) }.forward::<f32>(2);
        let cpu = cpu::<f32>(2);
        let (mut qkv, table) = (floats(&cpu, &normed), floats(&cpu, case.angles.as_ref().unwrap()));
        let rotation = Rotation { table: table.view(), sequence: SEQUENCE, start: START };
        cpu.rotate(qkv.view_mut(), rotation, case.shape, false);
        assert_eq!(together, values(&qkv));
    }

    #[test]
    fn threads_change_no_bit_and_f32_is_near() {
        for shape in [37, 38].map(|head_dim| HeadShape { kv_heads: 2, group: 2, head_dim }) {
            let rows = 3 * BLOCK + 5;
            near(if shape.head_dim == 38 { Case::turned(rows, shape) } else { Case::new(rows, shape) });
        }
    }

    fn near(case: Case) {
        let (forward, backward) = (case.forward::<f32>(1), case.backward::<f32>(1));
        for threads in [2, 3] {
            assert_eq!(forward, case.forward::<f32>(threads));
            assert_eq!(backward, case.backward::<f32>(threads));
        }
        // Sums of 37 terms in 16 lanes, 37/16 + 4 additions, in one mean forward and two backward; values under 6.
        assert_f32("out", &forward.0, &case.forward::<f64>(1).0, 8.0, |_| 6.0);
        let exact = case.backward::<f64>(1);
        assert_f32("qkv", &backward[0], &exact[0], 16.0, |_| 6.0);
        // Sums over rows and heads, in blocks, of terms under 4.
        let additions = (4 * BLOCK + 4) as f64;
        for gain in [1, 2] {
            assert_f32("gain", &backward[gain], &exact[gain], additions, |_| 4.0 * (4.0 * BLOCK as f64).sqrt());
        }
    }

    #[test]
    fn copies_are_equal_in_bits() {
        let mut case = Case::new(BLOCK + 3, HeadShape { kv_heads: 2, group: 2, head_dim: 2 * 19 });
        for vector in [&mut case.qkv, &mut case.q_gain, &mut case.k_gain, &mut case.d] {
            *vector = (0..vector.len()).map(|i| vector[i / 2]).collect();
        }
        let same = |v: &[f64]| v.chunks(2).all(|c| c[0].to_bits() == c[1].to_bits());
        assert!(same(&case.forward::<f32>(2).0));
        assert!(case.backward::<f32>(2).iter().all(|g| same(g)));
    }
}
