//! The coordinate check (arXiv 2203.03466, appendix D.1; upscaling.md, "Transfer of hyperparameters"): under μP a few
//! steps change the logits by as much at every width, in standard parametrisation by more at greater width.

use crate::common::{VOCAB, config, losses, meaning, numbers, samples};
use mupscale::{
    backend::cpu::Cpu,
    comm::Solo,
    config::{Config, DataShape, resolve_model},
    model::{Network, Weights, decoder::Generator, decoder::Recompute},
    mup::Parametrization,
    trainer::Trainer,
};

/// Between what is seen under μP (slopes of −0.01 to 0.06) and in standard parametrisation (0.5 to 1.7).
const GROWTH: f64 = 0.3;
/// Rates at which standard parametrisation fails, and not higher: where a step changes the residual stream by more than
/// all it held, the norms hide how much more, and a hidden matrix with the wrong rate would pass.
const OPTIMIZERS: [&str; 4] =
    ["kind='adamw'\nlr=3e-4", "kind='sgd'\nlr=0.1", "kind='lion'\nlr=3e-4", "kind='muon'\nlr=1e-3"];
const WIDTHS: [usize; 4] = [32, 64, 128, 256];
const BASE: usize = WIDTHS[0];
const STEPS: usize = 4;
const HEAD: usize = 16;

/// Logits at every position of a fixed sequence.
fn logits(trainer: &Trainer<Cpu<f32>>) -> Vec<f64> {
    let Network::Decoder(decoder) = &trainer.network else { panic!("a decoder") };
    let weights = Weights::new(trainer.network.table(), trainer.state.weights.view());
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
    let base = resolve_model(model(BASE).model.as_ref().unwrap(), DataShape::Tokens { vocab: VOCAB }).unwrap();
    meaning.scaling.base = base.dims().clone();
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
        for optimizer in OPTIMIZERS {
            let [mup, standard] =
                [Parametrization::Mup, Parametrization::Standard].map(|kind| slope(arch, optimizer, kind));
            assert!(mup < GROWTH, "{arch}, {optimizer:?}: changes grow as width^{mup:.3} under μP");
            assert!(standard > GROWTH, "{arch}, {optimizer:?}: the rate is too low to tell: width^{standard:.3}");
        }
    }
}
