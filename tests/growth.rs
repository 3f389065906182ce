//! Growth operators: which of them keep the function, where their weights come from, and what becomes of moments.

mod command;
mod common;

use common::*;
use mupscale::{
    Result,
    backend::cpu::Cpu,
    config::{Config, GrowthMethod, Moments, UpscaleConfig},
    model::param::Table,
    mup::Ratios,
    state::Meaning,
    trainer::Trainer,
    upscale::{self, Growth, Origin, RowPlan, Values},
};

/// A narrow model that has learned a little, and a checkpoint of it.
struct Narrow {
    config: Config,
    trainer: Trainer<Cpu<f64>>,
    meaning: Meaning,
    origin: Origin,
    _dir: tempfile::TempDir,
}

impl Narrow {
    fn new(model: &str, optimizer: &str) -> Self {
        let config = config(model, optimizer, &[]);
        let meaning = meaning(&config);
        let mut trainer = trainer(cpu(), &config, &meaning);
        if optimizer != GRADIENT {
            losses(&mut trainer, 3);
        }
        let dir = tempfile::tempdir().unwrap();
        let origin = checkpoint(&trainer, &meaning, &dir.path().join("narrow")).unwrap();
        Self { config, trainer, meaning, origin, _dir: dir }
    }

    fn grow(&self, by: &UpscaleConfig, moments: Moments) -> Result<(Growth, Trainer<Cpu<f64>>, Meaning)> {
        let growth = Growth::new(&self.meaning, by)?;
        let meaning = upscale::meaning(&self.meaning, Some(&growth))?;
        let samples = samples(&self.config, &meaning.spec, mupscale::DType::F64);
        let solo = Box::new(mupscale::comm::Solo);
        let mut wide = Trainer::new(cpu(), solo, &self.config, &meaning, samples, Default::default())?;
        let optimizer = Some(&meaning.optimizer);
        upscale::load(&wide.backend, &self.origin, Some(&growth), &mut wide.state, &meaning, optimizer, moments)?;
        wide.position = self.trainer.position;
        Ok((growth, wide, meaning))
    }

    /// By how much the first loss after the growth is another one.
    fn change(&mut self, by: &UpscaleConfig) -> f64 {
        let (_, mut wide, _) = self.grow(by, Moments::Reset).unwrap();
        let position = self.trainer.position;
        let before = read(&self.trainer.backend, &self.trainer.state.weights);
        let difference = losses(&mut wide, 1)[0] - losses(&mut self.trainer, 1)[0];
        write(&self.trainer.backend, &mut self.trainer.state.weights, &before);
        self.trainer.position = position;
        difference.abs()
    }
}

const ADAMW: &str = "kind='adamw'\nlr=0.02\nweight_decay=0.1";
/// As other losses' bound in f64 (tests/widening.rs).
const BOUND: f64 = 1e-9;

fn by(method: GrowthMethod, mlp: bool) -> UpscaleConfig {
    let all = UpscaleConfig { method, seed: 3, ..Default::default() };
    match method {
        // Padding changes what a norm sees of the residual stream.
        GrowthMethod::Zero if !mlp => UpscaleConfig { ffn: Some(3), kv_heads: Some(2), group: Some(2), ..all },
        GrowthMethod::Net2net if !mlp => UpscaleConfig { width: Some(3), group: Some(2), head_dim: Some(2), ..all },
        GrowthMethod::LlamaPro => UpscaleConfig { layers: Some(3), ffn: Some(2), ..all },
        GrowthMethod::Hypercloning => UpscaleConfig { width: Some(2), noise: 0.5, ..all },
        GrowthMethod::Stack => UpscaleConfig { layers: Some(2), ..all },
        _ if mlp => UpscaleConfig { hidden: Some(vec![3, 2]), ..all },
        _ => UpscaleConfig { width: Some(2), ..all },
    }
}

