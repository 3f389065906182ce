//! What can be checked of the house's principles by reading its files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Modules of the crate from the ground up; a module imports from its own line or from lines above it.
const LAYERS: [&[&str]; 12] = [
    &["error", "dtype", "dims", "rng", "machine", "trace"],
    &["backend", "comm"],
    &["ops"],
    &["mup", "model"],
    &["config", "data", "checkpoint", "report"],
    &["optim", "schedule", "feed"],
    &["state"],
    &["upscale", "widen"],
    &["trainer"],
    &["run"],
    &["bench", "quickstart", "selftest"],
    &["commands"],
];

/// Files that hold unsafe code; each opens with an `allow` that says why.
const UNSAFE: [&str; 17] = [
    "src/backend/cpu/gemm.rs",
    "src/backend/cpu/mod.rs",
    "src/backend/cpu/parallel.rs",
    "src/backend/cpu/stream.rs",
    "src/backend/cuda/driver.rs",
    "src/backend/cuda/gemm.rs",
    "src/backend/cuda/graph.rs",
    "src/backend/cuda/launch.rs",
    "src/backend/cuda/library.rs",
    "src/backend/cuda/mod.rs",
    "src/backend/cuda/module.rs",
    "src/backend/cuda/nccl.rs",
    "src/backend/cuda/nvrtc.rs",
    "src/checkpoint/disk.rs",
    "src/checkpoint/read.rs",
    "src/data/mapped.rs",
    "tools/launch/system.rs",
];

const LINES: usize = 500;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text files of the repository, with their paths from its root.
fn files() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders: Vec<PathBuf> =
        ["src", "build", "tests", "tools", "kernels", "examples", ".ci"].map(|name| root().join(name)).into();
    let mut paths: Vec<PathBuf> = fs::read_dir(root()).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.is_file() && path.file_name().is_some_and(|name| name != "Cargo.lock" && name != ".git"));
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { paths.push(path) }
        }
    }
    for path in paths {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
        // Fixtures are binary.
        if let Ok(text) = fs::read_to_string(&path) {
            found.insert(name, text);
        }
    }
    assert!(found.len() > 100 && found.contains_key("src/lib.rs"), "the repository was not found");
    found
}

fn sources() -> impl Iterator<Item = (String, String)> {
    files().into_iter().filter(|(name, _)| name.starts_with("src/") && name.ends_with(".rs"))
}

/// The part of a source file that is no test, without comments.
fn code(name: &str, text: &str) -> String {
    if name.ends_with("tests.rs") || name.contains("/tests/") {
        return String::new();
    }
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let without_comment = |line: &str| line.split("//").next().unwrap_or_default().to_string();
    text.lines().map(without_comment).collect::<Vec<_>>().join("\n")
}

/// Reports all that is untidy at once.
fn none(untidy: Vec<String>, rule: &str) {
    assert!(untidy.is_empty(), "{rule}:\n  {}", untidy.join("\n  "));
}

/// Top-level modules that code names: `crate::x::…` and `use crate::{x::…, y}`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    for part in code.split("crate::").skip(1) {
        if !part.starts_with('{') {
            found.insert(word(part));
            continue;
        }
        let mut depth = 0;
        let mut start = true;
        for (at, c) in part.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
            if depth == 1 && start && c.is_alphabetic() {
                found.insert(word(&part[at..]));
                start = false;
            }
            start |= depth == 1 && (c == ',' || (c == '{' && at == 0));
        }
    }
    found
}

#[test]
fn imports_are_read_from_code() {
    let code =
        "use crate::{\n    Error,\n    a::{self, b::{C, d}},\n    e::F,\n};\nuse crate::g::H; fn i() { crate::j::k() }";
    assert_eq!(imports(code).into_iter().collect::<Vec<_>>(), ["Error", "a", "e", "g", "j"]);
}

#[test]
fn imports_point_downward() {
    let layer = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let mut untidy = Vec::new();
    for (name, text) in sources() {
        let module = name["src/".len()..].split('/').next().unwrap().trim_end_matches(".rs").to_string();
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let Some(own) = layer(&module) else {
            untidy.push(format!("{module} stands in no layer"));
            continue;
        };
        for import in imports(&code(&name, &text)) {
            let Some(other) = layer(&import).filter(|&other| other > own) else { continue };
            untidy.push(format!("{name} (layer {own}) imports {import} (layer {other})"));
        }
    }
    none(untidy, "imports go downward only");
}

#[test]
fn files_are_short_and_well_named() {
    let mut untidy = Vec::new();
    for (name, text) in files() {
        let script = text.starts_with("#!/");
        let lines = text.lines().count();
        if lines > LINES && (script || [".rs", ".py", ".sh", ".cu", ".cuh"].iter().any(|end| name.ends_with(end))) {
            untidy.push(format!("{name} has {lines} lines; the limit is {LINES}"));
        }
        let stem = Path::new(&name).file_stem().unwrap().to_str().unwrap();
        if name.split('/').chain([stem]).any(|part| ["utils", "util", "misc", "helpers", "helper"].contains(&part)) {
            untidy.push(format!("{name}: say what it does"));
        }
    }
    none(untidy, "files under 500 lines, named for what they hold");
}

