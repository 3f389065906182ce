//! The job scripts in tools/cluster: checked by bash and shellcheck, run against stand-ins of SLURM's commands, and
//! compared with the fields of the Kubernetes that they name.

use crate::job::{Place, begin, free_port};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/cluster")
}

fn files(extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == extension));
    found.sort();
    found
}

#[test]
fn scripts_are_sound() {
    let scripts = files("sbatch");
    assert_eq!(scripts.len(), 4);
    let sound = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).args(&scripts).output();
        let Ok(output) = output else { return false };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
        true
    };
    for script in &scripts {
        let output = Command::new("bash").arg("-n").arg(script).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = fs::read_to_string(script).unwrap();
        assert!(text.contains("\n# Change:") && text.contains("\n#SBATCH --time="), "{}", script.display());
    }
    let checked = sound("shellcheck", "--shell=bash");
    if !checked {
        // Part of no toolchain, and tools/test installs no system packages.
        eprintln!("skipped: shellcheck is not installed");
    }
    assert!(checked || std::env::var_os("MUPSCALE_REQUIRE_SHELLCHECK").is_none(), "shellcheck is missing");
}

/// Starts its command once for every node, as srun does with one task a node; says what it was asked.
const SRUN: &str = r#"#!/bin/bash
[ "$1" = --kill-on-bad-exit=0 ] && shift
code=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do wait -n || { c=$?; [ $c -gt $code ] && code=$c; }; done
exit $code
"#;
/// Knows the node list `here-[0-1]`, and notes what is queued again.
const SCONTROL: &str = r#"#!/bin/bash
case "$1 $2" in
  "show hostnames") [ "$3" = "here-[0-1]" ] && printf '127.0.0.1\n127.0.0.2\n' ;;
  "requeue $SLURM_JOB_ID") echo "$2" >> requeued ;;
  *) exit 1 ;;
esac
"#;
/// Says how it was started. As a node has no GPU here, the launcher is asked for two processes.
const LAUNCH: &str = r#"#!/bin/bash
args=(); for a in "$@"; do [ "$a" = gpu ] && a=2; args+=("$a"); done
exec LAUNCHER "${args[@]}"
"#;
const MUPSCALE: &str = "#!/bin/bash\necho \"${RANK:-alone} $*\" >> ran\nexit ${CODE:-0}\n";

fn run(script: &str, nodes: &str, more: &[(&str, &str)]) -> (Place, crate::job::Said) {
    let place = Place::new();
    let launch = LAUNCH.replace("LAUNCHER", env!("CARGO_BIN_EXE_mupscale-launch"));
    for (name, text) in [("srun", SRUN), ("scontrol", SCONTROL), ("mupscale-launch", &launch), ("mupscale", MUPSCALE)] {
        place.write(name, text);
        fs::set_permissions(place.path().join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("bash");
    let path = format!("{}:{}", place.path().display(), std::env::var("PATH").unwrap());
    command.arg(folder().join(script)).current_dir(place.path()).env("PATH", path).env("CUDA_VISIBLE_DEVICES", "");
    // The scripts derive the port from it.
    let id = (4_700_000 + u32::from(free_port()) - 20_000).to_string();
    command.env("SLURM_JOB_ID", &id).env("SLURM_JOB_NODELIST", "here-[0-1]").env("SLURM_JOB_NUM_NODES", nodes);
    command.envs(more.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let said = begin(command).end();
    (place, said)
}

fn ran(place: &Place) -> Vec<String> {
    let mut lines: Vec<_> = place.read("ran").lines().map(str::to_string).collect();
    lines.sort();
    lines
}

#[test]
fn slurm_starts_one_launcher_a_node() {
    let train = |rank: &str, config: &str| format!("{rank} train -c {config} --resume auto");
    let (place, said) = run("slurm-node.sbatch", "1", &[]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(ran(&place), ["0", "1"].map(|rank| train(rank, "run.toml")));
    let (place, said) = run("slurm-nodes.sbatch", "2", &[("CONFIG", "big.toml")]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(ran(&place), ["0", "1", "2", "3"].map(|rank| train(rank, "big.toml")));
    assert!(place.names("logs").iter().any(|job| place.has(&format!("logs/{job}/attempt_0/3/stdout.log"))));
}

#[test]
fn slurm_queues_again_what_was_saved_and_nothing_else() {
    for (code, again) in [("75", true), ("0", false), ("2", false)] {
        let (place, said) = run("slurm-requeue.sbatch", "2", &[("CODE", code)]);
        assert_eq!((said.code.to_string().as_str(), place.has("requeued")), (code, again), "{}", said.err);
    }
}

#[test]
fn slurm_sweeps_over_values() {
    let mut lines = Vec::new();
    for index in ["0", "4"] {
        let (place, said) = run("slurm-array.sbatch", "1", &[("SLURM_ARRAY_TASK_ID", index)]);
        assert_eq!(said.code, 0, "{}", said.err);
        lines.extend(ran(&place));
    }
    let line = |lr: &str| {
        format!("alone train -c run.toml --resume auto --set run=runs/sweep-lr-{lr} --set optimizer.lr={lr}")
    };
    assert_eq!(lines, [line("0.0005"), line("0.008")]);
    let (place, said) = run("slurm-array.sbatch", "1", &[("SLURM_ARRAY_TASK_ID", "5")]);
    said.expect(1, &["more indices than there are values"]);
    assert!(!place.has("ran"));
}