const PRESERVING: [GrowthMethod; 5] = [
    GrowthMethod::Mupscale,
    GrowthMethod::Hypercloning,
    GrowthMethod::Net2net,
    GrowthMethod::Zero,
    GrowthMethod::LlamaPro,
];

#[test]
fn those_that_say_so_keep_the_function() {
    for (name, model) in MODELS {
        let mlp = name == "mlp";
        let mut narrow = Narrow::new(model, ADAMW);
        for method in PRESERVING.into_iter().filter(|method| !(mlp && method.deepens())) {
            let found = narrow.change(&by(method, mlp));
            assert!(found <= BOUND, "{name}, {}: {found:e}", method.name());
        }
        for method in [GrowthMethod::Aki, GrowthMethod::Stack].into_iter().filter(|_| !mlp && name != "gpt2-bare") {
            let found = narrow.change(&by(method, mlp));
            assert!(found > 1e-3, "{name}: {} left the function as it was", method.name());
        }
    }
}

/// The gradient of the grown model is what its plan makes of the narrow one's: so moments, which are sums of gradients,
/// may be kept.
#[test]
fn kept_moments_are_those_of_the_grown_models_gradients() {
    for (name, model) in MODELS {
        let mlp = name == "mlp";
        for method in PRESERVING.into_iter().filter(|&m| !(mlp && m.deepens()) && m != GrowthMethod::Hypercloning) {
            let mut narrow = Narrow::new(model, GRADIENT);
            let (growth, mut wide, meaning) = narrow.grow(&by(method, mlp), Moments::Keep).unwrap();
            let expected = gradient(&mut narrow.trainer, &narrow.meaning).1;
            let found = gradient(&mut wide, &meaning).1;
            let (source, table) = (narrow.trainer.network.table(), wide.network.table());
            let largest = expected.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
            for (i, row) in table.rows.iter().enumerate() {
                let gamma = Ratios::new(row, &table.dims, &source.dims, meaning.scaling.scaled_readout()).gamma();
                let (predicted, copied) = made(&growth, source, table, i, Values::First(false), &expected);
                for (at, (&value, &copied)) in found[table.values(i)].iter().zip(&copied).enumerate() {
                    // What was padded or added has a gradient of its own.
                    let wanted = gamma * predicted[at];
                    assert!(
                        !copied || (value - wanted).abs() <= 1e-9 * largest,
                        "{name}, {}: {} {at}: {value} for {wanted}",
                        method.name(),
                        row.name
                    );
                }
            }
        }
    }
}

/// What the plan of row `i` makes of an arena of the source, and which values have a factor other than 0.
fn made(
    growth: &Growth,
    source: &Table,
    table: &Table,
    i: usize,
    values: Values,
    arena: &[f64],
) -> (Vec<f64>, Vec<bool>) {
    let plan = RowPlan::new(growth, source, table, i);
    let scales = plan.scales(values);
    let factor = |factors: &Option<Vec<f64>>, at: usize| factors.as_ref().map_or(1.0, |f| f[at]);
    let mut all = (Vec::new(), Vec::new());
    for (range, from) in &plan.parts {
        let (start, columns) = (source.offsets[*from], source.rows[*from].columns());
        for (r, c) in range.clone().flat_map(|r| (0..plan.columns.len()).map(move |c| (r, c))) {
            let scale = scales.whole * factor(&scales.rows, r) * factor(&scales.columns, c);
            all.0.push(scale * arena[start + plan.rows[r] as usize * columns + plan.columns[c] as usize]);
            all.1.push(scale != 0.0);
        }
    }
    all
}

fn values<'a>(table: &Table, arena: &'a [f64], name: &str) -> &'a [f64] {
    &arena[table.values(table.find(name).unwrap_or_else(|| panic!("no {name}")))]
}

