//! A run's ranks before the first step: they meet, and make sure that they are about to do the same.

use super::{Place, Prepared};
use crate::{
    Error, Result,
    backend::Backend,
    comm::{
        Comm, Exchange, Solo,
        environment::{Master, World},
        settle,
        tcp::Tree,
    },
    config::{CommConfig, Config, Device},
    trace,
    trainer::enough_micro_batches,
};
use std::time::Duration;

/// This process among the ranks of its run.
pub struct Ranks {
    /// How it was started.
    pub world: World,
    tree: Option<Tree>,
}

impl Ranks {
    /// Lets this process, with what it has prepared, meet the others. If one of them could not prepare its part, or
    /// prepared another, all get an error, and one of them its words.
    pub fn meet(prepare: impl FnOnce() -> Result<Prepared>) -> Result<(Self, Prepared)> {
        let world = World::detect()?;
        if world.world == 1 {
            return Ok((Self { world, tree: None }, prepare()?));
        }
        let mut prepared = prepare().and_then(|prepared| {
            enough_micro_batches(&prepared.config, world.world)?;
            let place = Place::of_rank(&prepared.config, &world)?;
            Ok((prepared, place))
        });
        let comm =
            prepared.as_ref().map_or_else(|_| CommConfig::default(), |(prepared, _)| prepared.config.comm.clone());
        let timeout = Duration::from_secs(comm.timeout);
        let tree = Tree::connect(&world, &world.meet(timeout)?, timeout)?;
        let mut exchange = |mine: &[u8]| tree.exchange(mine);
        prepared = settle(world.rank, prepared, &mut exchange);
        let (prepared, place) = prepared?;
        same(world.rank, &facts(&prepared, place), &mut exchange)?;
        Ok((Self { world, tree: Some(tree) }, prepared))
    }

    /// Lets this process meet the others, whatever they are about to do. One that no launcher started is alone.
    pub fn join(timeout: Duration) -> Result<Self> {
        let world = World::detect()?;
        let tree = match world.master {
            Master::Alone => None,
            _ => Some(Tree::connect(&world, &world.meet(timeout)?, timeout)?),
        };
        Ok(Self { world, tree })
    }

    /// The way to the other ranks, once all of them have a backend.
    pub fn comm<B: Backend>(self, backend: &B) -> Result<Box<dyn Comm<B>>> {
        let Some(tree) = self.tree else { return Ok(Box::new(Solo)) };
        settle(self.world.rank, Ok(()), &mut |mine| tree.exchange(mine))?;
        backend.connect(tree)
    }

    /// Tells the others that this rank has no backend, so that they end with it. Gives the error to end with.
    pub fn refuse(self, error: Error) -> Error {
        let Some(tree) = self.tree else { return error };
        let code = error.exit_code();
        let settled = settle::<()>(self.world.rank, Err(error), &mut |mine| tree.exchange(mine));
        settled.err().unwrap_or(Error::Elsewhere { code })
    }
}

/// See [`settle`].
pub fn agree<T, B: Backend>(comm: &dyn Comm<B>, result: Result<T>) -> Result<T> {
    settle(comm.rank(), result, &mut |mine| comm.exchange(mine))
}

/// What ranks must have in common, by the words for it.
fn facts(prepared: &Prepared, place: Place) -> Vec<(&'static str, String)> {
    let Prepared { config, meaning, samples, origin, .. } = prepared;
    // How a rank computes is its own affair.
    let config = Config { threads: 0, ..config.clone() };
    let start = origin.as_ref().map_or("new weights".into(), |start| {
        format!("step {} of {}", start.position.step, start.origin.reader.dir().display())
    });
    vec![
        ("version", env!("MUPSCALE_VERSION").into()),
        ("configuration", config.to_toml()),
        ("model", format!("{:?} {:?}", meaning.spec, meaning.scaling)),
        ("fingerprint of the data", format!("{:016x}", samples.fingerprint())),
        ("start", start),
        // It ends with words between ranks.
        ("--trace-steps", trace::requested().map_or("none".into(), |request| request.steps.to_string())),
        ("device", if place.device == Device::Cuda { "GPU" } else { "CPU" }.into()),
    ]
}

/// Makes sure that all ranks have the same facts; rank 0 says what differs, if anything does.
fn same(rank: usize, facts: &[(&'static str, String)], exchange: Exchange) -> Result<()> {
    let mine = facts.iter().flat_map(|(_, value)| value.bytes().chain([0])).collect::<Vec<u8>>();
    let all = exchange(&mine)?;
    let Some((other, theirs)) = all.iter().enumerate().find(|(_, theirs)| **theirs != all[0]) else { return Ok(()) };
    if rank != 0 {
        return Err(Error::Elsewhere { code: 2 });
    }
    let theirs = String::from_utf8_lossy(theirs);
    let differs = facts.iter().zip(theirs.split('\0')).find(|((_, ours), theirs)| ours != theirs);
    let Some(((name, ours), theirs)) = differs else {
        return Err(Error::Usage(format!("rank {other} tells other things than rank 0: do all run one version?")));
    };
    let (ours, theirs) = first_difference(ours, theirs);
    Err(Error::Usage(format!(
        "rank {other} has another {name} than rank 0: `{theirs}`, not `{ours}`; start all ranks with the same program, \
         configuration and data"
    )))
}

/// The first lines that differ.
fn first_difference<'a>(ours: &'a str, theirs: &'a str) -> (&'a str, &'a str) {
    let (mut left, mut right) = (ours.lines(), theirs.lines());
    loop {
        match (left.next(), right.next()) {
            (Some(l), Some(r)) if l == r => {}
            (l, r) => return (l.unwrap_or_default(), r.unwrap_or_default()),
        }
    }
}
