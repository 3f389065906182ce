//! The command line: torchrun's options with its environment variables `PET_…`, and a few of our own.

use clap::{Parser, builder::FalseyValueParser};
use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, str::FromStr, time::Duration};

/// Starts a program once for every GPU of one or many machines, watches it, and starts it again when a part is lost.
///
/// Options and variables are those of torchrun; each option is also read from the environment as PET_NAME, and may be
/// written with dashes or underscores. It starts any program:
///
///   mupscale-launch --nproc-per-node gpu --max-restarts 3 mupscale train -c run.toml --resume auto
#[derive(Parser, Clone, Debug)]
#[command(name = "mupscale-launch", version = env!("MUPSCALE_VERSION"), max_term_width = 100, verbatim_doc_comment)]
pub struct Options {
    /// Number of nodes, or MIN:MAX: nodes may then join and leave while the program runs
    #[arg(long, env = "PET_NNODES", default_value = "1:1", value_name = "N|MIN:MAX")]
    pub nnodes: Nodes,
    /// Processes on this node: a number, `gpu`, `cpu` (one for each), or `auto` (GPUs, or else processors)
    #[arg(
        long,
        alias = "nproc_per_node",
        env = "PET_NPROC_PER_NODE",
        default_value = "1",
        value_name = "N|gpu|cpu|auto"
    )]
    pub nproc_per_node: Count,
    /// One node; needs no address
    #[arg(long, env = "PET_STANDALONE", value_parser = FalseyValueParser::new())]
    pub standalone: bool,
    /// This node's number, with --master-addr
    #[arg(long, alias = "node_rank", env = "PET_NODE_RANK", value_name = "N")]
    pub node_rank: Option<usize>,
    /// Address of node 0
    #[arg(long, alias = "master_addr", env = "PET_MASTER_ADDR", value_name = "HOST")]
    pub master_addr: Option<String>,
    /// Port on node 0 where nodes meet; with one node the MASTER_PORT that the program is given
    #[arg(long, alias = "master_port", env = "PET_MASTER_PORT", value_name = "PORT")]
    pub master_port: Option<u16>,
    /// Where nodes meet that have no numbers: the node that owns the address serves it
    #[arg(long, alias = "rdzv_endpoint", env = "PET_RDZV_ENDPOINT", default_value = "", value_name = "HOST[:PORT]")]
    pub rdzv_endpoint: String,
    /// Name of the run, the same on all nodes; nodes of another run are refused
    #[arg(long, alias = "rdzv_id", env = "PET_RDZV_ID", default_value = "none", value_name = "NAME")]
    pub rdzv_id: String,
    /// `static` (nodes have numbers) or `c10d` (they have not); by default what the other options imply
    #[arg(long, alias = "rdzv_backend", env = "PET_RDZV_BACKEND", value_name = "KIND")]
    pub rdzv_backend: Option<Backend>,
    /// Seconds: join_timeout=600 (for nodes to appear), last_call_timeout=30 (for more than MIN of them),
    /// keep_alive_interval=5, keep_alive_max_attempt=3 (a node silent for their product is lost); is_host=true|false
    #[arg(long, alias = "rdzv_conf", env = "PET_RDZV_CONF", default_value = "", value_name = "KEY=VALUE,…")]
    pub rdzv_conf: Conf,
    /// Address of this node that others reach it by
    #[arg(long, alias = "local_addr", env = "PET_LOCAL_ADDR", value_name = "HOST")]
    pub local_addr: Option<String>,
    /// How often all processes are started again after one has failed
    #[arg(long, alias = "max_restarts", env = "PET_MAX_RESTARTS", default_value_t = 0, value_name = "N")]
    pub max_restarts: usize,
    /// Seconds between looks at the other nodes
    #[arg(
        long,
        alias = "monitor_interval",
        env = "PET_MONITOR_INTERVAL",
        default_value = "0.1",
        value_name = "SECONDS"
    )]
    #[arg(value_parser = seconds)]
    pub monitor_interval: Duration,
    /// Seconds that processes have to end after a signal, before they are killed
    #[arg(long, env = "PET_GRACE", default_value = "60", value_name = "SECONDS", value_parser = seconds)]
    pub grace: Duration,
    /// Signals passed on to all processes; SIGUSR1 and SIGUSR2 only that, the others also end the run
    #[arg(long, alias = "signals_to_handle", env = "PET_SIGNALS_TO_HANDLE", value_name = "NAMES")]
    #[arg(default_value = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")]
    pub signals_to_handle: Signals,
    /// Folder for logs: LOG_DIR/RUN/attempt_N/RANK/stdout.log and stderr.log
    #[arg(long, alias = "log_dir", env = "PET_LOG_DIR", value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Streams that go into logs only: 0 none, 1 stdout, 2 stderr, 3 both, or for local ranks 0:3,1:2
    #[arg(short, long, env = "PET_REDIRECTS", default_value = "0", value_name = "STREAMS")]
    pub redirects: Streams,
    /// Streams that go into logs and to the console (with --log-dir alone: 3)
    #[arg(short, long, env = "PET_TEE", value_name = "STREAMS")]
    pub tee: Option<Streams>,
    /// Local ranks that are shown on the console, for example 0,1
    #[arg(
        long,
        alias = "local_ranks_filter",
        env = "PET_LOCAL_RANKS_FILTER",
        default_value = "",
        value_name = "RANKS"
    )]
    pub local_ranks_filter: Ranks,
    /// Name of the processes' role
    #[arg(long, env = "PET_ROLE", default_value = "default", value_name = "NAME")]
    pub role: String,
    /// Binds every process to its share of the cores, or to the NUMA node of its GPU
    #[arg(long, env = "PET_BIND", default_value = "none", value_name = "none|cores|numa")]
    pub bind: Bind,
    /// Allow more processes than GPUs, for programs that do not need one each
    #[arg(long)]
    pub oversubscribe: bool,
    /// Accepted: nothing is put before the program
    #[arg(long, alias = "no_python", env = "PET_NO_PYTHON", value_parser = FalseyValueParser::new())]
    pub no_python: bool,
    /// Accepted: there is one way to start a program
    #[arg(long, alias = "start_method", env = "PET_START_METHOD", hide = true)]
    pub start_method: Option<String>,
    /// Accepted: there is one way to log
    #[arg(long, alias = "event_log_handler", env = "PET_EVENT_LOG_HANDLER", hide = true)]
    pub event_log_handler: Option<String>,
    #[arg(short, long, env = "PET_MODULE", value_parser = FalseyValueParser::new(), hide = true)]
    module: bool,
    #[arg(long, alias = "run_path", env = "PET_RUN_PATH", value_parser = FalseyValueParser::new(), hide = true)]
    run_path: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

