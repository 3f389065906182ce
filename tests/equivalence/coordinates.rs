//! The coordinate check (arXiv 2203.03466, appendix D.1; upscaling.md, "Transfer of hyperparameters"): under μP a few
//! steps change the logits by as much at every width, in standard parametrisation by more at greater width.

use crate::common::*;
use mupscale::{
    backend::cpu::Cpu,
    comm::Solo,
    config::Config,
    dims::Width,
    model::{Network, Weights, decoder::Generator, decoder::Recompute},
    mup::Parametrization,
    trainer::Trainer,
};

/// A change that grows as width^0.3 doubles over a factor of ten in width, far less than what standard parametrisation
/// shows (at least width^0.5), and far more than the scatter of μP's slopes about 0.
const GROWTH: f64 = 0.3;
const WIDTHS: [usize; 4] = [32, 64, 128, 256];
const BASE: usize = WIDTHS[0];
const STEPS: usize = 4;
const HEAD: usize = 16;

/// Logits at every position of a fixed sequence.
fn logits(trainer: &Trainer<Cpu<f32>>) -> Vec<f64> {
    let Network::Decoder(decoder) = &trainer.network else { panic!("a decoder") };
    let weights = Weights { table: trainer.network.table(), arena: trainer.state.weights.view() };
    let mut generator = Generator::new(&trainer.backend, decoder).unwrap();
    let tokens = numbers(99, VOCAB as u64, decoder.spec.context);
    let mut next = |token| generator.extend(&trainer.backend, decoder, weights, &[token as i32]).unwrap();
    tokens.into_iter().flat_map(&mut next).collect()
}

/// Mean |x_t − x_0| of the logits at a width.
fn change(arch: &str, optimizer: &str, kind: Parametrization, width: usize) -> f64 {
    let model = |width: usize| -> Config {
        let heads = width / HEAD;
        let text =
            format!("arch='{arch}'\nlayers=2\nresidual={width}\nffn={}\nkv_heads={heads}\ncontext=12", 4 * width);
        config(&text, optimizer, &["batch.size=4"])
    };
    let config = model(width);
    let mut meaning = meaning(&config);
    meaning.scaling.kind = kind;
    meaning.scaling.base = mupscale::config::resolve_model(
        model(BASE).model.as_ref().unwrap(),
        mupscale::config::DataShape::Tokens { vocab: VOCAB },
    )
    .unwrap()
    .dims()
    .clone();
    assert_eq!(meaning.scaling.base.get(Width::HeadDim), HEAD);
    let samples = samples(&config, &meaning.spec, mupscale::DType::F32);
    let backend = Cpu::<f32>::new(2).unwrap();
    let mut trainer = Trainer::new(backend, Box::new(Solo), &config, &meaning, samples, Recompute::None).unwrap();
    trainer.state.init(&trainer.backend, trainer.network.table(), &meaning.scaling, config.seed);
    let before = logits(&trainer);
    losses(&mut trainer, STEPS);
    let after = logits(&trainer);
    after.iter().zip(&before).map(|(a, b)| (a - b).abs()).sum::<f64>() / before.len() as f64
}

/// Slope of log change over log width, by least squares.
fn slope(arch: &str, optimizer: &str, kind: Parametrization) -> f64 {
    let points = WIDTHS.map(|width| ((width as f64).ln(), change(arch, optimizer, kind, width).ln()));
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let covariance: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    covariance / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}

#[test]
fn changes_do_not_grow_with_width() {
    for arch in ["gpt2", "llama"] {
        for optimizer in ["kind='adamw'\nlr=0.01", "kind='sgd'\nlr=2", "kind='lion'\nlr=0.005", "kind='muon'\nlr=0.05"]
        {
            let [mup, standard] =
                [Parametrization::Mup, Parametrization::Standard].map(|kind| slope(arch, optimizer, kind));
            assert!(mup < GROWTH, "{arch}, {optimizer:?}: changes grow as width^{mup:.3} under μP");
            assert!(standard > GROWTH, "{arch}, {optimizer:?}: the rate is too low to tell: width^{standard:.3}");
        }
    }
}
