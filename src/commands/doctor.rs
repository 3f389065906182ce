//! `doctor`: what this machine offers, what is missing, and the fix.

use super::print_json;
use crate::{
    Result,
    backend::cuda::{
        driver, library,
        module::{self, TOOLKIT},
        nccl, nvrtc,
    },
    machine,
};
use std::thread;

/// Arguments of `doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(serde::Serialize)]
struct Finding {
    what: String,
    found: Option<String>,
    /// What is wrong, and the fix.
    problem: Option<String>,
}

#[derive(serde::Serialize)]
struct Report {
    version: &'static str,
    findings: Vec<Finding>,
    gpus: Vec<driver::Properties>,
    /// Whether `--device cuda` can work.
    cuda: bool,
}

fn finding(what: impl Into<String>, result: Result<String>) -> Finding {
    let what = what.into();
    match result {
        Ok(found) => Finding { what, found: Some(found), problem: None },
        Err(error) => Finding { what, found: None, problem: Some(error.to_string()) },
    }
}

pub fn run(args: Args) -> Result<()> {
    let report = examine();
    if args.json {
        return print_json(&report);
    }
    say!("mupscale {}", report.version)?;
    let width = report.findings.iter().map(|f| f.what.chars().count()).max().unwrap_or(0);
    for Finding { what, found, problem } in &report.findings {
        let text = found.as_deref().or(problem.as_deref()).unwrap_or_default();
        let mark = if problem.is_some() { "!" } else { " " };
        say!("{mark} {what:<width$}  {text}")?;
    }
    match report.cuda {
        true => say!("GPUs can be used: try `mupscale selftest`"),
        false => say!("GPUs cannot be used; the CPU can"),
    }
}

fn examine() -> Report {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let memory = machine::available_memory().map_or(String::new(), |bytes| format!(", {} free", machine::size(bytes)));
    let mut findings = vec![finding("CPU", Ok(format!("{threads} threads{memory}")))];
    let found = library::require(library::DRIVER);
    let version = driver::version();
    let said = version.as_ref().map(|v| format!("CUDA {}", driver::dotted(*v))).map_err(ToString::to_string);
    findings.push(finding("driver", found.map(|path| format!("{path}, {}", said.unwrap_or_else(|e| e)))));
    let gpus: Vec<driver::Properties> = match driver::devices() {
        Ok(count) => (0..count).filter_map(|ordinal| driver::properties(ordinal).ok()).collect(),
        Err(error) => {
            findings.push(finding("GPUs", Err(error)));
            Vec::new()
        }
    };
    for gpu in &gpus {
        let size = machine::size(gpu.memory);
        let mut text = format!("{}, sm_{}, {} multiprocessors, {size}", gpu.name, gpu.capability, gpu.multiprocessors);
        if let Ok(version) = version {
            let (road, why) = module::road(gpu.capability, version);
            text += &format!("; kernels: {road} ({why})");
        }
        findings.push(finding(format!("GPU {}", gpu.ordinal), Ok(text)));
    }
    let products = library::require(library::CUBLASLT).map(|found| found.to_string());
    let has_products = products.is_ok();
    findings.push(finding("cuBLASLt", products));
    let compiler = library::require(library::NVRTC)
        .and_then(|found| Ok(format!("{found}, {}, needed where no image of a kernel fits", nvrtc::version()?)));
    findings.push(finding("NVRTC", compiler));
    let sums = library::require(library::NCCL)
        .and_then(|found| Ok(format!("{found}, {}, needed for several GPUs", nccl::version()?)));
    findings.push(finding("NCCL", sums));
    let built = TOOLKIT.map_or("without nvcc: kernels are compiled on this machine".into(), |t| format!("CUDA {t}"));
    findings.push(finding("built with", Ok(built)));
    let usable = gpus.iter().any(|gpu| gpu.capability >= driver::OLDEST_GPU);
    Report { version: env!("MUPSCALE_VERSION"), cuda: usable && has_products && version.is_ok(), findings, gpus }
}
