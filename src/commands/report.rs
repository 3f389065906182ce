//! `report` and `watch`: runs as a page and on the screen.

use crate::{
    Error, Result,
    checkpoint::{CONFIG, Reader},
    data::output::Partial,
    model,
    quickstart::comparison::training_flops_per_token,
    report::{
        metrics::{self, Tail},
        page::{self, Sample},
        screen::Watched,
    },
    run::{self, CONFIG_FILE, SAMPLES_FILE},
    state::Meaning,
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

/// Arguments of `report`.
#[derive(clap::Args)]
pub struct ReportArgs {
    /// Run folders, or folders of run folders
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The page to write
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Above the page; the runs' names if left out
    #[arg(long)]
    title: Option<String>,
    /// Replace a page that exists
    #[arg(long)]
    force: bool,
}

/// Arguments of `watch`.
#[derive(clap::Args)]
pub struct WatchArgs {
    /// The run folder
    run: PathBuf,
    /// Show the run once and end
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0)]
    every: f64,
}

/// Writes the page.
pub fn report(args: ReportArgs) -> Result<()> {
    let mut folders = Vec::new();
    for path in &args.runs {
        folders.extend(run_folders(path)?);
    }
    let names = names(&folders);
    let title = args.title.unwrap_or_else(|| names.join(", "));
    let runs = folders.iter().zip(names).map(|(folder, name)| read_run(folder, name)).collect::<Result<Vec<_>>>()?;
    let partial = Partial::file(&args.out, args.force)?;
    fs::write(partial.path(), page::render(&title, &runs)).map_err(Error::io("write", partial.path()))?;
    partial.publish()?;
    say!("{} runs; {}", runs.len(), args.out.display())
}

/// The run folder itself, or those in a folder.
fn run_folders(path: &Path) -> Result<Vec<PathBuf>> {
    let is_run = |path: &Path| path.join(metrics::FILE_NAME).is_file();
    if is_run(path) {
        return Ok(vec![path.into()]);
    }
    let entries = fs::read_dir(path).map_err(Error::io("read", path))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| is_run(path)).collect();
    found.sort();
    if found.is_empty() {
        let why = format!("is no run folder and holds none: there is no {}", metrics::FILE_NAME);
        return Err(Error::file(path, why));
    }
    Ok(found)
}

/// The folders' own names, or their paths where two have the same name.
fn names(folders: &[PathBuf]) -> Vec<String> {
    let own = |path: &PathBuf| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let unique = folders.iter().map(own).collect::<std::collections::BTreeSet<_>>().len() == folders.len();
    folders.iter().map(|path| if unique { own(path) } else { path.display().to_string() }).collect()
}

fn read_run(folder: &Path, name: String) -> Result<page::Run> {
    let records = metrics::read(&folder.join(metrics::FILE_NAME))?;
    let settings = settings(folder)?;
    // A run that has just begun has no checkpoint, and what only a checkpoint tells is left out.
    let meaning: Option<Meaning> = match run::checkpoint_path(folder).and_then(Reader::open) {
        Ok(reader) => Some(reader.json(CONFIG)?),
        Err(_) => None,
    };
    let table = meaning.as_ref().map(|m| (m, model::table(&m.spec, &m.scaling)));
    Ok(page::Run {
        name,
        records,
        steps: steps(&settings),
        parameters: table.as_ref().map(|(_, table)| table.parameters() as u64),
        flops_per_token: table.as_ref().map(|(m, table)| training_flops_per_token(&m.spec, table)),
        settings,
        samples: samples(&folder.join(SAMPLES_FILE))?,
    })
}

fn steps(settings: &BTreeMap<String, String>) -> Option<u64> {
    settings.get("steps")?.parse().ok()
}

/// The run's configuration as dotted keys; empty without one.
fn settings(folder: &Path) -> Result<BTreeMap<String, String>> {
    let path = folder.join(CONFIG_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(Error::io("read", &path)(e)),
    };
    let table: toml::Table = toml::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))?;
    let mut found = BTreeMap::new();
    flatten("", &table, &mut found);
    found.remove("run");
    Ok(found)
}

fn flatten(prefix: &str, table: &toml::Table, found: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => flatten(&format!("{prefix}{key}."), inner, found),
            toml::Value::String(text) => drop(found.insert(format!("{prefix}{key}"), text.clone())),
            value => drop(found.insert(format!("{prefix}{key}"), value.to_string())),
        }
    }
}

/// What `generate --prompts` wrote; nothing where there is no such file.
fn samples(path: &Path) -> Result<Vec<Sample>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    let line = |(i, line): (usize, &str)| {
        let why = |e| format!("line {}: is no sample ({e}): write it with `mupscale generate --prompts`", i + 1);
        serde_json::from_str(line).map_err(|e| Error::file(path, why(e)))
    };
    text.lines().enumerate().map(line).collect()
}

/// Shows a run until its last step.
pub fn watch(args: WatchArgs) -> Result<()> {
    if !(args.every >= 0.1 && args.every <= 3600.0) {
        return Err(Error::config("--every", args.every, "must be between 0.1 and 3600 seconds"));
    }
    let path = args.run.join(metrics::FILE_NAME);
    let name = names(std::slice::from_ref(&args.run)).concat();
    let mut watched = Watched::new(name, steps(&settings(&args.run)?));
    let mut tail = Tail::new(&path);
    let terminal = console::Term::stdout();
    let live = terminal.is_term() && !args.once;
    if live {
        super::print("\x1b[2J")?;
    }
    loop {
        tail.news()?.into_iter().for_each(|record| watched.push(record));
        let changed = fs::metadata(&path).and_then(|m| m.modified()).map_err(Error::io("read", &path))?;
        let silent = SystemTime::now().duration_since(changed).unwrap_or_default().as_secs_f64();
        let (height, width) = if live { terminal.size() } else { (24, 80) };
        // The last line stays free, so that nothing scrolls.
        let frame = watched.frame(width.into(), usize::from(height).saturating_sub(1), silent);
        if !live {
            return super::print(frame);
        }
        // From the top, each line's old rest cleared, and what lies below.
        super::print(format!("\x1b[H{}\x1b[J", frame.replace('\n', "\x1b[K\n")))?;
        if watched.finished() {
            return Ok(());
        }
        thread::sleep(Duration::from_secs_f64(args.every));
    }
}
