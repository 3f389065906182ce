//! The `mupscale` command.

fn main() -> std::process::ExitCode {
    mupscale::commands::main()
}