#[test]
fn aki_takes_new_rows_from_the_block_above() {
    let model = "arch='llama'\nlayers=2\nresidual=2\nffn=2\nkv_heads=1\nhead_dim=2\ncontext=4\ninit_std=0.4";
    let narrow = Narrow::new(model, ADAMW);
    let by = UpscaleConfig { method: GrowthMethod::Aki, residual: Some(2), ffn: Some(2), ..Default::default() };
    let (_, wide, _) = narrow.grow(&by, Moments::Reset).unwrap();
    let source = read(&narrow.trainer.backend, &narrow.trainer.state.weights);
    let grown = read(&wide.backend, &wide.state.weights);
    let (narrow_table, table) = (narrow.trainer.network.table(), wide.network.table());
    let up = |block: usize| values(narrow_table, &source, &format!("blocks.{block}.mlp.up.weight"));
    for block in 0..2 {
        let own = up(block);
        // The copies of each unit lie side by side, the unit first; the last block has none above it.
        let above = up(1);
        let row = |w: &[f64], r: usize| [w[2 * r] / 2.0, w[2 * r] / 2.0, w[2 * r + 1] / 2.0, w[2 * r + 1] / 2.0];
        let expected = [row(own, 0), row(above, 0), row(own, 1), row(above, 1)].concat();
        assert_eq!(values(table, &grown, &format!("blocks.{block}.mlp.up.weight")), expected);
    }
    assert_ne!(up(0), up(1));
    // What lies in no block is repeated.
    let narrow_gain = values(narrow_table, &source, "norm_f.weight");
    let gain = values(table, &grown, "norm_f.weight");
    assert_eq!(gain, [narrow_gain[0], narrow_gain[0], narrow_gain[1], narrow_gain[1]]);
}

#[test]
fn blocks_are_stacked_or_inserted() {
    let narrow = Narrow::new(MODELS[0].1, ADAMW);
    let source = read(&narrow.trainer.backend, &narrow.trainer.state.weights);
    for (method, sources) in [(GrowthMethod::Stack, [0, 1, 0, 1]), (GrowthMethod::LlamaPro, [0, 0, 1, 1])] {
        let by = UpscaleConfig { method, layers: Some(2), ..Default::default() };
        let (_, wide, meaning) = narrow.grow(&by, Moments::Asymmetric).unwrap();
        let (from, table) = (narrow.trainer.network.table(), wide.network.table());
        let grown = read(&wide.backend, &wide.state.weights);
        let moments = read(&wide.backend, wide.state.first.as_ref().unwrap());
        for (block, of) in sources.into_iter().enumerate() {
            let is_new = sources[..block].contains(&of);
            let rows: Vec<&str> =
                from.rows.iter().filter_map(|row| row.name.strip_prefix(&format!("blocks.{of}."))).collect();
            for row in rows {
                let found = values(table, &grown, &format!("blocks.{block}.{row}"));
                let silent = method == GrowthMethod::LlamaPro
                    && is_new
                    && ["attention.o.weight", "attention.o.bias", "mlp.down.weight", "mlp.down.bias"].contains(&row);
                let expected = values(from, &source, &format!("blocks.{of}.{row}"));
                let same = found.iter().zip(expected).all(|(f, e)| if silent { *f == 0.0 } else { f == e });
                assert!(same, "{} block {block}: {row}", method.name());
                let still = values(table, &moments, &format!("blocks.{block}.{row}")).iter().all(|&m| m == 0.0);
                assert_eq!(still, is_new, "{} block {block}: moments of {row}", method.name());
            }
        }
        let mupscale::model::spec::Spec::Decoder(decoder) = &meaning.spec else { panic!() };
        assert_eq!(decoder.layers, 4);
        assert_eq!(values(table, &grown, "norm_f.weight"), values(from, &source, "norm_f.weight"));
    }
}

