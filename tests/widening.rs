//! The promise: a widened model trains as the narrow one does, step for step, for every architecture, optimizer and
//! axis (upscaling.md), and a repeated widening is one widening.

mod common;

use common::*;
use half::bf16;
use mupscale::{DType, backend::cpu::Cpu, config::UpscaleConfig, state::Moment};

/// Largest allowed difference of losses, nats, in f64 over 50 steps.
const BOUND: f64 = 1e-9;

/// Unequal multiplicities: residual, ffn, kv_heads, group, head_dim.
const GROWTHS: [[usize; 5]; 8] = [
    [2, 2, 2, 1, 1],
    [2, 2, 1, 1, 2],
    [3, 5, 2, 1, 1],
    [2, 4, 2, 1, 3],
    [2, 2, 1, 2, 1],
    [2, 1, 2, 3, 2],
    [1, 3, 1, 1, 1],
    [4, 1, 1, 1, 1],
];

fn growth([residual, ffn, kv_heads, group, head_dim]: [usize; 5]) -> UpscaleConfig {
    UpscaleConfig {
        residual: Some(residual),
        ffn: Some(ffn),
        kv_heads: Some(kv_heads),
        group: Some(group),
        head_dim: Some(head_dim),
        ..Default::default()
    }
}

fn growths(model: &str) -> Vec<UpscaleConfig> {
    if model == "mlp" {
        let hidden = [[2, 2], [3, 2], [1, 4]];
        return hidden.map(|k| UpscaleConfig { hidden: Some(k.into()), ..Default::default() }).into();
    }
    GROWTHS.map(growth).into()
}

/// Largest difference of losses between the narrow model and a widened one, both going on for 50 steps.
fn difference(narrow: &[f64], wide: &[f64]) -> f64 {
    narrow.iter().zip(wide).map(|(n, w)| (n - w).abs()).fold(0.0, f64::max)
}

/// Every optimizer and widening of one model.
fn matrix(index: usize) {
    let (name, model) = MODELS[index];
    let dir = tempfile::tempdir().unwrap();
    for (optimizer_name, optimizer) in OPTIMIZERS {
        for clip in ["0", "0.3"] {
            let config = config(model, optimizer, &[&format!("optimizer.clip={clip}")]);
            let meaning = meaning(&config);
            let mut narrow = trainer(cpu(), &config, &meaning);
            // Some steps first, so that moments are not zero when they are widened.
            let first = losses(&mut narrow, 5);
            let origin = checkpoint(&narrow, &meaning, &dir.path().join("narrow")).unwrap();
            let expected = losses(&mut narrow, 50);
            assert!(expected.iter().chain(&first).any(|&l| (l - first[0]).abs() > 1e-2), "nothing was learned");
            for growth in growths(name) {
                let (mut wide, _) = widened(cpu(), &config, &origin, Some(&growth)).unwrap();
                let found = difference(&expected, &losses(&mut wide, 50));
                assert!(found <= BOUND, "{name}, {optimizer_name}, clip {clip}, {growth:?}: {found:e}");
            }
        }
    }
}

