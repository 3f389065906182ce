//! How this process was started, read from the environment: by our launcher, torchrun, srun, mpirun, or alone.
//!
//! | launcher | rank, world | within the host | where ranks meet |
//! |---|---|---|---|
//! | mupscale-launch | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | [`STORE`], which it runs itself |
//! | torchrun, others | the same | the same | `MASTER_ADDR`, `MASTER_PORT` |
//! | srun | `SLURM_PROCID`, `SLURM_NTASKS` | `SLURM_LOCALID`, `SLURM_TASKS_PER_NODE` | first host of the node list |
//! | mpirun (Open MPI) | `OMPI_COMM_WORLD_*` | the same | this host, or `MASTER_ADDR` |
//! | mpirun (MPICH, Intel) | `PMI_RANK`, `PMI_SIZE` | `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` | this host, or `MASTER_ADDR` |

use crate::{Error, Result};
use std::fmt;

/// Set by a launcher that runs a store for its processes: `HOST:PORT`.
pub const STORE: &str = "MUPSCALE_STORE";
/// The token of that store; without it `TORCHELASTIC_RUN_ID` serves.
pub const STORE_TOKEN: &str = "MUPSCALE_STORE_TOKEN";

/// First of the ports that are derived from a job's name, and how many there are: below those that systems give out.
const PORTS: (u16, u16) = (12_000, 18_000);
/// The port where nothing else is known, as torchrun's.
const DEFAULT_PORT: u16 = 29_500;

/// This process among the others of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// This rank on its host, from 0: its GPU.
    pub local_rank: usize,
    /// Number of ranks on this host.
    pub local_world: usize,
    /// Where ranks meet.
    pub master: Master,
    /// What tells this run from others.
    pub token: String,
    /// Which start of the run's processes this is, in words that serve as part of a key.
    pub round: String,
    /// What started it.
    pub launcher: &'static str,
}

/// Where ranks meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Master {
    /// Nowhere: there is one rank.
    Alone,
    /// At a store that the launcher runs, `HOST:PORT`.
    Launcher(String),
    /// On rank 0's host; it runs a store at this port, or at one of the next ones if it is taken.
    Rank0 {
        /// The host, by name or address.
        host: String,
        /// The first port to try.
        port: u16,
    },
}