/// How nodes find each other.
#[derive(Clone, Debug, PartialEq)]
pub enum Meeting {
    /// There is one.
    Alone,
    /// They have numbers; node 0 serves the endpoint.
    Numbered(Endpoint, usize),
    /// They have none; whoever owns the endpoint serves it.
    Anonymous(Endpoint),
}

impl Options {
    /// What the options mean together, or which of them cannot be used.
    pub fn meeting(&self) -> Result<Meeting, String> {
        let wanted = |flag: &str| {
            format!("{flag} starts Python code, which this launcher leaves to Python: write `… python -u SCRIPT …`")
        };
        if self.module {
            return Err(wanted("--module").replace("SCRIPT", "-m MODULE"));
        }
        if self.run_path {
            return Err(wanted("--run-path"));
        }
        let Nodes { min, max } = self.nnodes;
        let endpoint = (!self.rdzv_endpoint.is_empty()).then_some(&self.rdzv_endpoint);
        if self.standalone {
            return match max {
                1 => Ok(Meeting::Alone),
                _ => Err(format!("--nnodes {}: --standalone means one node; leave one of them out", self.nnodes)),
            };
        }
        let numbered = match self.rdzv_backend {
            Some(backend) => backend == Backend::Static,
            None => endpoint.is_none() || self.node_rank.is_some(),
        };
        if max == 1 && (endpoint.is_none() || numbered) {
            return match self.node_rank {
                None | Some(0) => Ok(Meeting::Alone),
                Some(rank) => Err(format!("--node-rank {rank}: there is one node; give --nnodes too")),
            };
        }
        if !numbered {
            let endpoint = endpoint.ok_or("--rdzv-endpoint is missing: an address of one of the nodes")?;
            return Ok(Meeting::Anonymous(Endpoint::parse(endpoint, 29400)?));
        }
        if min != max {
            let why = "needs --rdzv-endpoint HOST:PORT: nodes that come and go have no --node-rank";
            return Err(format!("--nnodes {}: {why}", self.nnodes));
        }
        let rank = self.node_rank.ok_or("--node-rank is missing: this node's number, from 0")?;
        if rank >= max {
            return Err(format!("--node-rank {rank}: the nodes are numbered from 0 to {}", max - 1));
        }
        let port = self.master_port.unwrap_or(29500);
        let endpoint = match (&self.master_addr, endpoint) {
            (Some(host), _) => Endpoint { host: host.trim_matches(['[', ']']).into(), port },
            (None, Some(endpoint)) => Endpoint::parse(endpoint, port)?,
            (None, None) => return Err("--master-addr is missing: the address of node 0".into()),
        };
        Ok(Meeting::Numbered(endpoint, rank))
    }

