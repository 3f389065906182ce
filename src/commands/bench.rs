//! `bench`.
use crate::Result;
/// Benchmarks.
#[derive(clap::Subcommand)]
pub enum Command {}
pub fn run(command: Command) -> Result<()> {
    match command {}
}
