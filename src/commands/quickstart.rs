//! `quickstart`.

use super::{data, print_json, show};
use crate::{
    Result,
    quickstart::{self, Audience, Options, recipe::Recipe},
    report::human,
};
use std::path::PathBuf;

/// Arguments of `quickstart`.
#[derive(clap::Args)]
pub struct Args {
    /// How much to do
    #[arg(long, default_value = "small")]
    size: Size,
    /// Your own text, a file or folder, instead of the generated corpus (there is no entropy floor then)
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
    /// The folder for everything
    #[arg(long, value_name = "DIR", default_value = "quickstart")]
    out: PathBuf,
    /// Replace what an earlier quickstart left in that folder
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    place: super::PlaceArgs,
    /// Seed of the corpus, the models and the order of the data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the summary as JSON, and nothing else
    #[arg(long)]
    json: bool,
}

/// Sizes.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Size {
    /// Some seconds: every step, little learning.
    Tiny,
    /// About two minutes on two cores.
    Small,
}

pub fn run(args: Args) -> Result<()> {
    let (size, recipe) = match args.size {
        Size::Tiny => ("tiny", Recipe::TINY),
        Size::Small => ("small", Recipe::SMALL),
    };
    let options = Options {
        size,
        recipe,
        text: args.text,
        out: args.out,
        force: args.force,
        place: args.place.place(),
        seed: args.seed,
        program: std::env::args().next().unwrap_or_else(|| "mupscale".into()),
    };
    let show = show(args.json);
    let mut tell = |text: &str| {
        if !args.json {
            // A picture of progress, like the bars: it may be lost, the results may not.
            let _ = say!("{text}");
        }
    };
    let summary = quickstart::run(&options, &mut Audience { show, say: &mut tell, progress: &mut data::shown(show) })?;
    if args.json {
        return print_json(&summary);
    }
    say!("\ndone in {}", human::seconds(summary.seconds))
}
