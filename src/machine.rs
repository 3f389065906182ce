//! What the operating system knows: memory and signals.

use crate::{Error, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
};
use std::{
    fs,
    sync::{Arc, OnceLock, atomic::AtomicBool},
};

/// Bytes of memory that new allocations can take without swapping; none where the system does not say.
pub fn available_memory() -> Option<usize> {
    field("/proc/meminfo", "MemAvailable:")
}

/// Bytes of this process that lie in memory.
pub fn resident_memory() -> Option<usize> {
    field("/proc/self/status", "VmRSS:")
}

/// Bytes of this process that lie in memory and in no file.
pub fn anonymous_memory() -> Option<usize> {
    field("/proc/self/status", "RssAnon:")
}

fn field(file: &str, name: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// A flag that SIGTERM, SIGINT and SIGUSR1 (a queue's notice) raise; a second SIGINT ends the process at once.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<std::io::Result<Arc<AtomicBool>>> = OnceLock::new();
    let flag = FLAG.get_or_init(|| {
        let stop = Arc::new(AtomicBool::new(false));
        // In this order: the first signal finds the flag down and only raises it.
        flag::register_conditional_shutdown(SIGINT, 130, stop.clone())?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            flag::register(signal, stop.clone())?;
        }
        Ok(stop)
    });
    flag.as_ref().cloned().map_err(|e| Error::Device(format!("signal handlers cannot be set: {e}")))
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    match bytes {
        0..0x400 => format!("{bytes} B"),
        0x400..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
        _ => format!("{:.2} GiB", bytes as f64 / (1 << 30) as f64),
    }
}