impl World {
    /// One process.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            world: 1,
            local_rank: 0,
            local_world: 1,
            master: Master::Alone,
            token: String::new(),
            round: "0".into(),
            launcher: "no launcher",
        }
    }

    /// Reads this process's environment.
    ///
    /// # Errors
    /// A variable is missing that others ask for, is no number, or contradicts another; the error names it.
    pub fn detect() -> Result<Self> {
        Self::from_variables(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// Reads variables.
    pub fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let variables = Variables(get);
        let world = if variables.has("RANK") || (variables.has("WORLD_SIZE") && variables.has("LOCAL_RANK")) {
            torchrun(&variables)?
        } else if variables.has("SLURM_PROCID") && ["SLURM_STEP_ID", "SLURM_STEPID"].iter().any(|v| variables.has(v)) {
            // A batch script has a SLURM_PROCID as well, but is no step: what it runs without srun is one process.
            srun(&variables)?
        } else if variables.has("OMPI_COMM_WORLD_RANK") {
            let names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"];
            mpirun(&variables, names, ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"])?
        } else if variables.has("PMI_RANK") {
            mpirun(&variables, ["PMI_RANK", "PMI_SIZE"], ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"])?
        } else {
            Self::alone()
        };
        Ok(world)
    }

    /// Whether ranks run on several hosts.
    pub fn spans_hosts(&self) -> bool {
        self.local_world < self.world
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.master == Master::Alone && self.launcher == Self::alone().launcher {
            return write!(f, "one rank");
        }
        let Self { rank, world, local_rank, local_world, launcher, .. } = self;
        write!(f, "rank {rank} of {world} ({launcher}), {local_rank} of {local_world} on its host")?;
        match &self.master {
            Master::Alone => Ok(()),
            Master::Launcher(endpoint) => write!(f, ", meeting at {endpoint}"),
            Master::Rank0 { host, port } => write!(f, ", meeting at {host}:{port}"),
        }
    }
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// A number, if the variable is set.
    fn number(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.trim().parse().map(Some);
        number.map_err(|_| Error::config(name, value, "must be a whole number, as launchers set it"))
    }

    fn needed(&self, name: &str, beside: &str) -> Result<usize> {
        let why = format!("is needed where {beside} is set: start through a launcher, or unset both for one process");
        self.number(name)?.ok_or_else(|| Error::config(name, "(not set)", why))
    }

    /// A rank below its world.
    fn rank_in(&self, [rank, world]: [&str; 2]) -> Result<(usize, usize)> {
        let (at, of) = (self.needed(rank, world)?, self.needed(world, rank)?);
        below(rank, at, world, of)?;
        Ok((at, of))
    }

    fn port(&self) -> Result<Option<u16>> {
        let Some(value) = self.get("MASTER_PORT") else { return Ok(None) };
        match value.trim().parse() {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => Err(Error::config("MASTER_PORT", value, "must be a port, from 1 to 65535")),
        }
    }
}

fn below(rank: &str, at: usize, world: &str, of: usize) -> Result<()> {
    if at < of {
        return Ok(());
    }
    Err(Error::config(rank, at, format!("must be below {world} = {of}: ranks count from 0")))
}

/// Local ranks are part of all.
fn checked(world: World, local_names: [&str; 2]) -> Result<World> {
    let [local_rank, local_world] = local_names;
    below(local_rank, world.local_rank, local_world, world.local_world)?;
    if world.local_world > world.world {
        let why = format!("is more than all {} ranks", world.world);
        return Err(Error::config(local_world, world.local_world, why));
    }
    Ok(world)
}

fn torchrun(variables: &Variables) -> Result<World> {
    let (rank, world) = variables.rank_in(["RANK", "WORLD_SIZE"])?;
    let local = variables.number("LOCAL_RANK")?;
    if local.is_none() && world > 1 {
        let why = "RANK is set but LOCAL_RANK is not, as in a PyTorchJob of v1, whose RANK counts pods, not processes: \
                   start `mupscale-launch` (or torchrun) in each pod; or, with one process a pod, set LOCAL_RANK=0";
        return Err(Error::config("LOCAL_RANK", "(not set)", why));
    }
    let local_rank = local.unwrap_or(0);
    let local_world = variables.number("LOCAL_WORLD_SIZE")?.unwrap_or(world);
    let run = variables.get("TORCHELASTIC_RUN_ID");
    let store = variables.get(STORE);
    let master = match (&store, variables.get("MASTER_ADDR")) {
        (Some(endpoint), _) => Master::Launcher(endpoint.clone()),
        _ if world == 1 => Master::Alone,
        (None, Some(host)) => {
            // torchrun's agent may serve its own store at that port.
            let taken = variables.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
            let port = variables.port()?.unwrap_or(DEFAULT_PORT);
            Master::Rank0 { host, port: if taken { port.checked_add(1).unwrap_or(port - 1) } else { port } }
        }
        (None, None) => {
            let why = "is needed where WORLD_SIZE is more than 1: the host of rank 0";
            return Err(Error::config("MASTER_ADDR", "(not set)", why));
        }
    };
    let round = variables.number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0);
    let launcher = match (&store, &run) {
        (Some(_), _) => "mupscale-launch",
        (None, Some(_)) => "torchrun",
        (None, None) => "RANK and WORLD_SIZE",
    };
    let token = variables.get(STORE_TOKEN).filter(|_| store.is_some()).or(run).unwrap_or_else(|| "run".into());
    let world = World { rank, world, local_rank, local_world, master, token, round: round.to_string(), launcher };
    checked(world, ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
}

fn srun(variables: &Variables) -> Result<World> {
    // A step may have fewer tasks than the job.
    let tasks = if variables.has("SLURM_STEP_NUM_TASKS") { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let (rank, world) = variables.rank_in(["SLURM_PROCID", tasks])?;
    let local_rank = variables.needed("SLURM_LOCALID", "SLURM_PROCID")?;
    let node = variables.number("SLURM_NODEID")?.unwrap_or(0);
    let counts = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"].into_iter().find(|name| variables.has(name));
    let local_world = match counts {
        Some(name) => {
            let list = variables.get(name).unwrap_or_default();
            let why = "must list tasks for each node, as 4(x2),3";
            tasks_on(&list, node).ok_or_else(|| Error::config(name, list, why))?
        }
        None => world,
    };
    let word = |names: [&str; 2]| names.iter().find_map(|name| variables.get(name)).unwrap_or_else(|| "0".into());
    let job = word(["SLURM_JOB_ID", "SLURM_JOBID"]);
    let token = format!("slurm-{job}.{}", word(["SLURM_STEP_ID", "SLURM_STEPID"]));
    let master = if world == 1 {
        Master::Alone
    } else {
        let host = match variables.get("MASTER_ADDR") {
            Some(host) => host,
            None => first_node(variables)?,
        };
        Master::Rank0 { host, port: variables.port()?.unwrap_or_else(|| port_of(&token)) }
    };
    let round = word(["SLURM_RESTART_COUNT", "SLURM_RESTART_COUNT"]);
    let world = World { rank, world, local_rank, local_world, master, token, round, launcher: "srun" };
    checked(world, ["SLURM_LOCALID", counts.unwrap_or(tasks)])
}

fn first_node(variables: &Variables) -> Result<String> {
    const LISTS: [&str; 3] = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    let Some(name) = LISTS.into_iter().find(|name| variables.has(name)) else {
        let why = "is needed beside SLURM_PROCID, to find rank 0's host; or set MASTER_ADDR";
        return Err(Error::config("SLURM_JOB_NODELIST", "(not set)", why));
    };
    let list = variables.get(name).unwrap_or_default();
    let why = "must be a list of hosts, as node[01-04,07],other; or set MASTER_ADDR";
    first_host(&list).ok_or_else(|| Error::config(name, list, why))
}

/// The first host of a list in SLURM's bracket form: of `rack[2-3]n[01-04],other` it is `rack2n01`.
fn first_host(list: &str) -> Option<String> {
    let (mut host, mut rest) = (String::new(), list.trim());
    while let Some(at) = rest.find(['[', ',']) {
        host += &rest[..at];
        if rest[at..].starts_with(',') {
            rest = "";
            break;
        }
        let (range, after) = rest[at + 1..].split_once(']')?;
        let first = range.split(['-', ',']).next().filter(|number| !number.is_empty())?;
        host += first.bytes().all(|c| c.is_ascii_digit()).then_some(first)?;
        rest = after;
    }
    host += rest;
    let good = |c: char| c.is_ascii_alphanumeric() || ['-', '.', '_', ':'].contains(&c);
    (!host.is_empty() && host.chars().all(good)).then_some(host)
}

/// Tasks of a node, of a list as `4(x2),3`.
fn tasks_on(list: &str, node: usize) -> Option<usize> {
    let mut left = node;
    for part in list.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1usize),
        };
        let count = count.trim().parse().ok()?;
        match left.checked_sub(times) {
            None => return Some(count),
            Some(further) => left = further,
        }
    }
    None
}

