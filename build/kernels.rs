//! Kernels as the binary carries them: their sources, and, where an nvcc is found, machine code and PTX. Writes
//! `$OUT_DIR/kernels.rs` for src/backend/cuda/module.rs, and `$OUT_DIR/resources.txt`, what the assembler said of each
//! kernel's registers and memory, for tests/kernels.rs.
//!
//! What nvcc made is kept under target/kernels by a hash of all it depends on, so that a kernel is compiled once,
//! whatever the profile and however often other files change.

use crate::nvcc::Nvcc;
use std::{
    collections::BTreeMap,
    env,
    fmt::Write,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    iter,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
};

/// Machine code that a release carries; later GPUs run the PTX.
const RELEASED: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// Machine code while working: the oldest architecture, and the one that is designed for.
const WORKING: [u32; 2] = [80, 90];
/// The PTX is for the oldest architecture that is supported.
const OLDEST: u32 = 80;
/// A comma-separated list of architectures instead; an empty one embeds sources only.
const ARCHITECTURES: &str = "MUPSCALE_CUDA_ARCHS";

/// One call of nvcc. The PTX has no architecture: it is for all.
struct Job<'a> {
    module: &'a Module,
    architecture: Option<u32>,
    options: Vec<String>,
    target: PathBuf,
}

/// A kernel file for one compute type, or for none.
struct Module {
    stem: String,
    real: Option<&'static str>,
    path: PathBuf,
    /// The file and all it includes.
    text: String,
}

/// Writes `$OUT_DIR/kernels.rs`; returns the toolkit's version when there was one to compile with. The error's first
/// line says which kernel failed.
pub fn embed() -> Result<Option<String>, String> {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed={ARCHITECTURES}");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let sources = sources(&root.join("kernels"))?;
    let modules = modules(&sources);
    let nvcc = Nvcc::find(&root)?;
    if nvcc.is_none() {
        println!(
            "cargo::warning=no nvcc in CUDA_HOME, PATH or .cuda (tools/setup-cuda makes it): the binary carries the \
             kernels' sources and compiles them with NVRTC at first use"
        );
    }
    let mut jobs = Vec::new();
    if let Some(nvcc) = &nvcc {
        let cache = cache(&out);
        fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        let architectures = architectures(nvcc)?;
        jobs = modules.iter().flat_map(|module| module.jobs(nvcc, &architectures, &cache, &root)).collect();
        run(nvcc, &jobs)?;
    }
    let nvcc = nvcc.filter(|_| !jobs.is_empty());
    let toolkit = nvcc.as_ref().map(|nvcc| nvcc.version.clone());
    write(&out.join("kernels.rs"), &listing(&sources, &modules, &jobs, toolkit.as_deref()))?;
    let words: Result<String, String> = jobs.iter().map(|job| read(&job.words())).collect();
    write(&out.join("resources.txt"), &(nvcc.map_or(String::new(), |nvcc| nvcc.words) + &words?))?;
    Ok(toolkit)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|e| format!("{name}: {e}"))
}

/// Kernels and headers: paths and texts by file name.
fn sources(folder: &Path) -> Result<BTreeMap<String, (PathBuf, String)>, String> {
    let wrong = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(wrong)? {
        let path = entry.map_err(wrong)?.path();
        if path.extension().is_some_and(|end| end == "cu" || end == "cuh") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text = read(&path)?;
            found.insert(name, (path, text));
        }
    }
    Ok(found)
}

/// A file that names kernels by their compute type is compiled for each.
fn modules(sources: &BTreeMap<String, (PathBuf, String)>) -> Vec<Module> {
    let mut modules = Vec::new();
    for (name, (path, text)) in sources {
        let Some(stem) = name.strip_suffix(".cu") else { continue };
        let reals = if text.contains("NAMED(") { vec![Some("f32"), Some("bf16")] } else { vec![None] };
        let text = included(name, sources, &mut Vec::new());
        modules.extend(reals.into_iter().map(|real| Module {
            stem: stem.to_string(),
            real,
            path: path.clone(),
            text: text.clone(),
        }));
    }
    modules
}

/// A file's text after those of the headers that it includes, each once.
fn included(name: &str, sources: &BTreeMap<String, (PathBuf, String)>, seen: &mut Vec<String>) -> String {
    let Some((_, text)) = sources.get(name).filter(|_| !seen.iter().any(|other| other == name)) else {
        return String::new();
    };
    seen.push(name.to_string());
    let headers = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
    headers.map(|header| included(header, sources, seen)).collect::<String>() + text
}

fn architectures(nvcc: &Nvcc) -> Result<Vec<u32>, String> {
    let Ok(named) = env::var(ARCHITECTURES) else {
        let wanted: &[u32] = if variable("PROFILE")? == "release" { &RELEASED } else { &WORKING };
        // An older toolkit does not know the newest; GPUs of those run the PTX.
        return Ok(wanted.iter().copied().filter(|wanted| nvcc.architectures.contains(wanted)).collect());
    };
    let parts = named.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| match part.parse() {
            Ok(number) if nvcc.architectures.contains(&number) => Ok(number),
            _ => Err(format!("{ARCHITECTURES}={named}: {part} is none of {:?}", nvcc.architectures)),
        })
        .collect()
}

