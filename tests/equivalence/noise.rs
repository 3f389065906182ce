//! Noise breaks the symmetry of copies; paired noise does so without a change of the function.

use crate::common::*;
use mupscale::config::{NoiseKind, UpscaleConfig};

fn growths(model: &str) -> Vec<UpscaleConfig> {
    let all = UpscaleConfig::default;
    if model == "mlp" {
        return [[2, 3], [3, 1]].map(|k| UpscaleConfig { hidden: Some(k.into()), ..all() }).into();
    }
    let unequal = UpscaleConfig {
        residual: Some(3),
        ffn: Some(5),
        kv_heads: Some(2),
        group: Some(2),
        head_dim: Some(3),
        ..all()
    };
    vec![UpscaleConfig { width: Some(2), ..all() }, UpscaleConfig { width: Some(3), ..all() }, unequal]
}

/// The loss at the first step after widening is the narrow model's with paired noise, for odd multiplicities too, and
/// with repeated blocks within one axis; then the models part. Independent noise changes it at once.
#[test]
fn paired_noise_keeps_the_function() {
    let dir = tempfile::tempdir().unwrap();
    for (name, model) in MODELS {
        let config = config(model, OPTIMIZERS[5].1, &[]);
        let meaning = meaning(&config);
        let mut narrow = trainer(cpu(), &config, &meaning);
        losses(&mut narrow, 5);
        let origin = checkpoint(&narrow, &meaning, &dir.path().join("narrow")).unwrap();
        let expected = losses(&mut narrow, 10);
        for growth in growths(name) {
            let run = |noise_kind, noise| {
                let growth = UpscaleConfig { noise, noise_kind, seed: 3, ..growth.clone() };
                losses(&mut widened(cpu(), &config, &origin, Some(&growth)).unwrap().0, 10)
            };
            let paired = run(NoiseKind::Paired, 0.5);
            let error = (paired[0] - expected[0]).abs();
            assert!(error <= 1e-12 * expected[0], "{name}, {growth:?}: {error:e}");
            assert!((paired[9] - expected[9]).abs() > 1e-6, "{name}, {growth:?}: the copies are still the same");
            let independent = run(NoiseKind::Independent, 0.5);
            assert!((independent[0] - expected[0]).abs() > 1e-6, "{name}, {growth:?}: no noise was added");
        }
    }
}
