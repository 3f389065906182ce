//! However a step is computed, its bits are the same.

use crate::common::*;
use mupscale::{
    backend::cpu::Cpu,
    comm::{Comm, Solo, threads::Threads},
    config::Config,
    model::decoder::Recompute,
    ops::Ops,
    trainer::Trainer,
};

const STEPS: usize = 5;
const ADAMW: &str = OPTIMIZERS[5].1;
const MUON: &str = OPTIMIZERS[7].1;

/// Weights, as bits of the f64 that they are equal to, after some steps.
fn bits<B: Ops>(mut trainer: Trainer<B>) -> Vec<u64> {
    losses(&mut trainer, STEPS);
    read(&trainer.backend, &trainer.state.weights).into_iter().map(f64::to_bits).collect()
}

fn solo<B: Ops>(backend: B, config: &Config, recompute: Recompute) -> Trainer<B> {
    trainer_of(backend, Box::new(Solo), config, &meaning(config), recompute)
}

/// What is computed again is what was thrown away.
#[test]
fn recomputing_is_keeping() {
    fn check<B: Ops>(backend: impl Fn() -> B, name: &str, config: &Config) {
        let [none, mlp, block] =
            [Recompute::None, Recompute::Mlp, Recompute::Block].map(|way| solo(backend(), config, way));
        assert!(block.plan.bytes() < mlp.plan.bytes() && mlp.plan.bytes() < none.plan.bytes(), "{name}: nothing saved");
        let kept = bits(none);
        assert!(kept == bits(mlp), "{name}: recompute = mlp");
        assert!(kept == bits(block), "{name}: recompute = block");
    }
    for (name, model) in MODELS.iter().filter(|(name, _)| *name != "mlp") {
        // Three layers, and enough tokens, so that what is kept of a block outweighs one block's scratch.
        let layers = "model.layers=3";
        for sets in [&[layers][..], &[layers, "data.reset_attention=true", "batch.micro_batches=2"]] {
            let config = config(model, ADAMW, sets);
            check(cpu, name, &config);
            check(|| Cpu::<f32>::new(2).unwrap(), name, &config);
        }
    }
}

/// Runs `world` ranks as threads; weights and held-out loss of each.
fn ranks<B: Ops>(backend: fn() -> B, world: usize, config: &Config) -> Vec<(Vec<f64>, f64)> {
    let run = |comm: Threads| {
        let comm: Box<dyn Comm<B>> = Box::new(comm);
        let mut trainer = trainer_of(backend(), comm, config, &meaning(config), Recompute::None);
        losses(&mut trainer, STEPS);
        let (held_out, _) = trainer.validate(0).unwrap().unwrap();
        (read(&trainer.backend, &trainer.state.weights), held_out)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = Threads::group(world).into_iter().map(|comm| scope.spawn(move || run(comm))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

fn same(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// N ranks with one micro-batch each are one rank with N, to the last bit where N is a power of two.
#[test]
fn ranks_are_micro_batches() {
    fn check<B: Ops>(backend: fn() -> B, name: &str, config: &Config) {
        let one = ranks(backend, 1, config).remove(0);
        for world in [2, 4] {
            for (rank, (weights, held_out)) in ranks(backend, world, config).into_iter().enumerate() {
                assert!(same(&weights, &one.0), "{name}: rank {rank} of {world}");
                assert!((held_out - one.1).abs() <= 1e-12 * one.1, "{name}: {held_out} held out, not {}", one.1);
            }
        }
    }
    for (name, model) in MODELS {
        for optimizer in [ADAMW, MUON] {
            let config = config(model, optimizer, &["batch.micro_batches=4", "data.ignore=3"]);
            check(cpu, name, &config);
            check(|| Cpu::<f32>::new(1).unwrap(), name, &config);
        }
    }
}

/// Three ranks add in another order: the same to rounding, and all ranks the same to the last bit.
#[test]
fn three_ranks_agree_to_rounding() {
    for (name, model) in MODELS {
        let config = config(model, OPTIMIZERS[0].1, &["batch.micro_batches=4"]);
        let (one, _) = ranks(cpu, 1, &config).remove(0);
        let three = ranks(cpu, 3, &config);
        assert!(three.iter().all(|(weights, _)| same(weights, &three[0].0)), "{name}: ranks differ");
        let largest = one.iter().fold(0.0f64, |m, w| m.max(w.abs()));
        let error = one.iter().zip(&three[0].0).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error <= 1e-12 * largest, "{name}: {error:e}");
    }
}

/// The number of threads changes no bit.
#[test]
fn threads_change_nothing() {
    let mut cases: Vec<(String, Config)> = MODELS
        .iter()
        .flat_map(|(name, model)| [ADAMW, MUON].map(|optimizer| (name.to_string(), config(model, optimizer, &[]))))
        .collect();
    // Large enough that every operation is divided.
    for (arch, optimizer) in [("gpt2", MUON), ("llama", ADAMW)] {
        let model = format!("arch='{arch}'\nlayers=1\nresidual=64\nkv_heads=4\ncontext=64\nvocab=300\ninit_std=0.1");
        cases.push((format!("large {arch}"), config(&model, optimizer, &["batch.size=8"])));
    }
    for (name, config) in cases {
        let [one, two, three] =
            [1, 2, 3].map(|threads| bits(solo(Cpu::<f32>::new(threads).unwrap(), &config, Recompute::None)));
        assert!(one == two, "{name}: two threads");
        assert!(one == three, "{name}: three threads");
    }
}
