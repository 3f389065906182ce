//! `quickstart`.
use crate::{Error, Result};
/// Arguments of `quickstart`.
#[derive(clap::Args)]
pub struct Args {}
pub fn run(_: Args) -> Result<()> {
    Err(Error::Usage("not in this build".into()))
}