/// target/kernels: beside the profiles' folders, in the one that Cargo marks as its own.
fn cache(out: &Path) -> PathBuf {
    out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file()).unwrap_or(out).join("kernels")
}

impl Module {
    fn jobs<'a>(&'a self, nvcc: &Nvcc, architectures: &[u32], cache: &Path, root: &Path) -> Vec<Job<'a>> {
        if architectures.is_empty() {
            return Vec::new();
        }
        let mut common = vec!["-O3".to_string(), "-std=c++17".into()];
        common.extend(self.real.map(|real| format!("-DREAL={real}")));
        let job = |architecture: Option<u32>| {
            let mut options = common.clone();
            match architecture {
                Some(a) => {
                    let code = format!("-gencode=arch=compute_{a},code=sm_{a}");
                    options.extend(["-fatbin".to_string(), "--compress-mode=size".into(), "-Xptxas=-v".into(), code]);
                }
                None => options.extend(["-ptx".to_string(), format!("-arch=compute_{OLDEST}")]),
            }
            let mut hasher = DefaultHasher::new();
            (&nvcc.words, &options, &self.text).hash(&mut hasher);
            let real = self.real.map_or(String::new(), |real| format!("-{real}"));
            let kind = architecture.map_or("ptx".to_string(), |a| format!("sm_{a}.fatbin"));
            let target = cache.join(format!("{}{real}-{:016x}.{kind}", self.stem, hasher.finish()));
            options.extend(["-I".to_string(), root.join("kernels").display().to_string()]);
            Job { module: self, architecture, options, target }
        };
        architectures.iter().map(|&a| Some(a)).chain([None]).map(job).collect()
    }
}

impl Job<'_> {
    /// What nvcc said, beside what it made.
    fn words(&self) -> PathBuf {
        self.target.with_extension("txt")
    }

    /// Compiles unless that was done before. What stands under the final name is whole.
    fn run(&self, nvcc: &Nvcc) -> Result<(), String> {
        if self.target.is_file() && self.words().is_file() {
            return Ok(());
        }
        let wrong = |e: std::io::Error| format!("{}: {e}", self.target.display());
        let part = self.target.with_extension(format!("part{}", std::process::id()));
        let compiled = nvcc.compile(&self.options, &self.module.path, &part);
        let words = compiled.map_err(|words| format!("kernels/{}.cu does not compile\n{words}", self.module.stem))?;
        write(&self.words(), &words)?;
        if self.architecture.is_none() {
            // The driver takes PTX as a string of C.
            let text = [fs::read(&part).map_err(wrong)?, vec![0]].concat();
            fs::write(&part, text).map_err(wrong)?;
        }
        fs::rename(&part, &self.target).map_err(wrong)
    }
}

/// Does all jobs, on as many threads as Cargo allows.
fn run(nvcc: &Nvcc, jobs: &[Job]) -> Result<(), String> {
    let threads: usize = variable("NUM_JOBS")?.parse().map_err(|e| format!("NUM_JOBS: {e}"))?;
    let queue = Mutex::new(jobs.iter());
    let take = || queue.lock().ok()?.next();
    let work = || iter::from_fn(take).try_for_each(|job| job.run(nvcc));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a thread panicked".to_string())?)
    })
}

/// The text of `$OUT_DIR/kernels.rs`.
fn listing(
    sources: &BTreeMap<String, (PathBuf, String)>,
    modules: &[Module],
    jobs: &[Job],
    toolkit: Option<&str>,
) -> String {
    let mut text = String::from("/// Kernel files, for each compute type.\npub static KERNELS: &[Source] = &[\n");
    for module in modules {
        let (stem, real, path) = (&module.stem, module.real, &module.path);
        let _ = writeln!(text, "    Source {{ stem: {stem:?}, real: {real:?}, text: include_str!({path:?}),");
        let own = || jobs.iter().filter(|job| std::ptr::eq(job.module, module));
        let ptx = own().find(|job| job.architecture.is_none());
        let ptx = ptx.map_or("None".to_string(), |job| format!("Some(include_bytes!({:?}))", job.target));
        let images = own().filter_map(|job| Some(format!("({}, include_bytes!({:?}))", job.architecture?, job.target)));
        let images: Vec<String> = images.collect();
        let _ = writeln!(text, "        ptx: {ptx}, images: &[{}] }},", images.join(", "));
    }
    text += "];\n\n/// Headers that kernels include, by name.\npub static HEADERS: &[(&str, &str)] = &[\n";
    for (name, (path, _)) in sources.iter().filter(|(name, _)| name.ends_with(".cuh")) {
        let _ = writeln!(text, "    ({name:?}, include_str!({path:?})),");
    }
    let _ =
        write!(text, "];\n\n/// The toolkit that compiled them.\npub static TOOLKIT: Option<&str> = {toolkit:?};\n");
    text
}