#[test]
fn asymmetric_moments_are_kept_for_units_that_were_there() {
    let narrow = Narrow::new(MODELS[0].1, ADAMW);
    let by = UpscaleConfig { width: Some(2), ..Default::default() };
    let (growth, kept, _) = narrow.grow(&by, Moments::Keep).unwrap();
    let (_, wide, _) = narrow.grow(&by, Moments::Asymmetric).unwrap();
    let of = |wide: &Trainer<Cpu<f64>>, second| {
        let moments = if second { &wide.state.second } else { &wide.state.first };
        read(&wide.backend, moments.as_ref().unwrap())
    };
    let table = wide.network.table();
    for second in [false, true] {
        let (kept, found) = (of(&kept, second), of(&wide, second));
        let mut counts = [0; 2];
        for i in 0..table.rows.len() {
            let plan = RowPlan::new(&growth, narrow.trainer.network.table(), table, i);
            let is_original = |map: &[u32], at: usize| !map[..at].contains(&map[at]);
            for (at, value) in found[table.values(i)].iter().enumerate() {
                let (r, c) = (at / plan.columns.len(), at % plan.columns.len());
                let original = is_original(&plan.rows, r) && is_original(&plan.columns, c);
                counts[usize::from(original)] += 1;
                let wanted = if original { kept[table.offsets[i] + at] } else { 0.0 };
                assert_eq!(*value, wanted, "{} {at}", table.rows[i].name);
            }
        }
        assert!(counts.into_iter().all(|count| count > 100), "{counts:?}");
    }
}

#[test]
fn what_a_method_cannot_do_is_refused_with_the_remedy() {
    use GrowthMethod::{Aki, Hypercloning, Mupscale, Net2net, Stack, Zero};
    let (decoder, mlp) = (Narrow::new(MODELS[0].1, ADAMW), Narrow::new(MODELS[6].1, ADAMW));
    let widths = |method| UpscaleConfig { method, width: Some(2), ..Default::default() };
    let refused = |narrow: &Narrow, by: UpscaleConfig, moments, part: &str| {
        let message = narrow.grow(&by, moments).err().expect("a refusal").to_string();
        assert!(message.contains(part), "{message}");
    };
    let reset = Moments::Reset;
    refused(&decoder, widths(Stack), reset, "give 2 or more");
    refused(&decoder, UpscaleConfig { layers: Some(2), ..widths(Mupscale) }, reset, "leave layers out");
    refused(&mlp, UpscaleConfig { method: Stack, layers: Some(2), ..Default::default() }, reset, "no blocks");
    refused(&mlp, widths(Aki), reset, "no blocks");
    refused(&decoder, UpscaleConfig { head_dim: Some(2), ..widths(Zero) }, reset, "kv_heads");
    let paired = mupscale::config::NoiseKind::Paired;
    refused(&decoder, UpscaleConfig { noise_kind: paired, ..widths(Net2net) }, reset, "equal number");
    let relative = mupscale::config::NoiseKind::Relative;
    refused(&decoder, UpscaleConfig { noise_kind: relative, ..widths(Hypercloning) }, reset, "leave noise_kind out");
    refused(&decoder, widths(Aki), Moments::Keep, "use reset");
}

const PLAN: &str = "out = 'g'\n[growth]\nwidth = 2\nnoise = 0.1\n[base]\nsteps = 6\nthreads = 1\ndata.path = 'held'\n\
                    batch.size = 2\noptimizer = { lr = 0.01 }\nschedule = { kind = 'linear', warmup = 2 }\n\
                    validation.every = 2\n\
                    model = { arch = 'gpt2', layers = 1, residual = 16, kv_heads = 2, context = 16 }\n\
                    [grown]\nsteps = 4\n";

