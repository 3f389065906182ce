//! ZeRO: ranks that each update a part of the weights do, bit for bit, what ranks do that each update all of them.

use crate::common::*;
use mupscale::{
    backend::cpu::Cpu,
    comm::{Comm, threads::Threads},
    config::{Config, Moments, UpscaleConfig},
    model::{Network, decoder::Recompute},
    ops::Ops,
    state::Moment,
    trainer::{self, StepResult, Trainer},
    upscale::{self, Growth, Origin},
};

const STEPS: usize = 4;

/// What a rank ends with.
struct End {
    /// All weights.
    weights: Vec<u64>,
    /// Elements of the arena that it updates, and its moments of them.
    owned: std::ops::Range<usize>,
    moments: Vec<Vec<u64>>,
    steps: Vec<StepResult>,
    held_out: u64,
    planned: usize,
}

fn bits<B: Ops>(backend: &B, tensor: &mupscale::backend::Tensor<B>) -> Vec<u64> {
    read(backend, tensor).into_iter().map(f64::to_bits).collect()
}

fn end<B: Ops>(mut trainer: Trainer<B>) -> End {
    let mut steps = Vec::new();
    for step in 0..STEPS {
        steps.extend(trainer.step().unwrap());
        // In the midst of training as well, as a validation reads the weights.
        if step == 1 {
            trainer.gather().unwrap();
        }
    }
    while let Some(result) = trainer.collect().unwrap() {
        steps.push(result);
    }
    let (held_out, _) = trainer.validate(0).unwrap().unwrap();
    let Trainer { backend, state, plan, .. } = &trainer;
    let moments = Moment::ALL.iter().filter_map(|&m| Some(bits(backend, state.moment(m)?))).collect();
    End {
        weights: bits(backend, &state.weights),
        owned: state.owned.clone(),
        moments,
        steps: steps.into_iter().map(|step| StepResult { seconds: 0.0, ..step }).collect(),
        held_out: held_out.to_bits(),
        planned: plan.bytes(),
    }
}

