//! Every op on the emulated GPU against the CPU.

use super::{Place, emulated, emulated_ok};

/// Runs the self-test, which compares every op with the CPU's.
fn agrees(options: &[(&str, &str)], arguments: &str) {
    let said = emulated_ok(&Place::new(), &format!("selftest --json {arguments}"), options);
    let verdict = said.json();
    assert_eq!(verdict["ok"], true, "{}", said.out);
    assert!(verdict["checks"].as_array().unwrap().len() > 200, "few checks were made");
}

#[test]
fn ops_are_the_cpus() {
    agrees(&[], "");
}

/// Threads and blocks in another order, copies to shared memory that arrive at once: a race would show.
#[test]
fn ops_do_not_depend_on_the_order_of_threads() {
    for seed in ["1", "2"] {
        agrees(&[("SEED", seed), ("COPIES", "at-once")], "");
    }
}

/// Streams that work only when somebody waits for them: a missing event would show.
#[test]
fn ops_wait_for_what_they_read() {
    agrees(&[("STREAMS", "lazy"), ("SEED", "3")], "");
}

/// Reads and writes outside of an allocation or of shared memory, and arithmetic that C++ leaves undefined, end the run.
#[test]
fn ops_are_clean_under_sanitizers() {
    agrees(&[("SANITIZE", "address,undefined"), ("SEED", "4")], "");
}

/// A GPU with less shared memory for a block chooses other tiles.
#[test]
fn smaller_gpus_have_smaller_tiles() {
    for capability in ["8.0", "8.6", "12.0"] {
        let said = emulated_ok(&Place::new(), "selftest --only attention --json", &[("CAPABILITY", capability)]);
        assert_eq!(said.json()["ok"], true, "{capability}: {}", said.out);
    }
}

/// A self-test that cannot fail would prove nothing: a launch that is refused is seen, and told.
#[test]
fn a_failing_kernel_is_seen() {
    let said = emulated(&Place::new(), "selftest --only norm", &[("FAIL", "cuLaunchKernel:3:700")]);
    assert_eq!(said.code, 3, "{}", said.err);
    assert!(said.err.contains("cuLaunchKernel") && said.err.contains("700"), "{}", said.err);
}

/// The same numbers by machine code, by PTX and by NVRTC (the real one, where a toolkit has it).
#[test]
fn kernels_load_by_every_road() {
    let place = Place::new();
    for road in ["image", "ptx"] {
        emulated_ok(&place, "selftest --only activation", &[("MUPSCALE_KERNELS", road)]);
    }
    let toolkit = concat!(env!("CARGO_MANIFEST_DIR"), "/.cuda");
    let nvrtc = [("MUPSCALE_KERNELS", "nvrtc"), ("MUPSCALE_TEST_CUDA_HOME", toolkit)];
    if !std::path::Path::new(toolkit).join("lib").exists() {
        eprintln!("SKIPPED: no NVRTC; tools/setup-cuda fetches it");
        return;
    }
    let cache = place.join("cache");
    let run = || {
        let mut command = std::process::Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/with-emulated-gpus"));
        command.arg("1").arg(env!("CARGO_BIN_EXE_mupscale")).args(["selftest", "--only", "activation"]);
        command.env("CUDA_HOME", toolkit).env("XDG_CACHE_HOME", &cache).env(nvrtc[0].0, nvrtc[0].1);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run();
    // The second time from the cache, the third with a damaged one: what is compiled anew is what was there.
    let entries = || super::command::contents(&cache);
    let first = entries();
    assert!(first.values().flatten().count() >= 2, "nothing was kept: {:?}", first.keys());
    run();
    assert_eq!(entries(), first);
    for (path, content) in &first {
        if let Some(content) = content {
            std::fs::write(path, &content[..content.len() - 1]).unwrap();
        }
    }
    run();
    assert_eq!(entries(), first);
}
