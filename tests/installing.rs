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

/// The instructions of the Dockerfile, continued lines joined: their name and what follows.
fn dockerfile() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Dockerfile")).unwrap();
    let text = text.replace("\\\n", " ");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let split = |line: &str| line.split_once(' ').map(|(name, rest)| (name.to_string(), rest.trim().to_string()));
    lines.map(|line| split(line).unwrap_or_else(|| panic!("no instruction: {line}"))).collect()
}

/// Where no Docker is, its form at least: known instructions, images of one version, files that are there, a program that
/// the build makes, and a C library in the image that is no older than the one it was built with.
#[test]
fn the_dockerfile_is_well_formed() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let known = ["FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"];
    let (mut stages, mut bases) = (Vec::new(), Vec::new());
    for (name, rest) in dockerfile() {
        assert!(known.contains(&name.as_str()), "{name} is no instruction that this test knows");
        let words: Vec<&str> = rest.split_whitespace().collect();
        match (name.as_str(), &words[..]) {
            ("FROM", [image, alias @ ..]) => {
                let (_, tag) = image.rsplit_once(':').unwrap_or_else(|| panic!("{image} has no tag"));
                assert!(tag.contains('.') && !tag.contains("latest"), "{image}: a tag names a version");
                bases.push(image.to_string());
                stages.extend(alias.get(1).map(|alias| alias.to_string()));
            }
            ("COPY", [from, files @ .., _]) if from.starts_with("--from=") => {
                assert!(stages.contains(&from["--from=".len()..].to_string()), "{from} is no stage");
                for file in files {
                    let program = file.strip_prefix("/src/target/release/").unwrap_or_else(|| panic!("{file}"));
                    let manifest = include_str!("../Cargo.toml");
                    assert!(manifest.contains(&format!("name = \"{program}\"")), "{program} is not built");
                }
            }
            ("COPY", [files @ .., _]) => files.iter().for_each(|file| assert!(root.join(file).exists(), "no {file}")),
            ("ENTRYPOINT" | "CMD", _) => {
                let list: Vec<String> = serde_json::from_str(&rest).unwrap_or_else(|e| panic!("{name} {rest}: {e}"));
                assert!(!list.is_empty());
            }
            _ => {}
        }
    }
    let rust = include_str!("../Cargo.toml").lines().find_map(|line| line.strip_prefix("rust-version = \"")).unwrap();
    assert_eq!(bases[0], format!("rust:{}-bullseye", rust.trim_end_matches('"')), "the version that Cargo.toml names");
    assert!(bases[1].starts_with("nvidia/cuda:13.") && bases[1].contains("-runtime-ubuntu"), "{}", bases[1]);
}