    /// Which of a local rank's streams go into logs, and which to the console.
    pub fn streams(&self, local: usize) -> [Sinks; 2] {
        let default = if self.log_dir.is_some() && self.redirects.0.is_empty() { 3 } else { 0 };
        let tee = self.tee.as_ref().map_or(default, |tee| tee.of(local));
        let redirects = self.redirects.of(local);
        let shown = self.local_ranks_filter.0.is_empty() || self.local_ranks_filter.0.contains(&local);
        [1, 2].map(|bit| Sinks {
            log: (tee | redirects) & bit != 0,
            console: shown && (redirects & bit == 0 || tee & bit != 0),
        })
    }

    /// Whether any stream goes into a log.
    pub fn logs(&self) -> bool {
        self.log_dir.is_some() || !self.redirects.0.is_empty() || self.tee.as_ref().is_some_and(|t| !t.0.is_empty())
    }
}

/// Where a stream goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sinks {
    /// Into its file.
    pub log: bool,
    /// To the launcher's own stream.
    pub console: bool,
}

/// How many nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nodes {
    /// At least.
    pub min: usize,
    /// At most.
    pub max: usize,
}

impl FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        match (min.parse(), max.parse()) {
            (Ok(min), Ok(max)) if 0 < min && min <= max => Ok(Self { min, max }),
            _ => Err("a number of nodes, or MIN:MAX with 1 ≤ MIN ≤ MAX".into()),
        }
    }
}

impl std::fmt::Display for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max { write!(f, "{}", self.min) } else { write!(f, "{}:{}", self.min, self.max) }
    }
}

/// How many processes on a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Count {
    /// One for each GPU, or else for each processor.
    Auto,
    /// One for each GPU.
    Gpu,
    /// One for each processor.
    Cpu,
    /// So many.
    Exactly(usize),
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            ("gpu", _) => Ok(Self::Gpu),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Ok(count @ 1..=4096)) => Ok(Self::Exactly(count)),
            _ => Err("a number from 1 to 4096, gpu, cpu or auto".into()),
        }
    }
}

/// torchrun's kinds of rendezvous; ours serves both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Backend {
    /// Nodes have numbers.
    Static,
    /// Nodes have none.
    C10d,
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "static" => Ok(Self::Static),
            "c10d" => Ok(Self::C10d),
            _ => Err("static or c10d; there is no other store than the launcher's own".into()),
        }
    }
}

/// What processes are bound to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bind {
    /// Nothing.
    None,
    /// Their share of the cores.
    Cores,
    /// A NUMA node.
    Numa,
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "cores" => Ok(Self::Cores),
            "numa" => Ok(Self::Numa),
            _ => Err("none, cores or numa".into()),
        }
    }
}

/// An address as a user writes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Endpoint {
    fn parse(text: &str, port: u16) -> Result<Self, String> {
        let wrong = || format!("--rdzv-endpoint {text}: HOST, HOST:PORT or [IPv6]:PORT");
        let (host, rest) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
            Some((host, rest)) => (host, rest.strip_prefix(':')),
            None if text.matches(':').count() == 1 => text.split_once(':').map_or((text, None), |(h, p)| (h, Some(p))),
            None => (text, None),
        };
        let port = rest.map_or(Ok(port), |port| port.parse().map_err(|_| wrong()))?;
        if host.is_empty() { Err(wrong()) } else { Ok(Self { host: host.into(), port }) }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Streams, for all local ranks or each by itself. Empty: none.
