//! `mupscale-launch`: starts a program on every GPU of one or many machines, as torchrun does.
//!
//! ```text
//! options → meeting (who serves the store) → agent of this node ⇄ store ⇄ leader (beside the host's agent)
//!                                              └ workers: processes, output
//! ```
//!
//! The leader alone decides (`leader.rs`); agents do what its steps say and report (`agent.rs`, `messages.rs`). A round
//! is a set of processes that were started together; a failure, a lost node or a new one ends it and begins another.

mod agent;
mod hardware;
mod leader;
mod meeting;
mod messages;
mod options;
mod output;
mod system;
mod workers;

use clap::Parser;
use mupscale::{Error, Result};
use options::Options;
use output::say;
use std::{env, os::unix::fs::PermissionsExt, path::Path, process::ExitCode};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(code) => ExitCode::from(code.clamp(0, 255) as u8),
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Returns the exit code of the first process that failed.
fn run(options: &Options) -> Result<i32> {
    let meeting = options.meeting().map_err(Error::Usage)?;
    runs(options)?;
    let processes = hardware::processes(options)?;
    let processors = hardware::binding(options.bind, processes)?;
    let member = meeting::Member::join(options, &meeting, processes)?;
    if processes > 1 && env::var_os("OMP_NUM_THREADS").is_none() {
        say("OMP_NUM_THREADS=1 for each process, as it is not set");
    }
    if options.logs() {
        say(&format!("logs are in {}", workers::log_folder(options, &member.run).display()));
    }
    let (code, decided) = agent::Agent::new(options, &meeting, &member, processors).work()?;
    member.leave(decided);
    Ok(code)
}

/// Whether the program can be started at all, before anything else is.
fn runs(options: &Options) -> Result<()> {
    let name = &options.program[0];
    let executable = |path: &Path| path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    let found = match name.to_string_lossy().contains('/') {
        true => executable(Path::new(name)),
        false => env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| executable(&dir.join(name))),
    };
    if found {
        return Ok(());
    }
    let name = name.to_string_lossy();
    let why = match name.ends_with(".py") {
        true => format!("is no program; to start a Python script: mupscale-launch … python -u {name} …"),
        false => "is no program that can be started: not found, or not executable".into(),
    };
    Err(Error::config("program", name, why))
}
