//! How the agents of a run find each other: who serves the store, and where.

use crate::{
    leader::{Leader, Rules},
    messages::{Node, node_key},
    options::{Endpoint, Meeting, Options},
    output::say,
};
use mupscale::{
    Error, Result,
    comm::store::{Client, Lease, Server},
};
use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs},
    process,
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// This node among the others.
pub struct Member {
    /// The agent's number.
    pub agent: usize,
    /// What the others know of it.
    pub node: Node,
    /// The run's name.
    pub run: String,
    /// The store of the agents.
    pub store: Client,
    lease: Lease,
    served: Option<(Server, Receiver<Result<()>>)>,
}

impl Member {
    /// Joins the run, and serves its store if that is this node's part.
    pub fn join(options: &Options, meeting: &Meeting, processes: usize) -> Result<Self> {
        let run = match meeting {
            Meeting::Alone if options.rdzv_id == "none" => unique(),
            _ => options.rdzv_id.clone(),
        };
        let number = match meeting {
            Meeting::Numbered(_, rank) => Some(*rank),
            _ => None,
        };
        let server = serve(options, meeting, &run)?;
        let endpoint = match (&server, meeting) {
            (None, Meeting::Numbered(endpoint, _) | Meeting::Anonymous(endpoint)) => {
                say(&format!("meeting the other nodes at {endpoint}"));
                written(endpoint)
            }
            (Some(server), _) => server.address().to_string(),
            (None, Meeting::Alone) => return Err(Error::Usage("a node alone serves its own store".into())),
        };
        let store = Client::connect(&endpoint, &run, options.rdzv_conf.join).map_err(|error| match error {
            // Nothing that another command line would mend: the other node is not there.
            Error::Config { ref field, .. } if field.ends_with("endpoint") => Error::Fault(error.to_string()),
            error => error,
        })?;
        let agent = store.add("nodes", 1)? as usize;
        let address = match (&options.local_addr, &server) {
            (Some(host), _) => resolve(&Endpoint { host: host.clone(), port: 0 })?[0].ip(),
            (None, Some(server)) => server.address().ip(),
            (None, None) => store.local_address()?,
        };
        let node = Node { name: host_name(), address, number, processes, host: server.is_some() };
        let value = crate::messages::write(&node);
        let lease = store.lease(&node_key(agent), &value, options.rdzv_conf.lease)?;
        let served = server.map(|server| lead(options, &run, &server, &store).map(|leads| (server, leads)));
        let served = served.transpose()?;
        Ok(Self { agent, node, run, store, lease, served })
    }

    /// A port of this node that nobody listens on: the one asked for, if it can be had.
    pub fn free_port(&self, wanted: Option<u16>) -> Result<u16> {
        let probe = |port| TcpListener::bind((self.node.address, port)).and_then(|listener| listener.local_addr());
        let found = probe(wanted.unwrap_or(0)).or_else(|error| match wanted {
            Some(port) if error.kind() == io::ErrorKind::AddrInUse => {
                let free = probe(0)?;
                say(&format!("port {port} is in use; MASTER_PORT is {} instead", free.port()));
                Ok(free)
            }
            _ => Err(error),
        });
        let why = |e| Error::Device(format!("{} has no free port ({e}): see --local-addr", self.node.address));
        found.map(|address| address.port()).map_err(why)
    }

    /// Leaves. If the run's end was `decided`, the host of the store waits until the others know of it.
    pub fn leave(self, decided: bool) {
        drop(self.lease);
        if let Some((server, leads)) = self.served.filter(|_| decided) {
            let _ = leads.recv_timeout(Duration::from_secs(10));
            drop(server);
        }
    }
}

