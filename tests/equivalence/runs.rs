//! A run may be stopped, and a model widened, in more than one way.

use crate::run_folder::{MODEL_TOML, Place};
use mupscale::{report::progress::Show, run};
use std::{fs, process::Command};

/// Twelve steps, a stop, and eight more are twenty steps: weights, moments and log, past the end of the data, with
/// accumulation, and a schedule that depends on the step.
#[test]
fn resumed_is_never_stopped() {
    for (optimizer, precision, moments) in [
        ("adamw", "f32", "f32"),
        ("sgd", "f64", "f32"),
        ("muon", "f32", "f32"),
        ("lion", "f64", "f32"),
        ("muon", "f32", "bf16"),
    ] {
        let place = Place::new();
        let keys = format!("steps=20\nprecision='{precision}'");
        let sections = format!(
            "[batch]\nsize=2\nmicro_batches=2\n[memory]\nmoments='{moments}'\n[optimizer]\nkind='{optimizer}'\nlr=0.01\n\
             [schedule]\nkind='cosine'\nwarmup=4\n[model]\n{MODEL_TOML}"
        );
        place.train("whole", &keys, &sections).unwrap();
        place.train("parts", &keys, &format!("[checkpoint]\nevery=12\n{sections}")).unwrap();
        let expected = place.tensors("whole", 20);
        assert!(place.tensors("parts", 20) == expected, "{optimizer}: saving on the way changed something");
        assert!(place.tensors("parts", 12) != expected, "{optimizer}: nothing was trained after step 12");

        // As if the run had been killed between the two checkpoints; its log has lines of steps that will come again.
        fs::remove_dir_all(place.path("parts/checkpoints/step-00000020")).unwrap();
        let outcome = run::resume(&place.path("parts"), &[], Show::Quiet).unwrap();
        assert_eq!(outcome.steps, 20);
        let found = place.tensors("parts", 20);
        assert!(found[0] == expected[0], "{optimizer}: weights differ");
        assert!(found[1] == expected[1], "{optimizer}: moments differ");
        let [whole, parts] = ["whole", "parts"].map(|run| {
            let line = |s: mupscale::report::metrics::StepRecord| {
                (s.step, s.tokens, [s.loss, s.lr, s.grad_norm, s.update_norm].map(f64::to_bits))
            };
            place.steps(run).into_iter().map(line).collect::<Vec<_>>()
        });
        assert_eq!(whole.len(), 20);
        assert_eq!(whole, parts, "{optimizer}: the logs differ");
        // 80 samples of 37: the order of the third epoch was reached.
        assert_eq!(outcome.tokens, 20 * 2 * 2 * 16);
    }
}

/// `mupscale upscale` and training from its file, and training with `[init.upscale]`, are one code: the same bits, as
/// widened and after some steps, for every kind of noise, with moments kept and reset.
#[test]
fn a_wide_file_is_widening_on_the_way() {
    let place = Place::new();
    let optimizer = |lr: &str| format!("[optimizer]\nlr={lr}\n");
    place.train("narrow", "steps=3", &format!("{}[batch]\nsize=2\n[model]\n{MODEL_TOML}", optimizer("0.01"))).unwrap();
    let narrow = place.path("narrow");
    for (i, kind) in ["independent", "paired", "relative", "paper"].into_iter().enumerate() {
        let moments = if i % 2 == 0 { "keep" } else { "reset" };
        let wide = place.path(kind);
        let output = Command::new(env!("CARGO_BIN_EXE_mupscale"))
            .arg("upscale")
            .arg(&narrow)
            .arg("--out")
            .arg(&wide)
            .args(["--width", "2", "--head-dim", "3", "--noise", "0.3", "--noise-kind", kind, "--seed", "5"])
            .args(["--moments", moments, "--threads", "1"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let from_file = format!("[init]\nfrom={wide:?}\n");
        let on_the_way = format!(
            "[init]\nfrom={narrow:?}\nmoments='{moments}'\n[init.upscale]\nwidth=2\nhead_dim=3\nnoise=0.3\n\
             noise_kind='{kind}'\nseed=5\n"
        );
        let runs = [from_file, on_the_way].map(|init| {
            let name = format!("{kind}-{}", init.len());
            for (steps, lr) in [(1, "0"), (3, "0.01")] {
                let run = format!("{name}-{steps}");
                let sections = format!("{}[batch]\nsize=2\n{init}", optimizer(lr));
                place.train(&run, &format!("steps={steps}"), &sections).unwrap();
            }
            [1, 3].map(|steps| place.tensors(&format!("{name}-{steps}"), steps))
        });
        for (i, steps) in [1, 3].into_iter().enumerate() {
            assert!(runs[0][i] == runs[1][i], "{kind}: differs after {steps} steps");
        }
        // A step at the rate 0 has left the weights as they were widened.
        let file = fs::read(wide.join(mupscale::checkpoint::MODEL)).unwrap();
        assert!(runs[1][0][0] == file, "{kind}: the file holds other weights");
        assert!(runs[1][0][0] != runs[1][1][0], "{kind}: nothing was trained");
    }
}
