//! Linear layers: y = x · Wᵀ + b.

mod column_sums;
mod cuda;

pub(super) use column_sums::column_sums;

use crate::backend::{
    Backend, Mut, Ref,
    cpu::{
        Cpu, Real,
        gemm::{gemm, gemm_on},
        math::vectorize,
        parallel::RowsMut,
    },
};

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearShape {
    /// Tokens.
    pub rows: usize,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
}

/// Linear layers. `x` is rows × inputs, `y` rows × outputs, `weight` outputs × inputs, `bias` outputs.
pub trait Linear: Backend {
    /// y = x · weightᵀ + bias.
    fn linear(
        &self,
        y: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: LinearShape,
    );

    /// dx = dy · weight.
    fn linear_backward_input(&self, dx: Mut<'_, Self>, dy: Ref<'_, Self>, weight: Ref<'_, Self>, shape: LinearShape);

    /// dweight = dyᵀ · x, dbias = column sums of dy; both overwritten.
    fn linear_backward_weight(
        &self,
        dweight: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        shape: LinearShape,
    );
}

/// Multiply-adds of a tile of rows, at the least: some 80 µs of work.
const TILE_WORK: usize = 3 << 21;
/// Rows of a tile, at the least. A sliver of a row or two would take the matrix-vector path, which sums otherwise.
const TILE_ROWS: usize = 32;
/// Tiles, at the most: larger ones run nearer to the machine's peak.
const TILES: usize = 8;

/// Rows of a tile, by the shape alone; the last tile is only a few rows smaller.
fn rows_per_tile(shape: LinearShape) -> usize {
    let enough = TILE_WORK.div_ceil((shape.inputs * shape.outputs).max(1)).max(TILE_ROWS);
    shape.rows.div_ceil((shape.rows / enough).clamp(1, TILES))
}

/// Rows of a partial sum of bias gradients.
const BLOCK: usize = 128;

impl<F: Real> Linear for Cpu<F> {
    fn linear(
        &self,
        y: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (x, weight, bias) = (x.as_slice::<F>(), weight.as_slice::<F>(), bias.map(|b| b.as_slice::<F>()));
        assert!(x.len() == rows * inputs && weight.len() == outputs * inputs && y.len() == rows * outputs);
        let y = RowsMut::new(y.into_slice::<F>(), outputs);
        // An output tile is still in cache when its bias is added.
        self.pool().for_rows(y, rows_per_tile(shape), |range, y| {
            let x = &x[range.start * inputs..range.end * inputs];
            let (x, weight) = ((x, (inputs, 1)), (weight, (1, inputs)));
            gemm((range.len(), outputs, inputs), F::ONE, x, weight, F::ZERO, (y, (outputs, 1)));
            if let Some(bias) = bias {
                vectorize!({
                    for y in y.chunks_exact_mut(outputs) {
                        y.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
                    }
                });
            }
        });
    }

    fn linear_backward_input(&self, dx: Mut<'_, Self>, dy: Ref<'_, Self>, weight: Ref<'_, Self>, shape: LinearShape) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (a, b) = ((dy.as_slice::<F>(), (outputs, 1)), (weight.as_slice::<F>(), (inputs, 1)));
        let c = (dx.into_slice::<F>(), (inputs, 1));
        gemm_on(self.pool(), (rows, inputs, outputs), F::ONE, a, b, F::ZERO, c);
    }

