//! What a release holds besides the program: manual pages, and symbols that old systems have.

mod command;

use clap::CommandFactory;
use command::Place;
use std::process::Command;

#[test]
fn every_command_has_a_manual_page() {
    let place = Place::new();
    place.ok("man pages/man1");
    let pages = place.names("pages/man1");
    for command in mupscale::commands::Args::command().get_subcommands() {
        let name = format!("mupscale-{}.1", command.get_name());
        assert!(pages.contains(&name), "no {name} in {pages:?}");
    }
    assert!(pages.contains(&"mupscale.1".to_string()) && pages.contains(&"mupscale-data-tokenize.1".to_string()));
    let page = String::from_utf8(place.read("pages/man1/mupscale-upscale.1")).unwrap();
    assert!(page.contains(".TH") && page.contains("width"), "{page}");
    place.refuses("man corpus.txt/below", &["corpus.txt"]);
}

/// The program runs on systems as old as the README says.
#[test]
#[cfg(target_os = "linux")]
fn the_program_needs_no_new_glibc() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/release");
    let check = |program: &str| Command::new(script).args(["--check", program]).output().unwrap();
    let output = check(env!("CARGO_BIN_EXE_mupscale"));
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(2) {
        eprintln!("skipped: {said}");
        return;
    }
    assert!(output.status.success(), "{said}");
    // What is no program is refused, so the check can fail.
    assert!(!check(script).status.success());
}
