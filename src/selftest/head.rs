//! The readout with its cross-entropy.

use super::agreement::{Agreement, get, put_integers, put_real, unwritten};
use crate::{
    Result,
    ops::head::{Head, ReadoutGradients, ReadoutShape},
};

/// Factor on every loss.
const SCALE: f64 = 0.3;

struct Inputs {
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    targets: Vec<i32>,
    shape: ReadoutShape,
}

impl Inputs {
    fn new(agreement: &Agreement, [rows, width, classes, padded]: [usize; 4], bias: bool) -> Self {
        let mut weight = agreement.normal(2, padded * width, 1.0);
        weight[classes * width..].fill(0.0);
        let mut b = agreement.normal(3, padded, 1.0);
        b[classes..].fill(0.0);
        // Every class in turn, and a token in five that does not count.
        let target = |r: usize| if r % 5 == 3 { -1 } else { (r * 7 % classes) as i32 };
        let mut x = agreement.normal(1, rows * width, 1.0);
        if rows > 3 {
            x[3 * width..4 * width].fill(f64::NAN);
        }
        let shape = ReadoutShape { rows, width, classes, padded, scale: 1.0 / (width as f64).sqrt() };
        Self { x, weight, bias: bias.then_some(b), targets: (0..rows).map(target).collect(), shape }
    }
}

/// losses, dx, dweight, dbias (empty without a bias), losses without gradients, logits.
fn run<B: Head>(backend: &B, inputs: &Inputs) -> Result<[Vec<f64>; 6]> {
    let shape = inputs.shape;
    let ReadoutShape { rows, width, classes, padded, .. } = shape;
    let (x, weight) = (put_real(backend, &inputs.x)?, put_real(backend, &inputs.weight)?);
    let bias = inputs.bias.as_ref().map(|bias| put_real(backend, bias)).transpose()?;
    let bias = || bias.as_ref().map(|bias| bias.view());
    let targets = put_integers(backend, &inputs.targets)?;
    let mut losses = unwritten(backend, backend.statistics(), rows)?;
    let mut alone = unwritten(backend, backend.statistics(), rows)?;
    let mut dx = unwritten(backend, backend.compute(), rows * width)?;
    let mut dweight = unwritten(backend, backend.gradient(), padded * width)?;
    let mut dbias = unwritten(backend, backend.gradient(), if inputs.bias.is_some() { padded } else { 0 })?;
    let mut logits = unwritten(backend, backend.compute(), rows * classes)?;
    let mut scratch = unwritten(backend, backend.compute(), backend.cross_entropy_scratch(shape))?;
    let gradients = ReadoutGradients {
        dx: dx.view_mut(),
        dweight: dweight.view_mut(),
        dbias: inputs.bias.is_some().then(|| dbias.view_mut()),
        scale: SCALE,
    };
    let (x, weight, targets) = (x.view(), weight.view(), targets.view());
    backend.cross_entropy(losses.view_mut(), Some(gradients), scratch.view_mut(), x, weight, bias(), targets, shape);
    backend.cross_entropy(alone.view_mut(), None, scratch.view_mut(), x, weight, bias(), targets, shape);
    backend.logits(logits.view_mut(), x, weight, bias(), shape);
    let [losses, dx, dweight] = [&losses, &dx, &dweight].map(|tensor| get(backend, tensor));
    let [dbias, alone, logits] = [&dbias, &alone, &logits].map(|tensor| get(backend, tensor));
    Ok([losses?, dx?, dweight?, dbias?, alone?, logits?])
}

/// What each result may be off by.
struct Bounds {
    losses: Vec<f64>,
    dx: Vec<f64>,
    dweight: Vec<f64>,
    dbias: Vec<f64>,
    logits: Vec<f64>,
}