    fn linear_backward_weight(
        &self,
        dweight: Mut<'_, Self>,
        dbias: Option<Mut<'_, Self>>,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let (dy, x) = (dy.as_slice::<F>(), x.as_slice::<F>());
        let (a, b) = ((dy, (1, outputs)), (x, (inputs, 1)));
        let c = (dweight.into_slice::<F>(), (inputs, 1));
        gemm_on(self.pool(), (outputs, inputs, rows), F::ONE, a, b, F::ZERO, c);
        if let Some(dbias) = dbias {
            let dbias = dbias.into_slice::<F>();
            dbias.fill(F::ZERO);
            self.pool().add_sums(rows.div_ceil(BLOCK), dbias, |block, sums| {
                let dy = &dy[block * BLOCK * outputs..dy.len().min((block + 1) * BLOCK * outputs)];
                vectorize!({
                    for dy in dy.chunks_exact(outputs) {
                        sums.iter_mut().zip(dy).for_each(|(s, &d)| *s += d);
                    }
                });
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_f32, assert_gradient, cpu, dot, floats, random, unwritten, values};

    struct Case {
        x: Vec<f64>,
        weight: Vec<f64>,
        bias: Vec<f64>,
        dy: Vec<f64>,
        shape: LinearShape,
    }

    impl Case {
        fn new(rows: usize, inputs: usize, outputs: usize) -> Self {
            Self {
                x: random(1, rows * inputs),
                weight: random(2, outputs * inputs),
                bias: random(3, outputs),
                dy: random(4, rows * outputs),
                shape: LinearShape { rows, inputs, outputs },
            }
        }

        fn forward<F: Real>(&self, threads: usize, bias: bool) -> Vec<f64> {
            let cpu = cpu::<F>(threads);
            let mut y = unwritten(&cpu, self.dy.len());
            let (x, weight) = (floats(&cpu, &self.x), floats(&cpu, &self.weight));
            let bias = bias.then(|| floats(&cpu, &self.bias));
            cpu.linear(y.view_mut(), x.view(), weight.view(), bias.as_ref().map(|b| b.view()), self.shape);
            values(&y)
        }

        /// [dx, dweight, dbias]
        fn backward<F: Real>(&self, threads: usize) -> [Vec<f64>; 3] {
            let cpu = cpu::<F>(threads);
            let (x, weight, dy) = (floats(&cpu, &self.x), floats(&cpu, &self.weight), floats(&cpu, &self.dy));
            let mut dx = unwritten(&cpu, self.x.len());
            let mut dweight = unwritten(&cpu, self.weight.len());
            let mut dbias = unwritten(&cpu, self.bias.len());
            cpu.linear_backward_input(dx.view_mut(), dy.view(), weight.view(), self.shape);
            cpu.linear_backward_weight(dweight.view_mut(), Some(dbias.view_mut()), dy.view(), x.view(), self.shape);
            let both = values(&dweight);
            cpu.linear_backward_weight(dweight.view_mut(), None, dy.view(), x.view(), self.shape);
            assert_eq!(values(&dweight), both);
            [values(&dx), both, values(&dbias)]
        }
    }

    #[test]
    fn values_are_the_formula() {
        for (rows, inputs, outputs) in [(7, 5, 3), (1, 1, 1), (1, 67, 129), (33, 1, 17), (130, 19, 1)] {
            let case = Case::new(rows, inputs, outputs);
            let (y, plain) = (case.forward::<f64>(2, true), case.forward::<f64>(2, false));
            for i in 0..y.len() {
                let (r, o) = (i / outputs, i % outputs);
                let product = dot(&case.x[r * inputs..][..inputs], &case.weight[o * inputs..][..inputs]);
                assert!((plain[i] - product).abs() <= 1e-15 * inputs as f64, "{:?} [{r}, {o}]", case.shape);
                assert!((y[i] - product - case.bias[o]).abs() <= 1e-15 * (inputs + 1) as f64);
            }
        }
    }

    #[test]
    fn gradients() {
        let case = Case::new(7, 5, 3);
        let with = |change: &dyn Fn(&mut Case)| {
            let mut moved = Case::new(7, 5, 3);
            change(&mut moved);
            dot(&case.dy, &moved.forward::<f64>(1, true))
        };
        let [dx, dweight, dbias] = case.backward::<f64>(2);
        assert_gradient("x", &case.x, &dx, |x| with(&|c| c.x = x.to_vec()));
        assert_gradient("weight", &case.weight, &dweight, |w| with(&|c| c.weight = w.to_vec()));
        assert_gradient("bias", &case.bias, &dbias, |b| with(&|c| c.bias = b.to_vec()));
    }

    #[test]
    fn threads_change_no_bit_and_f32_is_near() {
        // Large enough for several tiles in each direction, and odd.
        let case = Case::new(517, 261, 387);
        let (forward, backward) = (case.forward::<f32>(1, true), case.backward::<f32>(1));
        for threads in [2, 3] {
            assert_eq!(forward, case.forward::<f32>(threads, true));
            assert_eq!(backward, case.backward::<f32>(threads));
        }
        // A sum of k products of numbers under 1: k additions, each with a rounding of partial sums that grow as √k.
        let bound = |what, result: &[f64], exact: &[f64], k: usize| {
            assert_f32(what, result, exact, (k + 1) as f64, |_| (k as f64).sqrt());
        };
        bound("y", &forward, &case.forward::<f64>(1, true), 261);
        let exact = case.backward::<f64>(1);
        bound("dx", &backward[0], &exact[0], 387);
        bound("dweight", &backward[1], &exact[1], 517);
        bound("dbias", &backward[2], &exact[2], 517);
    }

    /// `rows` × `columns` values, each element repeated `down` times along the rows and `right` along the columns.
    fn repeated(matrix: &[f64], columns: usize, down: usize, right: usize) -> Vec<f64> {
        let row = |row: &[f64]| row.iter().flat_map(|&v| vec![v; right]).collect::<Vec<_>>().repeat(down);
        matrix.chunks(columns).flat_map(row).collect()
    }

    /// Whether neighbours in runs of `k` are the same bits, along the columns.
    fn copies(matrix: &[f64], k: usize) -> bool {
        matrix.chunks(k).all(|c| c.iter().all(|v| v.to_bits() == c[0].to_bits()))
    }

    /// A widened layer whose units are copies: outputs, and gradients, of copies are the same bits wherever in a tile
    /// they are computed.
    #[test]
    fn copies_are_equal_in_bits() {
        for (rows, inputs, outputs, k) in
            [(67, 32, 48, 2), (130, 37, 67, 3), (513, 128, 192, 2), (9, 5, 7, 5), (129, 128, 193, 2)]
        {
            let narrow = Case::new(rows, inputs, outputs);
            let wide = Case {
                x: repeated(&narrow.x, inputs, 1, k),
                weight: repeated(&narrow.weight, inputs, k, k),
                bias: repeated(&narrow.bias, outputs, 1, k),
                dy: repeated(&narrow.dy, outputs, 1, k),
                shape: LinearShape { rows, inputs: inputs * k, outputs: outputs * k },
            };
            assert!(copies(&wide.forward::<f32>(2, true), k), "y of {:?}", wide.shape);
            let [dx, dweight, dbias] = wide.backward::<f32>(2);
            assert!(copies(&dx, k) && copies(&dbias, k), "dx or dbias of {:?}", wide.shape);
            assert!(copies(&dweight, k), "dweight along the inputs of {:?}", wide.shape);
            let rows: Vec<&[f64]> = dweight.chunks(inputs * k).collect();
            assert!(rows.chunks(k).all(|r| r.iter().all(|row| *row == r[0])), "dweight along the outputs");
        }
    }
}
