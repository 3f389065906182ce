//! Saving is cut off at every change of the disk.

use std::{
    env, io,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex},
};

use super::*;

/// Lets a change of the disk fail, and remembers them all.
pub struct Faults {
    /// Counted from 0.
    fail_at: usize,
    /// Whether all that follows fails too, as if the process had died.
    dies: bool,
    /// What the system answers.
    errno: i32,
    log: Mutex<Vec<(&'static str, PathBuf)>>,
}

impl Faults {
    pub fn new(fail_at: usize, dies: bool, errno: i32) -> Arc<Self> {
        Arc::new(Self { fail_at, dies, errno, log: Mutex::default() })
    }

    /// How many there were.
    pub fn changes(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    pub fn before(&self, action: &'static str, path: &Path) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        let change = log.len();
        log.push((action, path.into()));
        let fails = change == self.fail_at || self.dies && change > self.fail_at;
        if fails { Err(io::Error::from_raw_os_error(self.errno)) } else { Ok(()) }
    }
}

/// Saves over `dir` while change `fail_at` fails; whether it got that far, and what came of it.
fn save_cut_off(dir: &Path, fail_at: usize, dies: bool) -> (Option<&'static str>, Result<()>) {
    let faults = Faults::new(fail_at, dies, libc::EIO);
    let result = save_on(Disk { faults: Some(faults.clone()) }, dir, true, 2);
    (faults.log.lock().unwrap().get(fail_at).map(|(action, _)| *action), result)
}

#[test]
fn a_save_cut_off_anywhere_leaves_the_old_checkpoint_or_the_new() {
    for (dies, replaces) in [(true, true), (true, false), (false, true), (false, false)] {
        let (mut olds, mut news) = (0, 0);
        for fail_at in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path().join("step");
            if replaces {
                save(&dir, 1);
            }
            let (failed, result) = save_cut_off(&dir, fail_at, dies);
            let Some(action) = failed else { break };
            match Reader::open(&dir) {
                Ok(reader) => {
                    let seed: u8 =
                        serde_json::from_value(reader.json::<Value>(CONFIG).unwrap()["seed"].clone()).unwrap();
                    assert!(seed == 2 || replaces && seed == 1 && result.is_err());
                    assert_saved(&dir, seed);
                    *(if seed == 1 { &mut olds } else { &mut news }) += 1;
                }
                Err(error) => {
                    assert!(!replaces && result.is_err(), "lost by a failure of {action}, change {fail_at}: {error}");
                    assert!(error.to_string().contains("no such checkpoint"), "{error}");
                    olds += 1;
                }
            }
            if !dies && action != "remove" {
                assert!(!names(folder.path()).iter().any(|name| name.contains("partial")), "{fail_at} {action}");
            }
            // The next save succeeds and clears up.
            save(&dir, 3);
            assert_saved(&dir, 3);
            assert_eq!(names(folder.path()), ["step"]);
        }
        assert!(olds > 20 && news >= 1, "the fault went through the whole save: {olds} before, {news} after");
    }
}

#[test]
fn a_replacement_cut_off_between_its_renames_is_ended_by_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path());
    let dir = store.path(20);
    let mut seen = false;
    for fail_at in 0.. {
        save(&dir, 1);
        let (Some(action), _) = save_cut_off(&dir, fail_at, true) else { break };
        let unnamed = !dir.exists();
        if unnamed {
            assert_eq!(action, "rename");
            assert_saved(&dir, 1);
            seen = true;
        }
        store.clean().unwrap();
        assert_eq!(names(store.dir()), ["step-00000020"]);
        open_and_verify(&dir).unwrap();
    }
    assert!(seen, "no fault fell between the two renames");
}

#[test]
fn what_a_living_writer_holds_is_not_cleaned() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path());
    let mut living = store.create(40).unwrap();
    store.clean().unwrap();
    let other = store.create(40).unwrap();
    living.json(CONFIG, &json!({"seed": 5})).unwrap();
    living.commit().unwrap();
    drop(other);
    assert_eq!(names(store.dir()), ["step-00000040"]);
    open_and_verify(&store.path(40)).unwrap();
}

