//! Several processes write one checkpoint, as threads or one after the other.

use super::*;
use std::sync::Arc;

/// Parts of every tensor: of three processes, in the order of the flat elements.
const PROCESSES: usize = 3;

/// The elements of a tensor that a process writes.
fn part(meta: &TensorMeta, process: usize) -> Range<usize> {
    let count = meta.elements().unwrap();
    count * process / PROCESSES..count * (process + 1) / PROCESSES
}

fn declare(writer: &mut Writer) -> Result<()> {
    writer.tensors(MODEL, model())?;
    writer.tensors(OPTIMIZER, optimizer())
}

fn write_part(writer: &Writer, process: usize, seed: u8) -> Result<()> {
    for meta in model().iter().chain(&optimizer()) {
        let (part, size) = (part(meta, process), meta.dtype.size());
        writer.write(&meta.name, part.start, &content(meta, seed)[part.start * size..part.end * size])?;
    }
    Ok(())
}

/// A guest from its beginning to its report.
fn guest(disk: Disk, dir: &Path, folder: &str, process: usize, seed: u8) -> Result<Vec<u8>> {
    let mut writer = Writer::join_on(disk, dir, folder)?;
    declare(&mut writer)?;
    write_part(&writer, process, seed)?;
    writer.report()
}

fn owner(disk: Disk, dir: &Path, seed: u8) -> Result<Writer> {
    let mut writer = Writer::create_on(disk, dir, true)?;
    writer.json(CONFIG, &json!({"width": 6, "seed": seed}))?;
    writer.json(STATE, &json!({"step": 20}))?;
    declare(&mut writer)?;
    Ok(writer)
}

/// Saves as three processes; process `faulty` meets `faults`.
fn save_together(dir: &Path, seed: u8, faulty: usize, faults: &Arc<Faults>) -> Result<()> {
    let disk = |process| Disk { faults: (process == faulty).then(|| faults.clone()) };
    let mut writer = owner(disk(0), dir, seed)?;
    let folder = writer.folder();
    let reports: Vec<_> = (1..PROCESSES).map(|process| guest(disk(process), dir, &folder, process, seed)).collect();
    write_part(&writer, 0, seed)?;
    for report in reports {
        writer.admit(&report?)?;
    }
    writer.commit()
}

#[test]
fn what_processes_write_together_is_one_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let mut writer = owner(Disk::default(), &dir, 4).unwrap();
    let name = writer.folder();
    let reports = std::thread::scope(|scope| {
        let (dir, name) = (&dir, &name);
        let start = |process| scope.spawn(move || guest(Disk::default(), dir, name, process, 4).unwrap());
        let guests: Vec<_> = (1..PROCESSES).map(start).collect();
        write_part(&writer, 0, 4).unwrap();
        guests.into_iter().map(|guest| guest.join().unwrap()).collect::<Vec<_>>()
    });
    for report in &reports {
        writer.admit(report).unwrap();
    }
    assert_says(writer.admit(&reports[0]), &["written here too"]);
    writer.commit().unwrap();
    assert_saved(&dir, 4);
    // The very files that one process writes; only their checksums are cut otherwise.
    let alone = folder.path().join("alone");
    save(&alone, 4);
    for file in [MODEL, OPTIMIZER, CONFIG, STATE, INDEX] {
        assert!(fs::read(dir.join(file)).unwrap() == fs::read(alone.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn a_process_cut_off_anywhere_leaves_the_old_checkpoint_or_the_new() {
    for (faulty, dies, replaces) in [(0, true, true), (0, false, false), (1, true, true), (2, false, false)] {
        let (mut olds, mut news) = (0, 0);
        for fail_at in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path().join("step");
            if replaces {
                save(&dir, 1);
            }
            let faults = Faults::new(fail_at, dies, libc::EIO);
            let result = save_together(&dir, 2, faulty, &faults);
            if faults.changes() <= fail_at {
                result.unwrap();
                break;
            }
            match Reader::open(&dir) {
                Ok(reader) => {
                    let seed = reader.json::<Value>(CONFIG).unwrap()["seed"].as_u64().unwrap() as u8;
                    // A guest that fails fails the save.
                    assert!(seed == 2 && faulty == 0 || replaces && seed == 1 && result.is_err());
                    assert_saved(&dir, seed);
                    *(if seed == 1 { &mut olds } else { &mut news }) += 1;
                }
                Err(_) => {
                    assert!(!replaces && result.is_err() && !dir.exists());
                    olds += 1;
                }
            }
            save(&dir, 3);
            assert_saved(&dir, 3);
            assert_eq!(names(folder.path()), ["step"]);
        }
        assert!(olds >= 7 && (news > 0) == (faulty == 0), "process {faulty}: {olds} before, {news} after");
    }
}

#[test]
fn a_part_that_nobody_reports_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let mut writer = owner(Disk::default(), &dir, 1).unwrap();
    let name = writer.folder();
    write_part(&writer, 0, 1).unwrap();
    let report = guest(Disk::default(), &dir, &name, 1, 1).unwrap();
    writer.admit(&report).unwrap();
    // The third one's bytes are there, its report is not.
    guest(Disk::default(), &dir, &name, 2, 1).unwrap();
    assert_says(writer.commit(), &["was never written"]);
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn a_guest_refuses_what_is_not_its_owners() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    for name in ["", "x", "../.step.partial-1-0", ".step.partial-1/x", ".other.partial-1-0"] {
        assert_says(Writer::join(&dir, name), &["no folder"]);
    }
    let mut lost = Writer::join(&dir, ".step.partial-1-0").unwrap();
    assert_says(declare(&mut lost), &[MODEL, "not seen here", "file system"]);
    let mut writer = owner(Disk::default(), &dir, 1).unwrap();
    let mut other = Writer::join(&dir, &writer.folder()).unwrap();
    assert_says(other.tensors(MODEL, optimizer()), &[MODEL, "one version"]);
    drop(other);
    for report in ["", "{}", r#"[{"tensor":"none","start":0,"length":1,"blake3":""}]"#] {
        assert_says(writer.admit(report.as_bytes()), &["step", "process"]);
    }
    let told = |start: usize, length: usize| {
        json!([{"tensor": "bias", "start": start, "length": length, "blake3": ""}]).to_string()
    };
    for (start, length) in [(0, 0), (0, 6), (5, 1), (usize::MAX, 2)] {
        assert_says(writer.admit(told(start, length).as_bytes()), &["bias", "do not exist"]);
    }
}

#[test]
fn a_checksum_that_a_guest_tells_is_verified() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let mut writer = owner(Disk::default(), &dir, 1).unwrap();
    let name = writer.folder();
    write_part(&writer, 0, 1).unwrap();
    for process in 1..PROCESSES {
        let report = guest(Disk::default(), &dir, &name, process, 1).unwrap();
        let mut told: Value = serde_json::from_slice(&report).unwrap();
        if process == 1 {
            told[0]["blake3"] = json!(digest(b"other bytes"));
        }
        writer.admit(&serde_json::to_vec(&told).unwrap()).unwrap();
    }
    writer.commit().unwrap();
    assert_says(open_and_verify(&dir), &["checksum is wrong"]);
}
