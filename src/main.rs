//! The `mupscale` command.
fn main() {}
