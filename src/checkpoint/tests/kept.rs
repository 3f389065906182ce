//! A run's checkpoints: order, pruning, what is no checkpoint.

use super::*;

fn steps(store: &Store) -> Vec<u64> {
    store.list().unwrap().into_iter().map(|(step, _)| step).collect()
}

fn filled(run: &Path, wanted: &[u64]) -> Store {
    let store = Store::new(run);
    for &step in wanted {
        let mut writer = store.create(step).unwrap();
        writer.json(STATE, &json!({"step": step})).unwrap();
        writer.commit().unwrap();
    }
    store
}

#[test]
fn checkpoints_are_listed_in_order_of_their_steps() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Store::new(folder.path()).newest().unwrap(), None);
    let store = filled(folder.path(), &[20, 100_000_000, 5, 99_999_999]);
    // None of these is a checkpoint.
    fs::create_dir(store.dir().join("step-00000030")).unwrap();
    for name in ["step-7", "step-+0000040", "step-", "notes", ".step-00000050.partial-1-0", ".step-00000060.removed"] {
        fs::create_dir(store.dir().join(name)).unwrap();
        fs::write(store.dir().join(name).join(MANIFEST), "{}").unwrap();
    }
    assert_eq!(steps(&store), [5, 20, 99_999_999, 100_000_000]);
    let (step, path) = store.newest().unwrap().unwrap();
    assert_eq!((step, path.as_path()), (100_000_000, store.path(100_000_000).as_path()));
    assert!(store.path(20).ends_with("checkpoints/step-00000020"));
    store.clean().unwrap();
    assert_eq!(steps(&store), [5, 20, 99_999_999, 100_000_000]);
    assert!(!names(store.dir()).iter().any(|name| name.starts_with('.')));
}

#[test]
fn pruning_keeps_the_last_and_every_mth() {
    for (last, every, kept) in [
        (2, None, vec![50, 60]),
        (1, Some(20), vec![20, 40, 60]),
        (2, Some(30), vec![30, 50, 60]),
        (0, None, vec![60]),
        (9, None, vec![10, 20, 30, 40, 50, 60]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let store = filled(folder.path(), &[10, 20, 30, 40, 50, 60]);
        let gone = store.prune(last, every).unwrap();
        assert_eq!(steps(&store), kept, "last {last}, every {every:?}");
        assert_eq!(gone.len() + kept.len(), 6);
        assert_eq!(names(store.dir()).len(), kept.len());
    }
}

#[test]
fn a_removal_cut_off_anywhere_leaves_no_half_checkpoint() {
    let mut cut = 0;
    for fail_at in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let store = filled(folder.path(), &[10, 20]);
        let disk = Disk { faults: Some(Faults::new(fail_at, true, libc::EIO)) };
        let path = store.path(10);
        if place::discard(&disk, &path, &path).is_ok() {
            break;
        }
        cut += 1;
        for (_, path) in store.list().unwrap() {
            open_and_verify(&path).unwrap();
        }
        store.clean().unwrap();
        store.prune(1, None).unwrap();
        assert_eq!(names(store.dir()), ["step-00000020"]);
    }
    assert!(cut > 3, "the fault went through the removal: {cut}");
}

#[test]
fn what_is_no_checkpoint_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("step");
    let open = || Reader::open(&dir);
    assert_eq!(assert_says(open(), &["no such checkpoint"]).exit_code(), 2);
    fs::write(&dir, "").unwrap();
    assert_says(open(), &["no folder"]);
    fs::remove_file(&dir).unwrap();
    fs::create_dir(&dir).unwrap();
    assert_says(open(), &["no checkpoint", "manifest.json"]);
    fs::write(dir.join(MODEL), "").unwrap();
    assert_says(open(), &["other programs", "no checkpoint of mupscale"]);
    fs::write(dir.join(INDEX), "{}").unwrap();
    assert_says(open(), &["incomplete checkpoint"]);
}
