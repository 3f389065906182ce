//! What the node has: GPUs, processors, and which of them belong together.

use crate::{
    options::{Bind, Count, Options},
    output::say,
    system,
};
use mupscale::{Error, Result, backend::cuda::driver};
use std::{collections::BTreeSet, env, fs, path::Path};

/// How many processes this node starts.
pub fn processes(options: &Options) -> Result<usize> {
    let count = options.nproc_per_node;
    let processors = || system::allowed_processors().len().max(1);
    match (count, gpus()) {
        (Count::Cpu, _) => Ok(processors()),
        (Count::Auto, Ok(0) | Err(_)) => {
            say(&format!("no GPU: {} processes, one for each processor", processors()));
            Ok(processors())
        }
        (Count::Gpu, Err(error)) => Err(Error::config("--nproc-per-node", "gpu", error)),
        (Count::Gpu, Ok(0)) => Err(Error::config("--nproc-per-node", "gpu", "this node shows no GPU: see nvidia-smi")),
        (Count::Auto | Count::Gpu, Ok(gpus)) => Ok(gpus),
        (Count::Exactly(count), Ok(gpus)) if 0 < gpus && gpus < count && !options.oversubscribe => {
            let why = format!(
                "more processes than GPUs: {gpus} visible (nvidia-smi, CUDA_VISIBLE_DEVICES). Use --nproc-per-node gpu, \
                 or --oversubscribe if the processes do not need a GPU each"
            );
            Err(Error::config("--nproc-per-node", count, why))
        }
        (Count::Exactly(count), _) => Ok(count),
    }
}

/// GPUs that a program would see. No driver is no GPU; any other trouble of the driver's is said.
fn gpus() -> Result<usize, String> {
    if env::var_os("CUDA_VISIBLE_DEVICES").is_some_and(|list| list.is_empty() || list == "-1") {
        return Ok(0);
    }
    driver::devices().map(|count| count as usize).map_err(|error| error.to_string())
}

/// The processors of each local process; empty: all that the launcher may use.
pub fn binding(bind: Bind, processes: usize) -> Result<Vec<Vec<usize>>> {
    let (allowed, system) = (system::allowed_processors(), Path::new("/sys/devices/system"));
    let shares = match bind {
        Bind::None => return Ok(vec![Vec::new(); processes]),
        Bind::Cores => by_cores(&cores(system, &allowed), processes),
        Bind::Numa => by_nodes(&nodes(system, &allowed), processes, &gpu_nodes()),
    };
    match shares {
        Some(shares) => Ok(shares),
        None => {
            let why = format!("there are {} processors for {processes} processes: use --bind none", allowed.len());
            Err(Error::config("--bind", "cores", why))
        }
    }
}

/// Processors that share a core, as groups.
fn cores(system: &Path, allowed: &[usize]) -> Vec<Vec<usize>> {
    let mut found = BTreeSet::new();
    for cpu in allowed {
        let siblings = list(&system.join(format!("cpu/cpu{cpu}/topology/thread_siblings_list")));
        let siblings: Vec<_> = siblings.into_iter().filter(|other| allowed.contains(other)).collect();
        found.insert(if siblings.is_empty() { vec![*cpu] } else { siblings });
    }
    found.into_iter().collect()
}

/// Processors of every NUMA node.
fn nodes(system: &Path, allowed: &[usize]) -> Vec<(usize, Vec<usize>)> {
    let online = list(&system.join("node/online"));
    let found = online.into_iter().map(|node| {
        let cpus = list(&system.join(format!("node/node{node}/cpulist")));
        (node, cpus.into_iter().filter(|cpu| allowed.contains(cpu)).collect::<Vec<_>>())
    });
    let found: Vec<_> = found.filter(|(_, cpus)| !cpus.is_empty()).collect();
    if found.is_empty() { vec![(0, allowed.to_vec())] } else { found }
}

/// The NUMA node of each visible GPU, by its place on the bus, as the driver numbers equal GPUs. Empty if unknown.
fn gpu_nodes() -> Vec<usize> {
    let mut buses: Vec<_> = fs::read_dir("/proc/driver/nvidia/gpus")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    buses.sort();
    let node = |bus: &String| {
        let text = fs::read_to_string(format!("/sys/bus/pci/devices/{bus}/numa_node")).ok()?;
        text.trim().parse::<usize>().ok()
    };
    let all: Option<Vec<_>> = buses.iter().map(node).collect();
    let all = all.unwrap_or_default();
    match env::var("CUDA_VISIBLE_DEVICES") {
        Ok(list) => list.split(',').filter_map(|gpu| all.get(gpu.trim().parse::<usize>().ok()?).copied()).collect(),
        Err(_) => all,
    }
}

/// Whole cores, neighbours together.
fn by_cores(cores: &[Vec<usize>], processes: usize) -> Option<Vec<Vec<usize>>> {
    if cores.len() < processes {
        return None;
    }
    let share = |i: usize| cores[cores.len() * i / processes..cores.len() * (i + 1) / processes].concat();
    Some((0..processes).map(share).collect())
}

/// A whole node: that of the process's GPU, or else the processes spread evenly.
fn by_nodes(nodes: &[(usize, Vec<usize>)], processes: usize, gpus: &[usize]) -> Option<Vec<Vec<usize>>> {
    let share = |i: usize| {
        let near = gpus.get(i).and_then(|wanted| nodes.iter().find(|(node, _)| node == wanted));
        near.unwrap_or(&nodes[i * nodes.len() / processes]).1.clone()
    };
    Some((0..processes).map(share).collect())
}

/// Numbers in the kernel's notation: `0-3,8`.
fn list(path: &Path) -> Vec<usize> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}