/// Runs ranks as threads.
fn ranks<B: Ops>(world: usize, make: &(dyn Fn(Box<dyn Comm<B>>) -> Trainer<B> + Sync)) -> Vec<End> {
    std::thread::scope(|scope| {
        let run = |comm: Threads| scope.spawn(move || end(make(Box::new(comm))));
        let threads: Vec<_> = Threads::group(world).into_iter().map(run).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

/// The same ranks with ZeRO and without, and one rank alone.
fn check<B: Ops>(backend: fn() -> B, what: &str, config: &Config, worlds: &[usize]) {
    let meaning = meaning(config);
    let with = |zero, world| {
        let mut config = config.clone();
        config.comm.zero = zero;
        let make = |comm| trainer_of(backend(), comm, &config, &meaning, Recompute::None);
        ranks(world, &make)
    };
    let one = with(true, 1).remove(0);
    assert_eq!(one.owned, 0..one.weights.len(), "one rank updates everything");
    for &world in worlds {
        let (whole, parts) = (with(false, world), with(true, world));
        same(&format!("{what}, {world} ranks"), &whole, &parts);
        if world.is_power_of_two() {
            assert!(parts[0].weights == one.weights, "{what}: {world} ranks are not one");
        }
    }
}

/// All ranks end with the weights that they end with in `whole`, and each with its part of the moments.
fn same(what: &str, whole: &[End], parts: &[End]) {
    let mut next = 0;
    for (rank, (part, whole)) in parts.iter().zip(whole).enumerate() {
        assert!(part.weights == whole.weights, "{what}: weights of rank {rank}");
        assert_eq!(part.steps, whole.steps, "{what}: rank {rank}");
        assert_eq!(part.held_out, whole.held_out, "{what}: held out, rank {rank}");
        assert_eq!(part.owned.start, next, "{what}: parts follow on each other");
        assert_eq!(part.moments.len(), whole.moments.len());
        for (part_of, moment) in part.moments.iter().zip(&whole.moments) {
            assert!(*part_of == moment[part.owned.clone()], "{what}: moments of rank {rank}");
        }
        let saves = part.owned.len() < whole.weights.len() && !part.moments.is_empty();
        assert_eq!(part.planned < whole.planned, saves, "{what}: memory of rank {rank}");
        next = part.owned.end;
    }
    assert_eq!(next, whole[0].weights.len(), "{what}: somebody updates every weight");
}

#[test]
fn parts_of_any_model_are_the_whole() {
    for (name, model) in MODELS {
        for (optimizer_name, optimizer) in [OPTIMIZERS[5], OPTIMIZERS[7]] {
            let config = config(model, optimizer, &["batch.micro_batches=8", "data.ignore=3", "batch.size=2"]);
            let what = format!("{name}, {optimizer_name}");
            check(cpu, &what, &config, &[2, 3, 8]);
            check(|| Cpu::<f32>::new(1).unwrap(), &what, &config, &[4]);
        }
    }
}

/// Tensors that are cut within, by every optimizer.
#[test]
fn parts_of_tensors_are_the_whole() {
    let model = "arch='mlp'\nhidden=[300, 300]";
    for (name, optimizer) in OPTIMIZERS {
        let config = config(model, optimizer, &["batch.micro_batches=4"]);
        check(cpu, name, &config, &[3]);
        check(|| Cpu::<f32>::new(1).unwrap(), name, &config, &[2, 4]);
    }
}

/// Moments in bf16 are rounded by an element's place in the whole arena.
#[test]
fn parts_round_as_the_whole() {
    for (name, optimizer) in [OPTIMIZERS[4], OPTIMIZERS[7]] {
        let config = config("arch='mlp'\nhidden=[300, 300]", optimizer, &["batch.micro_batches=4"]);
        check(|| Cpu::<f32>::new(1).unwrap().with_moments(mupscale::DType::BF16), name, &config, &[3, 4]);
    }
}

/// Who updates what is decided by cost; a matrix of Muon's is never cut, other tensors are.
#[test]
fn parts_are_balanced() {
    let large = "arch='mlp'\nhidden=[700, 700]";
    for (name, optimizer) in [OPTIMIZERS[5], OPTIMIZERS[7]] {
        let config = config(large, optimizer, &["batch.micro_batches=4"]);
        let meaning = meaning(&config);
        let network = Network::new(&cpu(), &meaning.spec, &meaning.scaling).unwrap();
        let make = |comm| trainer_of(cpu(), comm, &config, &meaning, Recompute::None);
        let parts = ranks(4, &make);
        let lengths: Vec<_> = parts.iter().map(|part| part.owned.len()).collect();
        let matrix = network.table().values(network.table().find("layers.1.weight").expect("a hidden matrix"));
        let owners = parts.iter().filter(|p| p.owned.start < matrix.end && matrix.start < p.owned.end).count();
        let (least, most) = (lengths.iter().min().unwrap(), lengths.iter().max().unwrap());
        match name {
            "muon" => assert_eq!(owners, 1, "{lengths:?}"),
            _ => assert!(owners == 4 && *most < 2 * *least, "{lengths:?}"),
        }
        let memory = |rank| trainer::memory(&cpu(), &network, &config, &meaning, rank, 3, Recompute::None);
        assert!((0..4).all(|rank| memory((rank, 4)) < parts[rank].planned), "the plan is known beforehand");
    }
}

/// A step that is not finite is left out by all, and all know where it was not.
#[test]
fn a_bad_step_is_left_out_by_all() {
    for on_nan in ["skip", "stop"] {
        let sets = ["batch.micro_batches=4", &format!("on_nan={on_nan}"), "optimizer.lr=1e300"];
        let config = config(MODELS[0].1, OPTIMIZERS[0].1, &sets);
        let meaning = meaning(&config);
        let end = |zero| {
            let mut config = config.clone();
            config.comm.zero = zero;
            ranks(3, &|comm| trainer_of(cpu(), comm, &config, &meaning, Recompute::None))
        };
        let (whole, parts) = (end(false), end(true));
        assert!(whole[0].steps.iter().any(|step| step.bad.is_some()), "everything was finite");
        for part in &parts {
            assert_eq!(format!("{:?}", part.steps), format!("{:?}", whole[0].steps));
            assert!(part.weights == whole[0].weights, "{on_nan}");
        }
    }
}

/// Each rank widens what it owns: the same weights, moments and noise, and the same training, as without ZeRO.
#[test]
fn widened_in_parts_is_widened_whole() {
    let dir = tempfile::tempdir().unwrap();
    let growth = |model: &str| match model {
        "mlp" => UpscaleConfig { hidden: Some([3, 2].into()), noise: 0.2, ..Default::default() },
        _ => UpscaleConfig { residual: Some(3), ffn: Some(2), kv_heads: Some(2), noise: 0.2, ..Default::default() },
    };
    for (i, (name, model)) in MODELS.into_iter().enumerate() {
        let config = config(model, OPTIMIZERS[[3, 4, 5, 6, 7, 8, 0][i]].1, &["batch.micro_batches=4"]);
        let mut narrow = trainer(cpu(), &config, &meaning(&config));
        losses(&mut narrow, 3);
        let origin = checkpoint(&narrow, &meaning(&config), &dir.path().join(name)).unwrap();
        let start = |zero| {
            let mut config = config.clone();
            config.comm.zero = zero;
            ranks(4, &|comm| widened_rank(comm, &config, &origin, &growth(name)))
        };
        same(name, &start(false), &start(true));
    }
}

fn widened_rank(
    comm: Box<dyn Comm<Cpu<f64>>>,
    config: &Config,
    origin: &Origin,
    growth: &UpscaleConfig,
) -> Trainer<Cpu<f64>> {
    let growth = Growth::new(&origin.meaning, growth).unwrap();
    let meaning = upscale::meaning(&origin.meaning, Some(&growth)).unwrap();
    let samples = samples(config, &meaning.spec, mupscale::DType::F64);
    let mut trainer = Trainer::new(cpu(), comm, config, &meaning, samples, Recompute::None).unwrap();
    let (optimizer, state) = (Some(&meaning.optimizer), &mut trainer.state);
    upscale::load(&trainer.backend, origin, Some(&growth), state, &meaning, optimizer, Moments::Keep).unwrap();
    trainer.position = origin.progress.position;
    trainer
}
