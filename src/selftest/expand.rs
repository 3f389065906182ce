//! Expansion: the CPU's bits, in every type.

use super::agreement::{Agreement, get, put, unwritten};
use crate::{
    DType, Result,
    backend::{Backend, Tensor},
    ops::expand::{Expand, Noise, Source},
    rng::Stream,
};

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// An expansion of a matrix by maps of its rows and columns.
struct Case {
    rows: Vec<u32>,
    columns: Vec<u32>,
    source: [usize; 2],
    paired: Option<u32>,
    /// Whether rows and columns have factors of their own.
    scaled: bool,
}

impl Case {
    /// Every row and column of an r × c matrix copied by `times`, the copies of columns `apart`.
    fn new([r, c]: [u32; 2], [down, right]: [u32; 2], apart: u32) -> Self {
        let rows = (0..r * down).map(|i| i / down).collect();
        let columns = (0..c * right).map(|j| j / (apart * right) * apart + j % apart).collect();
        Self { rows, columns, source: [r as usize, c as usize], paired: (right > 1).then_some(right), scaled: false }
    }

    fn scaled(self) -> Self {
        Self { scaled: true, ..self }
    }

    fn noises(&self) -> Vec<Option<Noise>> {
        let noise = |paired| Some(Noise { stream: Stream::new(5, "blocks.0.mlp.up.weight"), amount: 0.25, paired });
        let mut all = vec![None, noise(None)];
        all.extend(self.paired.map(|_| noise(self.paired)));
        all
    }
}

fn integers<B: Backend>(backend: &B, values: &[u32]) -> Result<Tensor<B>> {
    Tensor::from_bytes(backend, DType::U32, bytemuck::cast_slice(values))
}

/// All values that a case makes of a source: in one go, and cut into ranges that start anywhere.
fn run<B: Expand>(backend: &B, case: &Case, [from, to]: [DType; 2], values: &[f64]) -> Result<Vec<f64>> {
    let (columns, len) = (case.columns.len(), case.rows.len() * case.columns.len());
    let values = put(backend, from, values)?;
    let (rows_map, columns_map) = (integers(backend, &case.rows)?, integers(backend, &case.columns)?);
    let factors = |count: usize| -> Vec<f64> { (0..count).map(|i| (i % 3) as f64 / 3.0).collect() };
    let tensor = |count| Tensor::from_bytes(backend, DType::F64, bytemuck::cast_slice(&factors(count)));
    let scales =
        case.scaled.then(|| Ok::<_, crate::Error>((tensor(case.rows.len())?, tensor(columns)?))).transpose()?;
    let mut all = Vec::new();
    for noise in case.noises() {
        for borders in [&[0, len][..], &[0, len / 3, len / 3 + 1, len - len / 5, len]] {
            let mut target = unwritten(backend, to, len)?;
            for border in borders.windows(2) {
                let source = Source {
                    values: values.view(),
                    columns: case.source[1],
                    rows_map: rows_map.view(),
                    columns_map: columns_map.view(),
                    scale: 1.0 / 3.0,
                    rows_scale: scales.as_ref().map(|(rows, _)| rows.view()),
                    columns_scale: scales.as_ref().map(|(_, columns)| columns.view()),
                };
                let range = border[0]..border[1];
                backend.expand(target.slice_mut(range), border[0], columns, source, noise.as_ref());
            }
            all.extend(get(backend, &target)?);
        }
    }
    Ok(all)
}

/// Constants, and constants with noise.
fn filled<B: Expand>(backend: &B, dtype: DType) -> Result<Vec<f64>> {
    let noise = Noise { stream: Stream::new(7, "w"), amount: 0.02, paired: None };
    let mut target = unwritten(backend, dtype, 5000)?;
    backend.fill(target.slice_mut(0..1001), 0, 1.0, None);
    backend.fill(target.slice_mut(1001..5000), 1001, 1.0, Some(&noise));
    get(backend, &target)
}

fn mean_squares<B: Expand>(backend: &B, dtype: DType, values: &[f64]) -> Result<Vec<f64>> {
    let x = put(backend, dtype, values)?;
    let mut out = unwritten(backend, DType::F64, 4)?;
    for (i, len) in [0, 5, 1 << 16, values.len()].into_iter().enumerate() {
        backend.mean_square(out.slice_mut(i..i + 1), x.slice(0..len));
    }
    get(backend, &out)
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let (cuda, exact) = (agreement.cuda(), |_| 0.0);
    let cases = [
        Case::new([5, 37], [1, 1], 1),
        Case::new([5, 37], [2, 2], 1),
        Case::new([3, 32], [2, 3], 16),
        Case::new([50, 1], [3, 1], 1),
        Case::new([2, 700], [1, 4], 1),
        Case::new([5, 37], [2, 2], 1).scaled(),
        Case::new([50, 1], [3, 1], 1).scaled(),
    ];
    for from in FLOATS {
        let values = agreement.normal(1, 1400, 1.0);
        for to in FLOATS {
            let (mut got, mut wanted) = (Vec::new(), Vec::new());
            for case in &cases {
                let values = &values[..case.source[0] * case.source[1]];
                got.extend(run(cuda, case, [from, to], values)?);
                wanted.extend(run(agreement.cpu(), case, [from, to], values)?);
            }
            agreement.compare(format!("expand {from} to {to}"), &got, &wanted, exact);
        }
        let wanted = filled(agreement.cpu(), from)?;
        agreement.compare(format!("expand fill {from}"), &filled(cuda, from)?, &wanted, exact);
        let values = agreement.normal(2, (3 << 16) + 77, 1.0);
        let wanted = mean_squares(agreement.cpu(), from, &values)?;
        agreement.compare(format!("expand mean square {from}"), &mean_squares(cuda, from, &values)?, &wanted, exact);
    }
    Ok(())
}
