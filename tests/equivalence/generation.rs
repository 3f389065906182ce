//! Generation computes what training computes.

use crate::common::*;
use mupscale::{
    DType,
    feed::HostBatch,
    model::{Network, Weights, decoder::Generator},
};

/// −log softmax(logits)[target].
fn cross_entropy(logits: &[f64], target: i32) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logits.iter().map(|l| (l - largest).exp()).sum::<f64>().ln() - logits[target as usize]
}

/// With the cache of keys and values, token by token or in pieces, the logits are those of all tokens at once, and their
/// losses those of a training step.
#[test]
fn cached_logits_are_those_of_training() {
    for (name, model) in MODELS.iter().filter(|(name, _)| *name != "mlp") {
        let config = config(model, GRADIENT, &["batch.size=2"]);
        let meaning = meaning(&config);
        let mut trainer = trainer(cpu(), &config, &meaning);
        let count = 2 * meaning.spec.context();
        let mut batch =
            HostBatch { dtype: DType::I32, inputs: vec![0; count * 4], targets: vec![0; count], first_key: None };
        samples(&config, &meaning.spec, mupscale::DType::F64).train(0, &mut batch);
        let inputs: Vec<i32> = bytemuck::pod_collect_to_vec(&batch.inputs);

        let mut sum = 0.0;
        let Network::Decoder(decoder) = &trainer.network else { panic!("a decoder") };
        let weights = Weights::new(trainer.network.table(), trainer.state.weights.view());
        let mut generator = Generator::new(&trainer.backend, decoder).unwrap();
        let extend = |generator: &mut Generator<_>, tokens: &[i32]| {
            generator.extend(&trainer.backend, decoder, weights, tokens).unwrap()
        };
        for (tokens, targets) in inputs.chunks(count / 2).zip(batch.targets.chunks(count / 2)) {
            generator.clear();
            let one_by_one: Vec<_> = tokens.iter().map(|&token| extend(&mut generator, &[token])).collect();
            for (i, expected) in one_by_one.iter().enumerate() {
                sum += cross_entropy(expected, targets[i]);
                generator.clear();
                let at_once = extend(&mut generator, &tokens[..=i]);
                generator.clear();
                extend(&mut generator, &tokens[..1]);
                let in_pieces = if i > 0 { extend(&mut generator, &tokens[1..=i]) } else { at_once.clone() };
                for ((a, b), c) in at_once.iter().zip(&in_pieces).zip(expected) {
                    assert!((a - c).abs() <= 1e-12 && (b - c).abs() <= 1e-12, "{name}: token {i}: {a} {b} {c}");
                }
            }
        }
        let (found, expected) = (sum / count as f64, losses(&mut trainer, 1)[0]);
        assert!((found - expected).abs() <= 1e-12, "{name}: {found} is not the loss of training, {expected}");
    }
}
