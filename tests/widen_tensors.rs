//! `widen-tensors`: a model that mupscale cannot train keeps its function, and its optimizer gets its multipliers.
//! (`tools/widen_resnet.py` trains a PyTorch ResNet so.)

mod command;

use command::Place;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::BTreeMap;

/// Tensors by name: shape and values.
type Named = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// A network: y = fc2 · relu(fc1 · emb[token] + fc1.bias), and what stands beside it.
fn network() -> Named {
    let value = |seed: usize, i: usize| ((i * 37 + seed * 101) % 23) as f64 / 8.0 - 1.375;
    let shapes = [
        ("emb.weight", vec![5, 2]),
        ("fc1.bias", vec![6]),
        ("fc1.weight", vec![6, 2]),
        ("fc2.weight", vec![4, 6]),
        ("norm.running_var", vec![6]),
    ];
    let tensor = |(seed, (name, shape)): (usize, (&str, Vec<usize>))| {
        let values = (0..shape.iter().product()).map(|i| value(seed, i)).collect();
        (name.to_string(), (shape, values))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn save(place: &Place, file: &str, tensors: &Named) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| (name.clone(), shape.clone(), bytemuck::cast_slice(values).to_vec()))
        .collect();
    let steps = 7i64.to_le_bytes();
    let mut views: Vec<_> = bytes
        .iter()
        .map(|(name, shape, bytes)| (name.clone(), TensorView::new(Dtype::F64, shape.clone(), bytes).unwrap()))
        .collect();
    views.push(("steps".into(), TensorView::new(Dtype::I64, vec![], &steps).unwrap()));
    place.write(file, safetensors::serialize(views, None).unwrap());
}

fn load(place: &Place, file: &str) -> Named {
    let bytes = place.read(file);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = tensors.iter().filter(|(_, view)| view.dtype() == Dtype::F64);
    assert_eq!(tensors.tensor("steps").unwrap().data(), 7i64.to_le_bytes());
    floats.map(|(n, v)| (n.to_string(), (v.shape().to_vec(), bytemuck::pod_collect_to_vec(v.data())))).collect()
}

/// The network's output for every token.
fn outputs(network: &Named) -> Vec<f64> {
    let apply = |name: &str, x: &[f64]| -> Vec<f64> {
        let rows = network[name].1.chunks(x.len());
        rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    };
    let (shape, embedding) = &network["emb.weight"];
    let token = |x: &[f64]| {
        let hidden = apply("fc1.weight", x);
        let hidden: Vec<f64> = hidden.iter().zip(&network["fc1.bias"].1).map(|(h, b)| (h + b).max(0.0)).collect();
        apply("fc2.weight", &hidden)
    };
    embedding.chunks(shape[1]).flat_map(token).collect()
}

const SPEC: &str = "[widths]\nmodel = 2\nheads = 4\n\
    [[tensors]]\npattern = 'steps'\naxes = []\n\
    [[tensors]]\npattern = 'emb.*'\naxes = ['vocab', 'model']\nrole = 'embedding'\n\
    [[tensors]]\npattern = 'fc1.weight'\naxes = ['heads:3, size', 'model']\n\
    [[tensors]]\npattern = 'fc2.weight'\naxes = ['out', 'heads:3, size']\n\
    [[tensors]]\npattern = '*'\naxes = ['heads:3, size']\n";

fn place() -> Place {
    let place = Place::empty();
    save(&place, "in.safetensors", &network());
    place.write("spec.toml", SPEC);
    place
}

#[test]
fn the_function_is_kept_and_blocks_repeat_in_their_order() {
    let place = place();
    let said = place.ok("widen-tensors in.safetensors --spec spec.toml -o out.safetensors").json();
    let (narrow, wide) = (network(), load(&place, "out.safetensors"));
    assert_eq!(wide["fc1.weight"].0, [24, 4]);
    assert_eq!(wide["fc2.weight"].0, [4, 24]);
    // Powers of two: no rounding.
    assert_eq!(outputs(&wide), outputs(&narrow));
    // Each of 3 heads of 2 stands 4 times in a row.
    let of = |i: usize| narrow["fc1.bias"].1[i / 8 * 2 + i % 2];
    assert_eq!(wide["fc1.bias"].1, (0..24).map(of).collect::<Vec<_>>());
    assert_eq!(wide["norm.running_var"].0, [24]);
    // AdamW: lr 1 / k_in, weight decay k_in, eps 1 / k_out.
    let factors = |name: &str| ["lr", "weight_decay", "eps"].map(|key| said[name][key].as_f64().unwrap());
    assert_eq!(factors("emb.weight"), [1.0, 1.0, 0.5]);
    assert_eq!(factors("fc1.weight"), [0.5, 2.0, 0.25]);
    assert_eq!(factors("fc1.bias"), [1.0, 1.0, 0.25]);
    assert_eq!(factors("fc2.weight"), [0.25, 4.0, 1.0]);
}

#[test]
fn growth_is_inferred_from_two_shapes() {
    let place = place();
    place.ok("widen-tensors in.safetensors --spec spec.toml -o wide.safetensors");
    let line = "widen-tensors in.safetensors --infer in.safetensors wide.safetensors -o out.safetensors";
    let said = place.ok(&format!("{line} --embedding emb.*")).json();
    let wide = load(&place, "out.safetensors");
    assert_eq!(outputs(&wide), outputs(&network()));
    assert_eq!(said["fc2.weight"]["lr"], 0.25);
    let mut odd = network();
    odd.insert("fc1.bias".into(), (vec![9], vec![0.0; 9]));
    save(&place, "odd.safetensors", &odd);
    let infer = |wide: &str| format!("widen-tensors in.safetensors --infer in.safetensors {wide} -o new.safetensors");
    place.refuses(&infer("odd.safetensors"), &["fc1.bias", "[9]", "no whole multiple", "[6]"]);
    odd.remove("fc1.bias");
    save(&place, "odd.safetensors", &odd);
    place.refuses(&infer("odd.safetensors"), &["odd.safetensors", "fc1.bias", "missing"]);
    place.refuses(line, &["out.safetensors exists already", "--force"]);
}