/// All operators from one base, the shapes from scratch beside them; the same command again trains nothing.
#[test]
fn operators_are_compared_and_what_is_complete_stays() {
    let place = command::Place::new();
    place.ok("data tokenize corpus.txt --out held --val-fraction 0.2");
    place.write("plan.toml", PLAN);
    let results = place.ok("compare-growth -c plan.toml --json").json();
    let runs = results["runs"].as_array().unwrap();
    let names: Vec<&str> = runs.iter().map(|run| run["name"].as_str().unwrap()).collect();
    let operators = ["mupscale", "mupscale-reset", "mupscale-asymmetric", "hypercloning", "net2net", "aki", "zero"];
    let others = ["stack", "llama-pro", "scratch-wide", "scratch-wide-long", "scratch-deep", "scratch-deep-long"];
    assert_eq!(names, [&["base"][..], &operators, &others].concat());
    let number = |name: &str, key: &str| {
        let run = runs.iter().find(|run| run["name"] == name).unwrap();
        run[key].as_f64().unwrap_or_else(|| panic!("{name} has no {key}: {run}"))
    };
    assert_eq!(number("mupscale", "tokens"), 4.0 * 2.0 * 16.0);
    assert_eq!(number("mupscale", "parameters"), number("scratch-wide", "parameters"));
    assert_eq!(number("llama-pro", "parameters"), number("scratch-deep", "parameters"));
    assert_eq!(number("mupscale", "base_flops"), number("base", "flops"));
    let spent = number("mupscale", "flops") + number("base", "flops");
    let step = number("scratch-wide", "flops") / 4.0;
    assert!((0.0..=step).contains(&(number("scratch-wide-long", "flops") - spent)));
    // Nothing is lost by a growth that keeps the function.
    assert!(number("llama-pro", "loss") < number("scratch-deep", "loss"));
    let before = place.read("g/mupscale/metrics.jsonl");
    let table = place.ok("compare-growth -c plan.toml").out;
    assert!(table.contains("equal FLOPs") && place.read("g/mupscale/metrics.jsonl") == before, "{table}");
    assert!(String::from_utf8(place.read("g/growth.svg")).unwrap().contains("llama-pro"));
    place.write("bad.toml", PLAN.replace("[growth]\n", "[growth]\nmethod = 'aki'\n"));
    place.refuses("compare-growth -c bad.toml", &["growth.method = aki", "operators"]);
    let without =
        PLAN.replace("warmup = 2", "warmup = 0").replace("[growth]", "operators = ['mupscale-asymmetric']\n[growth]");
    place.write("cold.toml", without.replace("out = 'g'", "out = 'cold'"));
    let said = place.run("compare-growth -c cold.toml --json");
    assert!(said.code == 2 && said.err.contains("set schedule.warmup"), "{}", said.err);
}

#[test]
fn a_plan_says_what_a_training_takes() {
    let place = command::Place::new();
    let plan = place.ok("plan base --width 4 --tokens 100000 --gpus 2 --throughput 50 --json").json();
    // A block of width 64: 12 d² and 13 d of weights, norms and biases; the final norm; positions; tokens.
    let vocab = place.ok("inspect base --json").json()["vocab"].as_u64().unwrap();
    assert_eq!(plan["parameters"][1], 12 * 64 * 64 + 13 * 64 + 2 * 64 + 64 * (16 + vocab));
    assert_eq!(plan["seconds"], 2000.0);
    assert_eq!(plan["shrink"], 8);
    let (tuned, full) = (plan["tuning_flops"][0].as_f64().unwrap(), plan["tuning_flops"][1].as_f64().unwrap());
    assert_eq!(full, 20.0 * plan["flops"][1].as_f64().unwrap());
    assert!(tuned < full / 8.0, "{tuned} {full}");
    // Master weights and moments are 12 bytes a parameter, of which ZeRO-1 leaves half on each of two.
    let memory = |key: &str| plan["memory"][key].as_u64().unwrap();
    let parameters = plan["parameters"][1].as_u64().unwrap();
    let saved = memory("bf16") - memory("bf16_zero1");
    assert!((6 * parameters..7 * parameters).contains(&saved), "{saved} of {parameters}");
    assert!(memory("f32") > 16 * parameters);
    let text = place.ok("plan base --width 4 --tokens 100000").out;
    assert!(text.contains("2605.13405") && text.contains("over 2") && text.contains("give --throughput"), "{text}");
    place.refuses("plan base --width 4 --tokens 0", &["--tokens = 0"]);
    place.refuses("plan base --width 2 --tokens 9 --shrink 3", &["--shrink = 3", "residual 32"]);
    place.refuses("plan base --tokens 9", &["give a width"]);
}