macro_rules! matrices {
    ($($test:ident $index:literal)*) => { $(#[test] fn $test() { matrix($index); })* };
}
matrices! { gpt2 0 gpt2_grouped 1 gpt2_bare 2 llama 3 qwen2 4 qwen3 5 mlp 6 }

/// 2× and then 3× is 6×, in weights, moments and what follows.
#[test]
fn repeated_widening_is_one_widening() {
    let dir = tempfile::tempdir().unwrap();
    for (name, model) in MODELS {
        let config = config(model, OPTIMIZERS[5].1, &[]);
        let narrow_meaning = meaning(&config);
        let mut narrow = trainer(cpu(), &config, &narrow_meaning);
        losses(&mut narrow, 5);
        let origin = checkpoint(&narrow, &narrow_meaning, &dir.path().join("narrow")).unwrap();
        let by = |width| UpscaleConfig { width: Some(width), ..Default::default() };
        let (twice, twice_meaning) = widened(cpu(), &config, &origin, Some(&by(2))).unwrap();
        let twice = checkpoint(&twice, &twice_meaning, &dir.path().join("twice")).unwrap();
        let (mut steps, steps_meaning) = widened(cpu(), &config, &twice, Some(&by(3))).unwrap();
        let (mut once, once_meaning) = widened(cpu(), &config, &origin, Some(&by(6))).unwrap();
        assert_eq!(steps_meaning, once_meaning, "{name}");
        let found = difference(&losses(&mut once, 50), &losses(&mut steps, 50));
        assert!(found <= BOUND, "{name}: {found:e}");
    }
}

/// Without noise the copies of a unit stay equal to the last bit in f32, too: the symmetry breaks by noise alone.
#[test]
fn copies_stay_bit_identical_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    for (name, model) in MODELS {
        for (optimizer_name, optimizer) in OPTIMIZERS {
            let config = config(model, optimizer, &[]);
            let narrow_meaning = meaning(&config);
            let narrow = trainer(Cpu::<f32>::new(2).unwrap(), &config, &narrow_meaning);
            let origin = checkpoint(&narrow, &narrow_meaning, &dir.path().join("narrow")).unwrap();
            let by = UpscaleConfig { width: Some(2), ..Default::default() };
            let (mut wide, _) = widened(Cpu::<f32>::new(2).unwrap(), &config, &origin, Some(&by)).unwrap();
            losses(&mut wide, 20);
            let weights = read(&wide.backend, &wide.state.weights);
            let (wide_table, table) = (wide.network.table(), narrow.network.table());
            let times = mupscale::upscale::Growth::new(&origin.meaning, &by).unwrap().times;
            for (i, row) in wide_table.rows.iter().enumerate() {
                let map = |axis: usize| table.rows[i].axes.get(axis).map_or(vec![0], |a| a.repeat(&times));
                let (rows, columns) = (map(0), map(1));
                let values = &weights[wide_table.values(i)];
                let mut seen = std::collections::HashMap::new();
                for (at, value) in values.iter().enumerate() {
                    let source = (rows[at / columns.len()], columns[at % columns.len()]);
                    let first = *seen.entry(source).or_insert(*value);
                    assert_eq!(
                        first.to_bits(),
                        value.to_bits(),
                        "{name}, {optimizer_name}: {} differs at {at}",
                        row.name
                    );
                }
            }
        }
    }
}

/// A checkpoint with moments in bf16 goes on with moments in f32, and the other way round, rounded to nearest; widened too.
#[test]
fn moments_move_between_types() {
    let dir = tempfile::tempdir().unwrap();
    let half = || Cpu::<f32>::new(2).unwrap().with_moments(DType::BF16);
    let moments = |trainer: &mupscale::trainer::Trainer<Cpu<f32>>| {
        let arenas = [Moment::First, Moment::Second].map(|moment| trainer.state.moment(moment).unwrap());
        arenas.map(|arena| (arena.dtype(), read(&trainer.backend, arena)))
    };
    let config = config(MODELS[0].1, OPTIMIZERS[5].1, &[]);
    let meaning = meaning(&config);
    let mut narrow = trainer(half(), &config, &meaning);
    losses(&mut narrow, 5);
    let kept = moments(&narrow);
    assert!(kept.iter().all(|(dtype, values)| *dtype == DType::BF16 && values.iter().any(|&m| m != 0.0)));
    let origin = checkpoint(&narrow, &meaning, &dir.path().join("half")).unwrap();
    let (mut single, _) = widened(Cpu::<f32>::new(2).unwrap(), &config, &origin, None).unwrap();
    for ((dtype, loaded), (_, kept)) in moments(&single).iter().zip(&kept) {
        assert!(*dtype == DType::F32 && loaded == kept, "bf16 to f32 loses nothing");
    }
    losses(&mut single, 3);
    let nearest = |x: f64| bf16::from_f32(x as f32).to_f64();
    let origin = checkpoint(&single, &meaning, &dir.path().join("single")).unwrap();
    let (again, _) = widened(half(), &config, &origin, None).unwrap();
    for ((dtype, loaded), (_, exact)) in moments(&again).iter().zip(&moments(&single)) {
        assert_eq!(*dtype, DType::BF16);
        assert!(loaded.iter().zip(exact).all(|(&loaded, &exact)| loaded == nearest(exact)), "f32 to bf16");
        assert!(loaded != exact, "nothing was rounded");
    }
    let by = UpscaleConfig { width: Some(3), ..Default::default() };
    let (wide, _) = widened(half(), &config, &origin, Some(&by)).unwrap();
    let (expected, _) = widened(Cpu::<f32>::new(2).unwrap(), &config, &origin, Some(&by)).unwrap();
    for ((_, loaded), (_, exact)) in moments(&wide).iter().zip(&moments(&expected)) {
        assert!(loaded.iter().zip(exact).all(|(&loaded, &exact)| loaded == nearest(exact)), "widened to bf16");
    }
}
