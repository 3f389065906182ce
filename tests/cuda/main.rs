//! The program on a GPU, executed without one: `tools/with-emulated-gpus` runs the unmodified binary against a driver
//! that runs the kernels of `kernels/` on the processor.
//!
//! | file | |
//! |---|---|
//! | `agreement` | every op = the CPU's, whatever the order of threads, blocks and streams; the roads by which kernels load |
//! | `training` | training, resuming, widening, saving on a GPU = on the CPU; recorded = eager; epilogues |
//! | `ranks` | processes on a GPU each = one process; resumed with another number; a lost rank ends all |
//! | `faults` | what is missing, too old, too small or breaks: one message, the last checkpoint intact |

#[path = "../command/mod.rs"]
mod command;

mod agreement;
mod faults;
mod ranks;
mod training;

use command::{Place, Said};
use std::process::{Command, Stdio};

/// Runs a command line of the program with one emulated GPU and these options of the emulator.
fn emulated(place: &Place, line: &str, options: &[(&str, &str)]) -> Said {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/with-emulated-gpus"));
    command.arg("1").arg(env!("CARGO_BIN_EXE_mupscale")).args(line.split_whitespace());
    command.current_dir(place.path()).stdin(Stdio::null());
    for (name, value) in options {
        let name = if name.starts_with("MUPSCALE_") { name.to_string() } else { format!("MUPSCALE_EMULATED_{name}") };
        command.env(name, value);
    }
    Said::new(command.output().unwrap())
}

/// The same, of a command that must succeed.
fn emulated_ok(place: &Place, line: &str, options: &[(&str, &str)]) -> Said {
    let said = emulated(place, line, options);
    assert_eq!(said.code, 0, "{line} {options:?}: {}{}", said.out, said.err);
    said
}