fn mpirun(variables: &Variables, names: [&str; 2], local_names: [&str; 2]) -> Result<World> {
    let (rank, world) = variables.rank_in(names)?;
    let local_rank = variables.number(local_names[0])?.unwrap_or(rank);
    let local_world = variables.number(local_names[1])?.unwrap_or(world);
    let job = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"].into_iter().find_map(|name| variables.get(name));
    let port = variables.port()?;
    let (token, port) = match job {
        Some(job) => (format!("mpirun-{job}"), port.unwrap_or_else(|| port_of(&job))),
        None => ("mpirun".into(), port.unwrap_or(DEFAULT_PORT)),
    };
    let master = match variables.get("MASTER_ADDR") {
        _ if world == 1 => Master::Alone,
        Some(host) => Master::Rank0 { host, port },
        None if local_world == world => Master::Rank0 { host: "127.0.0.1".into(), port },
        None => {
            let why = "is needed with several hosts: give rank 0's address, with Open MPI by -x MASTER_ADDR=…";
            return Err(Error::config("MASTER_ADDR", "(not set)", why));
        }
    };
    let world = World { rank, world, local_rank, local_world, master, token, round: "0".into(), launcher: "mpirun" };
    checked(world, local_names)
}

/// A port that all processes of a job find, and another job hardly: FNV-1a of its name.
fn port_of(job: &str) -> u16 {
    let mix = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    PORTS.0 + (job.bytes().fold(0x811c_9dc5, mix) % u32::from(PORTS.1)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &str) -> Result<World> {
        let pairs: Vec<_> = variables.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
        let get = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        World::from_variables(&get)
    }

    fn at(host: &str, port: u16) -> Master {
        Master::Rank0 { host: host.into(), port }
    }

    #[test]
    fn launchers_are_recognised() {
        assert_eq!(world("HOME=/ SLURM_PROCID=0 SLURM_NTASKS=8").unwrap(), World::alone(), "a batch script");
        let common = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=99";
        let bare = world(common).unwrap();
        assert_eq!((bare.rank, bare.world, bare.local_rank, bare.local_world), (3, 4, 1, 2));
        assert_eq!((bare.master, bare.launcher), (at("h", 99), "RANK and WORLD_SIZE"));
        let torch = world(&format!("{common} TORCHELASTIC_RUN_ID=x TORCHELASTIC_RESTART_COUNT=2")).unwrap();
        assert_eq!((torch.launcher, &*torch.token, &*torch.round), ("torchrun", "x", "2"));
        let ours = world(&format!("{common} TORCHELASTIC_RUN_ID=x {STORE}=s:1 {STORE_TOKEN}=x/5")).unwrap();
        assert_eq!((ours.launcher, &*ours.token, &*ours.round), ("mupscale-launch", "x/5", "0"));
        assert_eq!(ours.master, Master::Launcher("s:1".into()));
        // A launcher that runs inside a step of srun is the nearer one.
        assert_eq!(world(&format!("{common} SLURM_PROCID=0 SLURM_STEP_ID=0")).unwrap().rank, 3);
    }

    #[test]
    fn srun_is_recognised() {
        let step = "SLURM_PROCID=5 SLURM_NTASKS=7 SLURM_LOCALID=1 SLURM_STEP_ID=2 SLURM_JOB_ID=4711 SLURM_NODEID=1 \
                    SLURM_TASKS_PER_NODE=4,3 SLURM_JOB_NODELIST=node[007-009,12],x";
        let found = world(step).unwrap();
        assert_eq!((found.rank, found.world, found.local_rank, found.local_world), (5, 7, 1, 3));
        assert_eq!((&found.master, &*found.token), (&at("node007", port_of("slurm-4711.2")), "slurm-4711.2"));
        assert!(found.spans_hosts() && found.to_string().contains("srun"));
        for (list, host) in [
            ("a", "a"),
            ("a,b", "a"),
            ("n[3,5]", "n3"),
            ("n[1-2]-x.y,z", "n1-x.y"),
            ("rack[2-3]n[01-04],o", "rack2n01"),
            ("10.0.0.1", "10.0.0.1"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for list in ["", "n[", "n[]", "n[-3]", "n]", "n[a]", "a b", ",", "[1"] {
            assert_eq!(first_host(list), None, "{list}");
        }
        assert_eq!([0, 1, 2, 3].map(|node| tasks_on("4(x2),3", node)), [Some(4), Some(4), Some(3), None]);
    }

    #[test]
    fn mpirun_is_recognised() {
        let names = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1";
        let here = world(&format!("{names} OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=j")).unwrap();
        assert_eq!((here.master, here.rank, here.launcher), (at("127.0.0.1", port_of("j")), 1, "mpirun"));
        let message = world(&format!("{names} OMPI_COMM_WORLD_LOCAL_SIZE=2")).unwrap_err().to_string();
        assert!(message.starts_with("MASTER_ADDR = (not set): is needed with several hosts"), "{message}");
        let intel = world("PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=3 MASTER_PORT=7").unwrap();
        assert_eq!((intel.rank, intel.local_world, intel.master), (2, 3, at("127.0.0.1", 7)));
    }

    #[test]
    fn nonsense_is_an_error_that_names_the_variable() {
        for (variables, parts) in [
            ("RANK=0", "WORLD_SIZE = (not set)"),
            ("RANK=x WORLD_SIZE=2", "RANK = x: must be a whole number"),
            ("RANK=-1 WORLD_SIZE=2", "RANK = -1"),
            ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0", "RANK = 2: must be below WORLD_SIZE = 2"),
            ("RANK=0 WORLD_SIZE=0 LOCAL_RANK=0", "RANK = 0: must be below WORLD_SIZE = 0"),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=h",
                "LOCAL_RANK = (not set): RANK is set but LOCAL_RANK is not, as in a PyTorchJob",
            ),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0", "MASTER_ADDR = (not set)"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=h", "LOCAL_RANK = 2: must be below"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3 MASTER_ADDR=h", "LOCAL_WORLD_SIZE = 3: is more than"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=h MASTER_PORT=70000", "MASTER_PORT = 70000"),
            ("SLURM_STEP_ID=0 SLURM_PROCID=0", "SLURM_NTASKS = (not set)"),
            ("SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0", "SLURM_JOB_NODELIST = (not set)"),
            ("SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODELIST=a[", "SLURM_NODELIST = a["),
            (
                "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_TASKS_PER_NODE=2(3",
                "SLURM_TASKS_PER_NODE",
            ),
            ("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE = (not set)"),
        ] {
            let message = world(variables).expect_err(variables).to_string();
            assert!(message.contains(parts), "{variables}: {message}");
        }
    }
}
