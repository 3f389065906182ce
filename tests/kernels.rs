//! What can be checked of the kernels without running them: that their launchers in Rust say the same of them, and what
//! they take of a multiprocessor.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{Write, stderr},
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below a folder whose name ends so.
fn files(folder: &str, end: &str) -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![root().join(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_str().unwrap().ends_with(end) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// File stem, compute type or nothing, and name of a kernel, with its parameters: names, and types as Rust has them.
type Kernels = BTreeMap<(String, &'static str, String), Vec<(String, String)>>;

/// The text up to the bracket that closes the one it starts with, without both.
fn bracketed(text: &str) -> &str {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        depth += i32::from("([{".contains(c)) - i32::from(")]}".contains(c));
        if depth == 0 {
            return &text[1..at];
        }
    }
    panic!("a bracket stays open: {text:.60}")
}

/// The entry points of preprocessed device code.
fn entries(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let parameter = |text: &str| {
        let text = text.replace("__restrict__", " ").replace('*', " * ");
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let name = words.pop().unwrap().to_string();
        let constant = words.contains(&"const");
        words.retain(|word| *word != "const");
        let kind = match &words[..] {
            [_, "*"] => if constant { "Ref" } else { "Mut" }.to_string(),
            [scalar @ ("u32" | "i32" | "u64" | "f32" | "f64")] => scalar.to_string(),
            other => panic!("{name}: a parameter of the type {}", other.join(" ")),
        };
        (name, kind)
    };
    let declarations = text.split("extern \"C\" __global__").skip(1).map(|rest| {
        let rest = &rest[rest.find("__launch_bounds__").expect("a kernel has launch bounds") + 17..];
        let rest = rest.trim_start();
        let rest = &rest[bracketed(rest).len() + 2..];
        let start = rest.find('(').unwrap();
        let parameters = bracketed(&rest[start..]).split(',').filter(|text| !text.trim().is_empty());
        (rest[..start].trim().to_string(), parameters.map(parameter).collect())
    });
    declarations.collect()
}

/// The kernels that kernels/*.cu define, after the preprocessor, which knows macros best.
fn defined() -> Kernels {
    let mut found = Kernels::new();
    for path in files("kernels", ".cu") {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let named = fs::read_to_string(&path).unwrap().contains("NAMED(");
        for real in if named { &["f32", "bf16"][..] } else { &[""] } {
            let mut command = Command::new("cc");
            command.args(["-E", "-P", "-x", "c++", "-I"]).arg(root().join("kernels")).arg(&path);
            if named {
                command.arg(format!("-DREAL={real}"));
            }
            let output = command.output().expect("cc preprocesses kernels");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            for (name, parameters) in entries(&String::from_utf8(output.stdout).unwrap()) {
                // A kernel that works on activations ends in their type, and only such a file is compiled twice.
                let suffix = if named { format!("_{real}") } else { String::new() };
                let Some(name) = name.strip_suffix(&suffix) else { panic!("{stem}.cu: {name} lacks NAMED") };
                found.insert((stem.to_string(), real, name.to_string()), parameters);
            }
        }
    }
    found
}

/// The kernels that `kernels! { "stem": NAMED name(parameter: Type, …); … }` blocks declare.
fn launched(text: &str) -> Kernels {
    let mut found = Kernels::new();
    let text: String = text.lines().map(|line| line.split("//").next().unwrap().to_string() + "\n").collect();
    for (at, _) in text.match_indices("kernels! {") {
        let mut stem = String::new();
        for item in bracketed(&text[at + "kernels! ".len()..]).split(';') {
            let mut item = item.trim();
            if let Some((name, rest)) = item.strip_prefix('"').and_then(|rest| rest.split_once("\":")) {
                (stem, item) = (name.to_string(), rest);
            }
            let Some(start) = item.find('(') else { continue };
            let head: Vec<&str> = item[..start].split_whitespace().collect();
            let (named, name) = (head.contains(&"NAMED"), head.last().unwrap().to_string());
            let parameters = bracketed(&item[start..]).split(',').filter(|text| !text.trim().is_empty());
            let parameters: Vec<(String, String)> = parameters
                .map(|parameter| {
                    let (name, kind) = parameter.split_once(':').expect("name: Type");
                    let kind = kind.trim();
                    let kind = kind.strip_prefix("Option<").and_then(|kind| kind.strip_suffix('>')).unwrap_or(kind);
                    (name.trim().to_string(), kind.to_string())
                })
                .collect();
            for real in if named { &["f32", "bf16"][..] } else { &[""] } {
                found.insert((stem.clone(), real, name.clone()), parameters.clone());
            }
        }
    }
    found
}

#[test]
fn declarations_are_read() {
    let entry = "extern \"C\" __global__ void __launch_bounds__(32 * (4), 2) a_f32 (f32 *y, const bf16* __restrict__ x,
        const u64 n) { b(1); }";
    let pair = |name: &str, kind: &str| (name.to_string(), kind.to_string());
    let parameters = vec![pair("y", "Mut"), pair("x", "Ref"), pair("n", "u64")];
    assert_eq!(entries(entry), [("a_f32".to_string(), parameters.clone())]);
    let block =
        "kernels! {\n    \"m\":\n    // words (of it)\n    NAMED a(y: Mut, x: Option<Ref>, n: u64);\n    b();\n}";
    let key = |real: &'static str, name: &str| ("m".to_string(), real, name.to_string());
    let expected = [(key("f32", "a"), parameters.clone()), (key("bf16", "a"), parameters), (key("", "b"), vec![])];
    assert_eq!(launched(block), expected.into());
}

#[test]
fn launchers_say_what_kernels_take() {
    let sources = files("src", ".rs").into_iter().map(|path| fs::read_to_string(path).unwrap());
    let launched: Kernels = sources.flat_map(|text| launched(&text)).collect();
    let defined = defined();
    let all: BTreeSet<_> = defined.keys().chain(launched.keys()).collect();
    let differ: Vec<String> = all
        .into_iter()
        .filter(|key| defined.get(key) != launched.get(key))
        .map(|key| format!("{key:?}:\n  kernels/: {:?}\n  src/: {:?}", defined.get(key), launched.get(key)))
        .collect();
    assert!(differ.is_empty(), "kernels and their launchers differ:\n{}", differ.join("\n"));
}

/// Per kernel and architecture: registers, bytes of shared memory, of stack, and of registers spilled to memory.
type Resources = BTreeMap<String, BTreeMap<u32, [u32; 4]>>;

/// Reads what `ptxas -v` says.
fn resources(words: &str) -> Resources {
    let mut found = Resources::new();
    for part in words.split("Compiling entry function '").skip(1) {
        let (name, rest) = part.split_once("' for 'sm_").expect("ptxas names the architecture");
        let architecture = rest.split('\'').next().unwrap().parse().unwrap();
        let before = |unit: &str| {
            let number = rest.split(unit).next().filter(|_| rest.contains(unit))?.rsplit([' ', '\n']).next()?;
            Some(number.parse::<u32>().unwrap_or_else(|_| panic!("{name}: {number:?} {unit}")))
        };
        let registers = before(" registers").expect("ptxas counts registers");
        let spilled = before(" bytes spill stores").unwrap() + before(" bytes spill loads").unwrap();
        let all = [registers, before(" bytes smem").unwrap_or(0), before(" bytes stack frame").unwrap(), spilled];
        found.entry(name.to_string()).or_default().insert(architecture, all);
    }
    found
}

/// The architectures of the table.
const TABLE: [u32; 2] = [80, 90];

fn table(release: &str, resources: &Resources) -> String {
    let mut text = format!(
        "# What kernels take of a multiprocessor\n\n\
         Written by `tools/kernel-table`, compared by `tests/kernels.rs`; nvcc {release}. sm_80 / sm_90; shared memory \
         whose\nsize a launch gives is not counted; spilled bytes are stores and loads.\n\n\
         | Kernel | Registers | Shared bytes | Stack bytes | Spilled bytes |\n|---|---|---|---|---|\n"
    );
    for (name, by_architecture) in resources {
        let cell = |what: usize| TABLE.map(|a| by_architecture[&a][what].to_string()).join(" / ");
        text += &format!("| {name} | {} | {} | {} | {} |\n", cell(0), cell(1), cell(2), cell(3));
    }
    text
}

#[test]
fn the_assembler_is_understood() {
    let words = "ptxas info    : Compiling entry function 'foo' for 'sm_80'\n\
        ptxas info    : Function properties for foo\n 8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
        ptxas info    : Used 38 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]\n";
    let both =
        format!("{words}{}", words.replace("sm_80", "sm_90").replace("38", "40").replace("1024 bytes smem, ", ""));
    let found = resources(&both);
    assert_eq!(found["foo"], [(80, [38, 1024, 8, 28]), (90, [40, 0, 8, 28])].into());
    assert!(table("V1", &found).ends_with("| foo | 38 / 40 | 1024 / 0 | 8 / 8 | 28 / 28 |\n"));
}

