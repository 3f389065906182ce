//! The serving side: one thread for each connection, one map under one lock.

use super::{
    Frame, MAGIC, MAX_FRAME, MAX_HELD, MAX_HELLO, MAX_KEY, SLICE, answer, as_number, as_time, ask, number, read_frame,
    write_frame,
};
use crate::{Error, Result};
use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// A client that has connected says its token within this time.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// A client that takes no bytes of an answer for so long is cut off.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// Connections at most; further ones are closed at once.
const MAX_CONNECTIONS: usize = 16 << 10;
/// The thread of a connection needs little.
const STACK: usize = 256 << 10;

/// A running store. It ends, and cuts off its clients, when dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    token: String,
    held: Mutex<Held>,
    changed: Condvar,
    connections: Mutex<HashMap<u64, TcpStream>>,
    stop: AtomicBool,
}

#[derive(Default)]
struct Held {
    entries: BTreeMap<String, Entry>,
    bytes: usize,
}

struct Entry {
    value: Vec<u8>,
    /// The connection that it disappears with.
    lease: Option<u64>,
}

impl Server {
    /// Serves at `HOST:PORT`, and there only; port 0 is any free one (see [`Server::address`]).
    ///
    /// # Errors
    /// The host does not resolve, is not this machine's, or the port is in use.
    pub fn start(endpoint: &str, token: &str) -> Result<Self> {
        let refused = |why: String| Error::config("rendezvous endpoint", endpoint, why);
        let addresses = endpoint.to_socket_addrs().map_err(|e| {
            refused(format!(
                "does not resolve ({e}): give HOST:PORT with a name that this machine knows, or an address"
            ))
        })?;
        let listener = TcpListener::bind(&addresses.collect::<Vec<_>>()[..]).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => refused("the port is in use: choose another, or 0 for any free one".into()),
            io::ErrorKind::AddrNotAvailable => refused("is no address of this machine".into()),
            _ => refused(format!("cannot be served ({e})")),
        })?;
        let unusable = |e| refused(format!("cannot be served ({e})"));
        let address = listener.local_addr().map_err(unusable)?;
        let shared = Arc::new(Shared {
            token: token.into(),
            held: Mutex::default(),
            changed: Condvar::new(),
            connections: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        let acceptor = thread::Builder::new().name("store".into()).spawn(move || accept(&accepting, &listener));
        Ok(Self { address, shared, acceptor: Some(acceptor.map_err(unusable)?) })
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // The acceptor sits in accept(): a connection wakes it up.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        let woken = TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
        if let Some(acceptor) = self.acceptor.take().filter(|_| woken) {
            let _ = acceptor.join();
        }
        for stream in lock(&self.shared.connections).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    for id in 0.. {
        let accepted = listener.accept();
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, most likely: others may be given back.
            thread::sleep(Duration::from_millis(50));
            continue;
        };
        let mut connections = lock(&shared.connections);
        if connections.len() >= MAX_CONNECTIONS {
            continue;
        }
        let Ok(kept) = stream.try_clone() else { continue };
        connections.insert(id, kept);
        drop(connections);
        let serving = shared.clone();
        let thread = thread::Builder::new().name("store".into()).stack_size(STACK).spawn(move || {
            // An error is a client that went away or that talks nonsense: either way it is cut off.
            let _ = serving.serve(id, stream);
            serving.end(id);
        });
        if thread.is_err() {
            shared.end(id);
        }
    }
}

/// What to answer: the fields, or why not.
type Answer = std::result::Result<Vec<Vec<u8>>, String>;

