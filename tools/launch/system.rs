//! What the launcher asks of the operating system and the standard library has no safe call for.
#![allow(unsafe_code, reason = "process groups, processor masks and the death of a parent are the system's own calls")]

use std::{fs, io, mem, os::unix::process::CommandExt, process::Command};

/// Sends a signal to a process group. One that is gone has got all it needs.
pub fn signal_group(leader: u32, signal: i32) {
    // SAFETY: touches no memory of ours.
    unsafe { libc::killpg(leader as libc::pid_t, signal) };
}

/// Waits until a child has ended and leaves it unreaped, so that its id, and its group's, stays taken.
pub fn wait_for_end(child: u32) -> io::Result<()> {
    loop {
        // SAFETY: all zero is a valid value of this plain structure.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        // SAFETY: `info` outlives the call, which writes nothing else.
        let answer = unsafe { libc::waitid(libc::P_PID, child, &mut info, libc::WEXITED | libc::WNOWAIT) };
        match io::Error::last_os_error() {
            _ if answer == 0 => return Ok(()),
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
}

/// Whether a process group has members that run, apart from its leader.
pub fn has_members(leader: u32) -> bool {
    let member = |name: &str| {
        let Ok(stat) = fs::read_to_string(format!("/proc/{name}/stat")) else { return false };
        // The program's name stands in brackets and may hold anything; then state, parent, group.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (state, group) = (fields.next(), fields.nth(1));
        state != Some("Z") && group.and_then(|group| group.parse().ok()) == Some(leader)
    };
    let names =
        fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.parse::<u32>().is_ok_and(|pid| pid != leader)).any(|name| member(&name))
}

/// The processors that this process may run on, in order.
pub fn allowed_processors() -> Vec<usize> {
    // SAFETY: all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is as large as said and outlives the call.
    if unsafe { libc::sched_getaffinity(0, mem::size_of_val(&set), &mut set) } != 0 {
        return Vec::new();
    }
    // SAFETY: every index is below the set's size.
    (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

/// Ties a command to this process: it leads a group of its own, runs on `processors` (on all if none are given), and
/// is killed when the thread that starts it ends, however that happens.
pub fn tie(command: &mut Command, processors: &[usize]) {
    // SAFETY: all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for &cpu in processors.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the index is below the set's size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    let (bound, parent) = (!processors.is_empty(), std::process::id());
    let prepare = move || {
        // SAFETY: between fork and exec only calls that are safe in a signal handler; `set` is the closure's own.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid() != parent as libc::pid_t {
                libc::_exit(128 + libc::SIGKILL);
            }
            if bound && libc::sched_setaffinity(0, mem::size_of_val(&set), &set) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: argued inside; the closure allocates nothing.
    unsafe { command.process_group(0).pre_exec(prepare) };
}