#[test]
fn moments_grow_by_the_factors_of_their_optimizer() {
    let place = place();
    let values = |factor: f64| (vec![4, 6], (0..24).map(|i| factor * i as f64).collect::<Vec<f64>>());
    let names = ["exp_avg.fc2.weight", "exp_avg_sq.fc2.weight", "momentum_buffer.fc1.bias"];
    let mut moments: Named = names[..2].iter().map(|n| (n.to_string(), values(1.0))).collect();
    moments.insert(names[2].into(), (vec![6], vec![1.0; 6]));
    save(&place, "m.safetensors", &moments);
    let line =
        "widen-tensors in.safetensors --spec spec.toml -o out.safetensors --moments-out mo.safetensors --moments";
    place.ok(&format!("{line} m.safetensors"));
    let wide = load(&place, "mo.safetensors");
    // γ = 1 / k_out: a readout's gradient keeps its size, a vector's shrinks.
    for name in &names[..2] {
        assert_eq!(wide[*name].0, [4, 24]);
        assert_eq!(wide[*name].1[..10], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 2.0, 3.0], "{name}");
    }
    assert_eq!(wide[names[2]].1, vec![0.25; 24]);
    moments.insert("exp_avg.other".into(), (vec![1], vec![1.0]));
    save(&place, "more.safetensors", &moments);
    let line = line.replace("out.", "out2.").replace("mo.", "mo2.");
    place.refuses(&format!("{line} more.safetensors"), &["exp_avg.other", "a moment of other"]);
    moments.remove("exp_avg.other");
    moments.insert("exp_avg.fc1.bias".into(), (vec![5], vec![1.0; 5]));
    save(&place, "more.safetensors", &moments);
    place.refuses(&format!("{line} more.safetensors"), &["exp_avg.fc1.bias", "[5]", "[6]"]);
}

#[test]
fn specs_that_do_not_fit_are_refused() {
    let place = place();
    let refuse = |from: &str, to: &str, parts: &[&str]| {
        place.write("bad.toml", SPEC.replace(from, to));
        place.refuses("widen-tensors in.safetensors --spec bad.toml -o out.safetensors", parts);
    };
    refuse("pattern = '*'", "pattern = 'fc9.*'", &["fc1.bias", "no pattern"]);
    refuse("'out', ", "", &["fc2.weight", "1 axes", "[4, 6]"]);
    refuse("heads:3, size', 'model'", "heads:4, size', 'model'", &["fc1.weight", "do not multiply", "has 6"]);
    refuse("heads:3, size', 'model'", "heads, size', 'model'", &["only one block"]);
    refuse("heads:3, size', 'model'", "heads:x, size', 'model'", &["heads:x", "no positive size"]);
    refuse("role = 'embedding'", "role = 'embeding'", &["bad.toml", "embeding"]);
    refuse("'vocab', 'model'", "'model', 'vocab'", &["emb", "axis 0 grows"]);
    refuse("model = 2", "model = 0", &["widths.model = 0", "between 1"]);
    refuse("axes = []", "axes = []\naxis = 3", &["bad.toml", "axis"]);
    place.refuses("widen-tensors in.safetensors --spec nowhere.toml -o out.safetensors", &["nowhere.toml"]);
    place.refuses("widen-tensors nowhere.safetensors --spec spec.toml -o out.safetensors", &["nowhere.safetensors"]);
    let whole = place.read("in.safetensors");
    place.write("cut.safetensors", &whole[..whole.len() - 1]);
    place.refuses("widen-tensors cut.safetensors --spec spec.toml -o out.safetensors", &["cut.safetensors", "whole"]);
    place.refuses("widen-tensors in.safetensors -o out.safetensors", &["--spec"]);
}

/// Tensors are read and written one by one: a file of many needs no more memory than a file of one. The limit counts
/// what a process allocates; a mapped file's pages are the system's to take back.
#[test]
#[cfg(target_os = "linux")]
fn a_file_larger_than_memory_streams() {
    const LIMIT: usize = 96 << 20;
    let place = Place::empty();
    let values = vec![1.0f64; 512 << 10];
    let tensors: Named = (0..32).map(|i| (format!("w{i:02}"), (vec![512, 1024], values.clone()))).collect();
    save(&place, "in.safetensors", &tensors);
    place.write(
        "spec.toml",
        "[widths]\nmodel = 2\n[[tensors]]\npattern = 'w*'\naxes = ['out', 'model']\n[[tensors]]\npattern = '*'\naxes = []",
    );
    let program = env!("CARGO_BIN_EXE_mupscale");
    let line = "widen-tensors in.safetensors --spec spec.toml -o out.safetensors";
    let limited = |kib: usize| {
        let script = format!("ulimit -d {kib}; exec {program} {line} --force");
        let mut command = std::process::Command::new("bash");
        command.args(["-c", &script]).current_dir(place.path()).output().unwrap()
    };
    let said = limited(LIMIT >> 10);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let size = |name: &str| std::fs::metadata(place.join(name)).unwrap().len() as usize;
    assert!(size("in.safetensors") > LIMIT && size("out.safetensors") > 2 * LIMIT, "too little to show anything");
    // A limit that nothing fits shows that it is one.
    assert!(!limited(256).status.success());
}
