//! Where the ranks of a run meet: the launcher's store, or one that rank 0 runs.

use super::{
    environment::{Master, World},
    store::{Client, Refusal, Server},
};
use crate::{Error, Result};
use std::{
    net::ToSocketAddrs,
    thread,
    time::{Duration, Instant},
};

/// Ports that are tried one after the other: under torchrun, for one, `MASTER_PORT` is its own store's.
const TRIES: u16 = 16;
/// Whoever listens there answers within this time, or is no store.
const ATTEMPT: Duration = Duration::from_secs(2);

/// A rank's way to the store, and the store itself on the rank that runs it.
pub struct Meeting {
    /// The store.
    pub client: Client,
    /// What the keys of this start of the run begin with, so that nothing of an earlier one is taken for its own.
    pub prefix: String,
    _server: Option<Server>,
}

impl World {
    /// Goes to the store; rank 0 opens one if no launcher does.
    ///
    /// # Errors
    /// There is none in time, or it is another run's.
    pub fn meet(&self, timeout: Duration) -> Result<Meeting> {
        let (server, client) = match &self.master {
            Master::Alone => return Err(Error::Usage("one rank has nobody to meet".into())),
            Master::Launcher(endpoint) => (None, Client::connect(endpoint, &self.token, timeout)?),
            Master::Rank0 { host, port } if self.rank == 0 => self.open(host, *port)?,
            Master::Rank0 { host, port } => (None, self.find(host, *port, timeout)?),
        };
        Ok(Meeting { client, prefix: format!("round/{}", self.round), _server: server })
    }

    /// Opens a store at the first port that is free.
    fn open(&self, host: &str, port: u16) -> Result<(Option<Server>, Client)> {
        self.refuse_loopback(host, port)?;
        let mut refused = Error::config("MASTER_PORT", port, "is no port");
        let token = self.token_at(port);
        for endpoint in endpoints(host, port) {
            match Server::start(&endpoint, &token) {
                Ok(server) => return Ok((Some(server), Client::connect(&endpoint, &token, ATTEMPT)?)),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    /// Looks for the run's store at all ports where rank 0 may have opened it.
    fn find(&self, host: &str, port: u16, timeout: Duration) -> Result<Client> {
        let end = Instant::now() + timeout;
        let mut pause = Duration::from_millis(20);
        let token = self.token_at(port);
        loop {
            let mut found = String::new();
            for endpoint in endpoints(host, port) {
                found = match Client::attempt(&endpoint, &token, ATTEMPT) {
                    Ok(client) => return Ok(client),
                    Err(Refusal::Stranger(error)) => error.to_string(),
                    Err(Refusal::Nobody(why)) if found.is_empty() => format!("{endpoint} {why}"),
                    Err(_) => found,
                };
            }
            if Instant::now() + pause >= end {
                let why = format!("rank 0 was not found there within {:.0} s ({found})", timeout.as_secs_f64());
                return Err(Error::config("MASTER_ADDR", host, why));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// The port is part of it: launchers call many a run the same, and the ports that are tried overlap.
    fn token_at(&self, port: u16) -> String {
        format!("{}@{port}", self.token)
    }

    /// Many a system resolves its own name to 127.0.1.1, where no other host finds it.
    fn refuse_loopback(&self, host: &str, port: u16) -> Result<()> {
        let mut addresses = (host, port).to_socket_addrs().into_iter().flatten().peekable();
        if self.spans_hosts() && addresses.peek().is_some() && addresses.all(|address| address.ip().is_loopback()) {
            let why = "is this host only, as this host sees it, and ranks run on others too: set MASTER_ADDR to the \
                       address under which they reach it";
            return Err(Error::config("MASTER_ADDR", host, why));
        }
        Ok(())
    }
}

/// The places of a store, in the order in which they are tried.
fn endpoints(host: &str, port: u16) -> impl Iterator<Item = String> {
    let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_string() };
    (0..TRIES).filter_map(move |i| port.checked_add(i)).map(move |port| format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::environment::World;
    use std::net::TcpListener;

    fn world(rank: usize, port: u16, token: &str) -> World {
        let master = Master::Rank0 { host: "127.0.0.1".into(), port };
        World { rank, world: 2, local_world: 2, master, token: token.into(), ..World::alone() }
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn ranks_meet_beside_a_port_in_use_and_beside_other_runs() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        // Whoever connects there is cut off, as a store of another make does.
        let port = taken.local_addr().unwrap().port();
        thread::spawn(move || taken.incoming().for_each(drop));
        thread::scope(|scope| {
            let run = |token: &'static str| {
                scope.spawn(move || {
                    let meeting = world(0, port, token).meet(SOON).unwrap();
                    meeting.client.set("token", token.as_bytes()).unwrap();
                    meeting.client.get("end", SOON).unwrap();
                });
                scope.spawn(move || {
                    let meeting = world(1, port, token).meet(SOON).unwrap();
                    assert_eq!(meeting.client.get("token", SOON).unwrap(), token.as_bytes());
                    // The answer may be lost, as the store ends with rank 0.
                    let _ = meeting.client.set("end", b"");
                });
            };
            run("one");
            run("two");
        });
    }

    #[test]
    fn a_store_of_the_launcher_is_used() {
        let server = Server::start("127.0.0.1:0", "run").unwrap();
        let master = Master::Launcher(server.address().to_string());
        let meeting = World { master, ..world(0, 1, "run") }.meet(SOON).unwrap();
        assert!(meeting._server.is_none());
    }

    #[test]
    fn who_waits_in_vain_says_for_whom() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = world(1, free, "run").meet(Duration::from_millis(50)).err().unwrap().to_string();
        assert!(error.contains("rank 0 was not found there within") && error.contains("127.0.0.1"), "{error}");
        let far = World { local_world: 1, ..world(0, free, "run") };
        let error = far.meet(Duration::from_millis(50)).err().unwrap().to_string();
        assert!(error.contains("MASTER_ADDR = 127.0.0.1: is this host only"), "{error}");
    }
}