#[test]
fn everything_is_on_the_disk_before_it_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    save(&dir, 1);
    let faults = Faults::new(usize::MAX, false, 0);
    save_on(Disk { faults: Some(faults.clone()) }, &dir, true, 2).unwrap();
    let log = faults.log.lock().unwrap();
    let place = |action: &str, name: &str| {
        let found = log.iter().rposition(|(done, path)| *done == action && path.to_str().unwrap().ends_with(name));
        found.unwrap_or_else(|| panic!("no {action} of {name} in {log:?}"))
    };
    for file in [CONFIG, STATE, MODEL, OPTIMIZER, INDEX] {
        assert!(place("write", file) < place("sync", file), "{file}");
        assert!(place("sync", file) < place("create", MANIFEST), "{file}");
    }
    let partial = log[0].1.to_str().unwrap();
    assert!(place("write", MANIFEST) < place("sync", MANIFEST));
    assert!(place("sync", MANIFEST) < place("sync", partial));
    assert!(place("sync", partial) < place("rename", "/step"), "the old is set aside");
    assert!(place("rename", "/step") < place("rename", partial));
    assert!(place("rename", partial) < place("sync", folder.path().to_str().unwrap()));
    assert!(place("sync", folder.path().to_str().unwrap()) < place("rename", ".step.replaced"));
    assert!(place("rename", ".step.replaced") < place("remove", ".step.removed"));
}

#[test]
fn a_disk_that_fills_up_while_writing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    save(&dir, 1);
    for fail_at in 1.. {
        let faults = Faults::new(fail_at, false, libc::ENOSPC);
        let result = save_on(Disk { faults: Some(faults.clone()) }, &dir, true, 2);
        let log = faults.log.lock().unwrap();
        match log[fail_at] {
            ("create" | "write", ref path) => {
                let name = path.file_name().unwrap().to_str().unwrap();
                let error = assert_says(result, &["disk is full", name, "bytes", "free", "unchanged"]);
                assert_eq!(error.exit_code(), 2);
            }
            _ => break,
        }
        assert_saved(&dir, 1);
        assert_eq!(names(folder.path()), ["step"]);
    }
}

/// Runs itself again with a disk of 256 KiB of its own, where the system allows that.
#[test]
fn a_full_disk_is_a_clear_error() {
    const DISK: &str = "MUPSCALE_TEST_SMALL_DISK";
    if let Some(disk) = env::var_os(DISK) {
        return fill(Path::new(&disk));
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = r#"mount -t tmpfs -o size=256k none "$0""#;
    let shell = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script]).arg(folder.path()).arg(env::current_exe().unwrap());
        command.args(["--exact", "checkpoint::tests::faults::a_full_disk_is_a_clear_error"]);
        command.env(DISK, folder.path()).output()
    };
    if !shell(mount).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: a small disk cannot be mounted here (unshare -rm, mount -t tmpfs)");
        return;
    }
    let output = shell(&format!(r#"{mount} && exec "$@""#)).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

fn fill(disk: &Path) {
    let dir = disk.join("step");
    save(&dir, 1);
    // Larger than the disk, then larger than what is left.
    for elements in [1 << 20, 50_000] {
        let mut writer = Writer::create(&dir, true).unwrap();
        if elements == 50_000 {
            fs::write(disk.join("ballast"), vec![1; 150_000]).unwrap();
        }
        let tensor = meta("w", DType::F32, vec![vec![block("vocab", elements)]]);
        let parts = ["disk is full", MODEL, "4194", "free"];
        let parts = if elements == 50_000 { &["disk is full", MODEL, "2000", "free"] } else { &parts };
        assert_says(writer.tensors(MODEL, vec![tensor]), parts);
        drop(writer);
        assert_saved(&dir, 1);
    }
    // A document for which the reservation fails.
    let mut writer = Writer::create(&dir, true).unwrap();
    assert_says(writer.bytes("tokenizer.json", &[b' '; 200_000]), &["disk is full", "tokenizer.json", "200000 bytes"]);
    drop(writer);
    assert_saved(&dir, 1);
    assert_eq!(names(disk), ["ballast", "step"]);
}