impl Shared {
    fn serve(&self, id: u64, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HELLO_TIME))?;
        stream.set_write_timeout(Some(WRITE_TIME))?;
        let hello = read_frame(&mut stream, MAX_HELLO)?;
        match &hello.fields[..] {
            [magic, token] if magic == MAGIC && token == self.token.as_bytes() => {
                write_frame(&mut stream, answer::DONE, &[])?;
            }
            [magic, _] if magic == MAGIC => {
                return write_frame(&mut stream, answer::STRANGER, &[self.token.as_bytes()]);
            }
            _ => return write_frame(&mut stream, answer::REFUSED, &[b"this is a store of mupscale, version 1"]),
        }
        stream.set_read_timeout(None)?;
        while !self.stop.load(Ordering::SeqCst) {
            let frame = read_frame(&mut stream, MAX_FRAME)?;
            if let (ask::LEASE, [_, _, time]) = (frame.kind, &frame.fields[..]) {
                stream.set_read_timeout(Some(as_time(time).max(Duration::from_millis(1))))?;
            }
            match self.answer(id, frame) {
                Ok(fields) => {
                    let fields: Vec<_> = fields.iter().map(Vec::as_slice).collect();
                    write_frame(&mut stream, answer::DONE, &fields)?;
                }
                Err(why) => write_frame(&mut stream, answer::REFUSED, &[why.as_bytes()])?,
            }
        }
        Ok(())
    }

    /// Forgets a connection and what was leased to it.
    fn end(&self, id: u64) {
        if let Some(stream) = lock(&self.connections).remove(&id) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let mut held = lock(&self.held);
        let before = held.entries.len();
        let leased: Vec<_> =
            held.entries.iter().filter(|(_, e)| e.lease == Some(id)).map(|(key, _)| key.clone()).collect();
        leased.iter().for_each(|key| drop(held.remove(key)));
        if held.entries.len() < before {
            self.changed.notify_all();
        }
    }

    fn answer(&self, id: u64, Frame { kind, fields }: Frame) -> Answer {
        let mut held = lock(&self.held);
        match (kind, &fields[..]) {
            (ask::SET, [key, value]) => {
                held.set(name(key)?, value.clone(), None)?;
                self.changed.notify_all();
                Ok(vec![])
            }
            (ask::LOOK, [key]) => Ok(held.get(name(key)?)),
            (ask::ADD, [key, amount]) => {
                let (key, amount) = (name(key)?, as_number(amount).ok_or("no amount")?);
                let old = match held.entries.get(key) {
                    Some(entry) => as_number(&entry.value).ok_or_else(|| format!("{key} holds no number"))?,
                    None => 0,
                };
                let sum = old.checked_add(amount).ok_or_else(|| format!("{key}: {old} + {amount} is too large"))?;
                held.set(key, number(sum).to_vec(), None)?;
                self.changed.notify_all();
                Ok(vec![number(sum).to_vec()])
            }
            // One field more says what is expected; without it, that there is nothing.
            (ask::SWAP, [key, new, expected @ ..]) if expected.len() < 2 => {
                let key = name(key)?;
                let swaps = held.get(key) == expected;
                if swaps {
                    held.set(key, new.clone(), None)?;
                    self.changed.notify_all();
                }
                let mut fields = vec![vec![u8::from(swaps)]];
                fields.extend(held.get(key));
                Ok(fields)
            }
            (ask::WAIT, [time, keys @ ..]) => {
                let keys: Vec<&str> = keys.iter().map(|key| name(key)).collect::<std::result::Result<_, _>>()?;
                // Keys that were there once are not looked for again at every change; all are when time is over.
                let mut first = 0;
                let held = self.sleep_while(held, time, |held| {
                    first += keys[first..].iter().take_while(|&&key| held.entries.contains_key(key)).count();
                    first < keys.len()
                });
                let missing = keys.iter().filter(|&&key| !held.entries.contains_key(key));
                Ok(missing.map(|key| key.as_bytes().to_vec()).collect())
            }
            (ask::WATCH, [time, key, last @ ..]) if last.len() < 2 => {
                let key = name(key)?;
                let held = self.sleep_while(held, time, |held| held.get(key) == last);
                Ok(held.get(key))
            }
            (ask::DELETE, [key]) => {
                let was = held.remove(name(key)?).is_some();
                self.changed.notify_all();
                Ok(vec![vec![u8::from(was)]])
            }
            (ask::KEYS, [prefix]) => {
                let prefix = name(prefix)?;
                let keys = held.entries.range(prefix.to_string()..).map(|(key, _)| key);
                let keys: Vec<_> =
                    keys.take_while(|key| key.starts_with(prefix)).map(|k| k.as_bytes().to_vec()).collect();
                match keys.iter().map(|key| 4 + key.len()).sum::<usize>() < MAX_FRAME && keys.len() <= super::MAX_FIELDS
                {
                    true => Ok(keys),
                    false => Err(format!("{} keys begin with {prefix}: too many to list", keys.len())),
                }
            }
            (ask::LEASE, [key, value, _]) => {
                let key = name(key)?;
                if held.entries.get(key).is_some_and(|entry| entry.lease.is_some_and(|owner| owner != id)) {
                    return Err(format!("{key} is held by another client that is alive"));
                }
                held.set(key, value.clone(), Some(id))?;
                self.changed.notify_all();
                Ok(vec![])
            }
            (ask::HEARTBEAT, []) => Ok(vec![]),
            _ => Err(format!("unknown request {kind} with {} fields: do all ranks run one version?", fields.len())),
        }
    }

    /// Waits while `waiting` says so, for a time asked for, and one [`SLICE`] at most.
    fn sleep_while<'a>(
        &self,
        mut held: MutexGuard<'a, Held>,
        time: &[u8],
        mut waiting: impl FnMut(&Held) -> bool,
    ) -> MutexGuard<'a, Held> {
        let end = Instant::now() + as_time(time).min(SLICE);
        while waiting(&held) && !self.stop.load(Ordering::SeqCst) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            held = self.changed.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        held
    }
}

impl Held {
    /// The value as the fields of an answer: one, or none.
    fn get(&self, key: &str) -> Vec<Vec<u8>> {
        self.entries.get(key).map(|entry| entry.value.clone()).into_iter().collect()
    }

    fn remove(&mut self, key: &str) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.bytes -= key.len() + entry.value.len();
        Some(entry)
    }

    fn set(&mut self, key: &str, value: Vec<u8>, lease: Option<u64>) -> std::result::Result<(), String> {
        let old = self.entries.get(key).map_or(0, |entry| key.len() + entry.value.len());
        let bytes = self.bytes - old + key.len() + value.len();
        if bytes > MAX_HELD {
            return Err(format!("the store is full: it holds {MAX_HELD} bytes at most"));
        }
        self.bytes = bytes;
        self.entries.insert(key.into(), Entry { value, lease });
        Ok(())
    }
}

fn name(key: &[u8]) -> std::result::Result<&str, String> {
    if key.len() > MAX_KEY {
        return Err(format!("a key of {} bytes; at most {MAX_KEY}", key.len()));
    }
    std::str::from_utf8(key).map_err(|_| "a key that is no text".into())
}