impl Bounds {
    /// From the logits in f64. `real` is the rounding of the compute type.
    fn new(inputs: &Inputs, logits: &[f64], real: f64) -> Self {
        let ReadoutShape { rows, width, classes, padded, scale } = inputs.shape;
        let single = 2f64.powi(-24);
        let mut bounds = Self {
            losses: vec![0.0; rows],
            dx: vec![0.0; rows * width],
            dweight: vec![0.0; padded * width],
            dbias: vec![0.0; padded],
            logits: vec![0.0; rows * classes],
        };
        for (r, logits) in logits.chunks(classes).enumerate() {
            // A logit: a sum of `width` products in f32, times the scale, with the bias, rounded to its type.
            let sum = single * (width + 2) as f64 * 4.0 * (scale * (width as f64).sqrt() + 1.0);
            let of_logit = |z: f64| real * 1.01 * z.abs() + sum;
            for (bound, &z) in bounds.logits[r * classes..].iter_mut().zip(logits) {
                *bound = of_logit(z);
            }
            let Ok(target) = usize::try_from(inputs.targets[r]) else { continue };
            let max = logits.iter().fold(f64::NEG_INFINITY, |max, z| max.max(*z));
            let total: f64 = logits.iter().map(|z| (z - max).exp()).sum();
            // Relatively: of an exponential (its argument, up to 20 here, and the function), and of the sum of them.
            let e = of_logit(logits.iter().fold(0.0, |most, z| z.abs().max(most))) + 30.0 * single;
            let of_sum = e + single * (classes as f64 / 32.0 + 20.0);
            let loss = total.ln() + max - logits[target];
            bounds.losses[r] = e + of_sum + 4.0 * single * (loss.abs() + max.abs() + total.ln());
            for (c, z) in logits.iter().enumerate() {
                let p = (z - max).exp() / total;
                let onehot = f64::from(u8::from(c == target));
                let off = SCALE * (p * (e + of_sum + 2.0 * single) + (p - onehot).abs() * (real * 1.01 + 4.0 * single));
                bounds.dbias[c] += off + single * (rows as f64) * SCALE * (p - onehot).abs();
                for i in 0..width {
                    let (w, x) = (inputs.weight[c * width + i].abs(), inputs.x[r * width + i].abs());
                    let size = SCALE * (p - onehot).abs();
                    bounds.dx[r * width + i] += scale * w * (off + single * classes as f64 * size);
                    bounds.dweight[c * width + i] += scale * x * (off + single * rows as f64 * size);
                }
            }
        }
        bounds
    }
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let (real, gradient) = (agreement.rounding(), agreement.gradient_rounding());
    // The last one takes two chunks of tokens.
    let shapes = [
        [7, 5, 11, 64],
        [7, 5, 11, 11],
        [130, 33, 1000, 1024],
        [1, 1, 2, 2],
        [260, 3, 7, 8],
        [5, 8, 40_000, 40_064],
        [16_400, 3, 7, 8],
    ];
    for (i, sizes) in shapes.into_iter().enumerate() {
        let inputs = Inputs::new(agreement, sizes, i % 2 == 0);
        let (got, wanted) = (run(agreement.cuda(), &inputs)?, run(agreement.cpu(), &inputs)?);
        let bounds = Bounds::new(&inputs, &wanted[5], real);
        let name = |what: &str| format!("head {what} {sizes:?}");
        let rounded = |bound: &[f64], i: usize, value: f64| bound[i] + real * 1.01 * value.abs();
        agreement.compare(name("losses"), &got[0], &wanted[0], |i| bounds.losses[i]);
        agreement.compare(name("dx"), &got[1], &wanted[1], |i| rounded(&bounds.dx, i, wanted[1][i]));
        agreement.compare(name("dweight"), &got[2], &wanted[2], |i| bounds.dweight[i] + gradient * wanted[2][i].abs());
        agreement.compare(name("dbias"), &got[3], &wanted[3], |i| bounds.dbias[i] + gradient * wanted[3][i].abs());
        agreement.compare(name("losses alone"), &got[4], &got[0], |_| 0.0);
        agreement.compare(name("logits"), &got[5], &wanted[5], |i| bounds.logits[i]);
    }
    Ok(())
}