/// Starts the leader beside the store.
fn lead(options: &Options, run: &str, server: &Server, store: &Client) -> Result<Receiver<Result<()>>> {
    let rules = Rules {
        nodes: options.nnodes,
        conf: options.rdzv_conf.clone(),
        max_restarts: options.max_restarts,
        interval: options.monitor_interval.clamp(Duration::from_millis(10), Duration::from_secs(10)),
        run: run.into(),
        address: server.address().ip(),
    };
    let leader = Leader::new(rules, store.another()?);
    let (done, waits) = mpsc::channel();
    let lead = move || {
        let result = leader.lead();
        if let Err(error) = &result {
            say(&format!("the rendezvous fails: {error}"));
        }
        let _ = done.send(result);
    };
    let refused = |e| Error::Device(format!("a thread was refused ({e})"));
    thread::Builder::new().name("leader".into()).spawn(lead).map_err(refused)?;
    Ok(waits)
}

/// The store, if this node serves it.
fn serve(options: &Options, meeting: &Meeting, run: &str) -> Result<Option<Server>> {
    let (endpoint, host) = match meeting {
        Meeting::Alone => return Server::start(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).to_string(), run).map(Some),
        Meeting::Numbered(_, rank) if *rank > 0 => return Ok(None),
        Meeting::Numbered(endpoint, _) => (endpoint, Some(true)),
        Meeting::Anonymous(endpoint) => (endpoint, options.rdzv_conf.is_host),
    };
    if host == Some(false) {
        return Ok(None);
    }
    // The node that can listen at the address owns it. Where another launcher of this machine does so already, the port
    // is taken, and this one joins it.
    let addresses = match &options.local_addr {
        Some(local) if host == Some(true) => resolve(&Endpoint { host: local.clone(), port: endpoint.port })?,
        _ => resolve_in_time(endpoint, options.rdzv_conf.join)?,
    };
    let mut refusal = None;
    for address in addresses {
        match TcpListener::bind(address) {
            Ok(probe) => {
                drop(probe);
                if options.nnodes.max > 1 && address.ip().is_loopback() && !is_loopback_by_name(&endpoint.host) {
                    let why = "which no other node can reach: give an address instead of the name";
                    say(&format!("{} is {} on this machine, {why}", endpoint.host, address.ip()));
                }
                return Server::start(&address.to_string(), run).map(Some);
            }
            Err(error) => refusal = Some((address, error)),
        }
    }
    match refusal {
        Some((address, error)) if host == Some(true) => {
            let why = match error.kind() {
                io::ErrorKind::AddrInUse => "the port is in use on this node: choose another one for all nodes".into(),
                io::ErrorKind::AddrNotAvailable => {
                    format!("{} is no address of this node, which has to serve it: see --local-addr", address.ip())
                }
                _ => format!("this node cannot listen there ({error})"),
            };
            Err(Error::config("rendezvous endpoint", endpoint, why))
        }
        _ => Ok(None),
    }
}

fn is_loopback_by_name(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A cluster may give a node its name later than the node starts.
fn resolve_in_time(endpoint: &Endpoint, time: Duration) -> Result<Vec<SocketAddr>> {
    let start = Instant::now();
    for attempt in 0.. {
        match resolve(endpoint) {
            Err(error) if start.elapsed() < time => {
                if attempt == 0 {
                    say(&format!("{error}; trying on for {:.0} s", time.as_secs_f64()));
                }
                thread::sleep(Duration::from_millis(500).min(time));
            }
            answer => return answer,
        }
    }
    resolve(endpoint)
}

fn resolve(endpoint: &Endpoint) -> Result<Vec<SocketAddr>> {
    let unknown = |why: String| {
        Error::config(
            "host name",
            &endpoint.host,
            format!("does not resolve{why}: give an address, or a name that all nodes know"),
        )
    };
    let found = (endpoint.host.as_str(), endpoint.port).to_socket_addrs().map_err(|e| unknown(format!(" ({e})")))?;
    let found: Vec<_> = found.collect();
    if found.is_empty() { Err(unknown(String::new())) } else { Ok(found) }
}

/// As the store's client wants it.
fn written(endpoint: &Endpoint) -> String {
    let Endpoint { host, port } = endpoint;
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A name that no other run has.
fn unique() -> String {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("alone-{:x}-{:x}", process::id(), time.as_micros())
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "this host".into() } else { name.trim().into() }
}
