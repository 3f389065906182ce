//! What is missing, too old, too small, or breaks.

use super::{Place, Said, emulated};

const TRAIN: &str = "train -c run.toml --device cuda --set run=gpu";

fn refused(said: &Said, parts: &[&str]) {
    assert_eq!(said.code, 2, "{}{}", said.out, said.err);
    for part in parts {
        assert!(said.err.contains(part), "no `{part}` in: {}", said.err);
    }
}

#[test]
fn without_a_driver() {
    let place = Place::new();
    let said = place.run(TRAIN);
    refused(&said, &["libcuda.so.1", "install NVIDIA's driver", "--device cpu"]);
    assert!(!place.join("gpu").exists(), "a run folder was made");
    // And `doctor` says so without failing.
    assert!(place.ok("doctor").out.contains("GPUs cannot be used"));
}

#[test]
fn without_a_gpu_or_with_an_old_one() {
    let place = Place::new();
    refused(&emulated(&place, TRAIN, &[("CAPABILITY", "7.5")]), &["7.5", "8.0", "--device cpu"]);
    refused(&emulated(&place, TRAIN, &[("DRIVER", "12020")]), &["12.2", "12.4", "driver 550"]);
}

/// A driver older than the toolkit takes neither its PTX nor its machine code; NVRTC is not there.
#[test]
fn an_older_driver_without_nvrtc() {
    refused(&emulated(&Place::new(), TRAIN, &[("DRIVER", "12060")]), &["libnvrtc", "CUDA_HOME"]);
}

#[test]
fn heads_of_a_size_that_no_kernel_has() {
    let place = Place::new();
    let said = emulated(&place, "upscale base --out wide --head-dim 33 --device cuda", &[]);
    // Widening alone computes no attention.
    assert_eq!(said.code, 0, "{}", said.err);
    refused(&emulated(&place, "eval wide data --device cuda", &[]), &["head_dim", "264", "256", "--device cpu"]);
}

/// Types that go with no precision or device.
#[test]
fn types_that_do_not_go_together() {
    let place = Place::new();
    let train = |sets: &str| format!("train -c run.toml --set run=gpu {sets}");
    let gradients = "--set memory.gradients=bf16";
    refused(&place.run(&train(&format!("--device cpu {gradients}"))), &["memory.gradients", "bf16", "--device cuda"]);
    let said = place.run(&train("--device cpu --set precision=f64 --set memory.moments=bf16"));
    refused(&said, &["memory.moments", "bf16", "f64"]);
    let said = emulated(&place, &train(&format!("--device cuda --set precision=f32 {gradients}")), &[]);
    refused(&said, &["memory.gradients", "precision"]);
    refused(&place.run(&train("--set memory.moments=f16")), &["moments", "f16", "bf16"]);
    assert!(!place.join("gpu").exists(), "a run folder was made");
}

/// What does not fit is told before the first step, with what would.
#[test]
fn out_of_memory() {
    let place = Place::new();
    place.write(
        "big.toml",
        "run = 'big'\nsteps = 2\n[data]\npath = 'data'\n[batch]\nsize = 4096\n[model]\narch = 'gpt2'\nlayers = 2\n\
         residual = 64\nkv_heads = 2\ncontext = 16\n",
    );
    let said = emulated(&place, "train -c big.toml --device cuda", &[("MEMORY", "128M")]);
    refused(&said, &["batch.size", "4096", "fit"]);
}

/// A fault in the middle of training: exit code 3, what failed, and the last checkpoint goes on to the end that an
/// undisturbed run comes to.
#[test]
fn a_fault_leaves_the_last_checkpoint() {
    let place = Place::new();
    let whole = emulated(&place, &format!("{TRAIN} --set run=whole"), &[]);
    assert_eq!(whole.code, 0, "{}", whole.err);
    // The first graph is launched in step 3, as both parts of the ring have an eager step first.
    for call in ["cuGraphLaunch:1:700", "cuMemcpyDtoHAsync_v2:3:719"] {
        let _ = std::fs::remove_dir_all(place.join("gpu"));
        let said = emulated(&place, TRAIN, &[("FAIL", call)]);
        assert_eq!(said.code, 3, "{call}: {}", said.err);
        assert!(said.err.contains(call.split(':').next().unwrap()), "{call}: {}", said.err);
    }
    let checkpoints = place.names("gpu/checkpoints");
    if checkpoints.is_empty() {
        return;
    }
    let said = emulated(&place, "resume gpu --device cuda", &[]);
    assert_eq!(said.code, 0, "{}", said.err);
    let [a, b] = ["whole", "gpu"].map(|run| place.read(&format!("{run}/checkpoints/step-00000004/model.safetensors")));
    assert!(a == b, "the run that was broken came to another end");
}

/// Refusals at any call are errors, never panics or wrong results.
#[test]
fn every_call_may_fail() {
    let place = Place::new();
    for call in [
        "cuInit:1:999",
        "cuDevicePrimaryCtxRetain:1:2",
        "cuStreamCreate:2:2",
        "cuMemAlloc_v2:2:2",
        "cuMemHostAlloc:1:2",
        "cuModuleLoadData:2:200",
        "cuModuleGetFunction:3:500",
        "cuLaunchKernel:20:719",
        "cuStreamEndCapture:1:901",
        "cuGraphInstantiateWithFlags:1:2",
        "cuEventCreate:1:2",
    ] {
        let said = emulated(&place, &format!("{TRAIN} --force"), &[("FAIL", call)]);
        assert!(matches!(said.code, 2 | 3), "{call}: exit code {}, {}", said.code, said.err);
        assert_eq!(said.err.lines().filter(|line| line.starts_with("error")).count(), 1, "{call}: {}", said.err);
    }
}