#[derive(Clone, Debug, PartialEq)]
pub struct Streams(BTreeMap<Option<usize>, u8>);

impl Streams {
    fn of(&self, local: usize) -> u8 {
        self.0.get(&Some(local)).or(self.0.get(&None)).copied().unwrap_or(0)
    }
}

impl FromStr for Streams {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = "0, 1 (stdout), 2 (stderr) or 3 (both), or for local ranks: 0:3,1:2";
        let mut found = BTreeMap::new();
        for part in text.split(',').filter(|part| !part.is_empty() && *part != "0") {
            let (rank, streams) = match part.split_once(':') {
                Some((rank, streams)) => (Some(rank.parse().map_err(|_| wrong)?), streams),
                None => (None, part),
            };
            found.insert(rank, streams.parse().ok().filter(|streams| *streams <= 3).ok_or(wrong)?);
        }
        Ok(Self(found))
    }
}

/// A list of ranks. Empty: all.
#[derive(Clone, Debug, PartialEq)]
pub struct Ranks(Vec<usize>);

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ranks = text.split(',').map(str::trim).filter(|rank| !rank.is_empty()).map(str::parse);
        ranks.collect::<Result<_, _>>().map(Self).map_err(|_| "local ranks, divided by commas".into())
    }
}

/// Signals by number.
#[derive(Clone, Debug, PartialEq)]
pub struct Signals(pub Vec<i32>);

/// The signals that can be passed on, with their names.
const SIGNALS: [(&str, i32); 6] = [
    ("SIGTERM", libc::SIGTERM),
    ("SIGINT", libc::SIGINT),
    ("SIGHUP", libc::SIGHUP),
    ("SIGQUIT", libc::SIGQUIT),
    ("SIGUSR1", libc::SIGUSR1),
    ("SIGUSR2", libc::SIGUSR2),
];

impl FromStr for Signals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let find = |name: &str| {
            let known = SIGNALS.iter().find(|(known, _)| *known == name.trim() || &known[3..] == name.trim());
            known.map(|(_, number)| *number).ok_or_else(|| format!("no {name}: one can pass on {}", names().join(", ")))
        };
        text.split(',').filter(|name| !name.trim().is_empty()).map(find).collect::<Result<_, _>>().map(Self)
    }
}

fn names() -> Vec<&'static str> {
    SIGNALS.iter().map(|(name, _)| *name).collect()
}

/// What a rendezvous waits for.
#[derive(Clone, Debug, PartialEq)]
pub struct Conf {
    /// For the first MIN nodes.
    pub join: Duration,
    /// For more than MIN.
    pub last_call: Duration,
    /// A node that is silent for so long is lost.
    pub lease: Duration,
    /// Whether this node serves the endpoint; none: as its address says.
    pub is_host: Option<bool>,
}

impl FromStr for Conf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut conf = Self {
            join: Duration::from_secs(600),
            last_call: Duration::from_secs(30),
            lease: Duration::ZERO,
            is_host: None,
        };
        let (mut interval, mut attempts) = (Duration::from_secs(5), 3.0);
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("{part}: write KEY=VALUE"))?;
            let (key, value) = (key.trim(), value.trim());
            match key {
                "join_timeout" => conf.join = seconds(value)?,
                "last_call_timeout" => conf.last_call = seconds(value)?,
                "keep_alive_interval" => interval = seconds(value)?,
                "keep_alive_max_attempt" => attempts = value.parse::<u16>().map_err(|e| format!("{part}: {e}"))?.into(),
                "is_host" => {
                    conf.is_host = Some(matches!(value.to_lowercase().as_str(), "1" | "true" | "t" | "yes" | "y"))
                }
                // Of torchrun's own store.
                "timeout" | "read_timeout" | "close_timeout" | "heartbeat_timeout" | "store_type" => {}
                _ => return Err(format!("{key} is unknown: see --help")),
            }
        }
        conf.lease = interval.mul_f64(attempts).max(Duration::from_millis(100));
        Ok(conf)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text}: a number of seconds");
    let number: f64 = text.parse().map_err(|_| wrong())?;
    // Longer than anything runs, and yet an instant that can be computed with.
    Duration::try_from_secs_f64(number.min(1e9)).map_err(|_| wrong())
}