/// Nor does nvcc warn. Uses what build.rs kept of its words; `MUPSCALE_WRITE_TABLE=1` writes the table instead of
/// comparing it.
#[test]
fn registers_are_those_of_the_table_and_none_spill() {
    let words = include_str!(concat!(env!("OUT_DIR"), "/resources.txt"));
    let found = resources(words);
    let skip = |why: &str| {
        assert!(env::var_os("MUPSCALE_REQUIRE_NVCC").is_none(), "kernels' registers were not compared: {why}");
        writeln!(stderr(), "SKIPPED: kernels' registers were not compared: {why}").unwrap();
    };
    if !found.values().all(|by_architecture| TABLE.iter().all(|a| by_architecture.contains_key(a))) || words.is_empty()
    {
        return skip("no nvcc compiled them for sm_80 and sm_90 (tools/setup-cuda makes one)");
    }
    assert!(!words.contains("warning"), "nvcc warns:\n{words}");
    let spilled: Vec<&String> =
        found.iter().filter(|(_, by)| by.values().any(|all| all[3] > 0)).map(|(n, _)| n).collect();
    assert!(spilled.is_empty(), "registers spill to memory in {spilled:?}");
    let release = words.split_whitespace().find(|word| word.starts_with('V') && word.contains('.')).unwrap();
    let (path, now) = (root().join("kernels/resources.md"), table(release, &found));
    if env::var_os("MUPSCALE_WRITE_TABLE").is_some() {
        return fs::write(path, now).unwrap();
    }
    let then = fs::read_to_string(path).unwrap();
    if !then.contains(&format!("nvcc {release}.")) {
        return skip("the table is of another nvcc");
    }
    let changed: Vec<&str> = now.lines().filter(|line| !then.lines().any(|other| other == *line)).collect();
    let gone: Vec<&str> = then.lines().filter(|line| !now.lines().any(|other| other == *line)).collect();
    assert!(
        now == then,
        "kernels/resources.md is out of date (tools/kernel-table):\n now {changed:#?}\nthen {gone:#?}"
    );
}