#[test]
fn unsafe_code_is_listed_and_argued() {
    let (mut untidy, mut seen) = (Vec::new(), BTreeSet::new());
    let programs = files().into_iter().filter(|(name, _)| name.starts_with("tools/") && name.ends_with(".rs"));
    for (name, text) in sources().chain(programs) {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let line = line.split("//").next().unwrap_or_default();
            // What an unsafe function asks of its callers stands where clippy wants it, in its documentation. A macro
            // makes each call of the driver an unsafe block.
            if !["unsafe {", "unsafe impl", "cuda!("].iter().any(|word| line.contains(word)) {
                continue;
            }
            seen.insert(name.clone());
            // The argument stands in the comment above, before the statement that the block is part of, and perhaps
            // attributes or the other cases that it speaks for.
            let above = &lines[i.saturating_sub(10)..i];
            if !above.iter().any(|line| line.contains("SAFETY:")) {
                untidy.push(format!("{name}:{}: unsafe code without its argument", i + 1));
            }
        }
        if text.contains("allow(unsafe_code") != UNSAFE.contains(&name.as_str()) {
            untidy.push(format!("{name}: the list of files with unsafe code says otherwise"));
        }
    }
    assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), UNSAFE, "files with unsafe code");
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""), "unsafe code is denied at the root");
    none(untidy, "unsafe code only in named files, each block argued");
}

/// A buffer is opaque: only the backend and the operations' own CPU code see its memory.
#[test]
fn memory_is_seen_by_operations_only() {
    let mut untidy = Vec::new();
    for (name, text) in sources() {
        let inside = name.starts_with("src/backend/") || name.starts_with("src/ops/");
        let code = code(&name, &text);
        for word in [".as_slice()", ".into_slice()"].into_iter().filter(|word| !inside && code.contains(word)) {
            untidy.push(format!("{name}: {word}"));
        }
    }
    none(untidy, "device memory is a slice in backend/ and ops/ alone");
}

/// `print!` panics when a pipe is closed.
#[test]
fn results_are_printed_by_one_function() {
    let mut untidy = Vec::new();
    for (name, text) in sources() {
        let code = code(&name, &text);
        let printed = ["println!(", "print!("].iter().any(|word| {
            code.match_indices(word).any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        });
        if printed || code.contains("eprint") {
            untidy.push(name);
        }
    }
    none(untidy, "commands print through `say!`, progress through report/progress.rs; these use print! or println!");
}

#[test]
fn nothing_is_left_undone_or_tied_to_a_machine() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("todo", "!("), concat!("unimplemented", "!(")];
    let places = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/tmp", "/wt"), concat!("/ho", "me/")];
    let mut untidy = Vec::new();
    for (name, text) in files() {
        for (i, line) in text.lines().enumerate() {
            let here = |what: &str| format!("{name}:{}: {what}", i + 1);
            untidy.extend(words.iter().chain(&places).filter(|word| line.contains(**word)).map(|word| here(word)));
            let attribute = line.trim_start();
            let bare = attribute.starts_with(concat!("#[ig", "nore]"));
            let silent = ["#[allow(", "#![allow(", "#[expect(", "#![expect("].iter().any(|a| attribute.starts_with(a));
            // An attribute may go on over some lines.
            let whole: String = text.lines().skip(i).take(5).collect();
            let reasoned = whole.split(']').next().is_some_and(|attribute| attribute.contains("reason = "));
            if name.ends_with(".rs") && (bare || (silent && !reasoned)) {
                untidy.push(here("an attribute without a reason"));
            }
        }
    }
    none(untidy, "no open ends, no path of one machine, no exception without its reason");
}

/// Device code has the stem of the operation it belongs to, and perhaps more words.
#[test]
fn stems_pair_up() {
    let names: BTreeSet<String> = files().into_keys().collect();
    let operation =
        |stem: &str| names.contains(&format!("src/ops/{stem}.rs")) || names.contains(&format!("src/ops/{stem}/mod.rs"));
    let stems = names.iter().filter_map(|name| name.strip_prefix("kernels/")?.strip_suffix(".cu"));
    let alone = stems.filter(|stem| {
        let cuts = stem.match_indices('_').map(|(at, _)| at).chain([stem.len()]);
        !cuts.into_iter().any(|at| operation(&stem[..at]))
    });
    none(alone.map(|stem| format!("kernels/{stem}.cu")).collect(), "a kernel's stem is that of its operation");
}

/// What the machine is asked for by name lies in one header, which the emulator has a form of; a toolkit's headers are
/// not there when NVRTC compiles.
#[test]
fn kernels_stand_on_one_header() {
    let mut untidy = Vec::new();
    for (name, text) in files().into_iter().filter(|(name, _)| name.starts_with("kernels/")) {
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let assembly = ["asm(", "asm volatile", "__asm"].iter().any(|word| code.contains(word));
            if (assembly && name != "kernels/device.cuh") || code.trim_start().starts_with("#include <") {
                untidy.push(format!("{name}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    none(untidy, "inline PTX in kernels/device.cuh alone, no header from elsewhere");
}
