//! The asking side.

use super::{Frame, MAGIC, MAX_FRAME, answer, as_number, ask, milliseconds, number, read_frame, write_frame};
use crate::{Error, Result};
use std::{
    io,
    net::{Shutdown, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// A server answers within this time, or is gone: it never keeps a client waiting for more than a second.
const PATIENCE: Duration = Duration::from_secs(15);

/// Why an attempt to connect failed.
pub(in crate::comm) enum Refusal {
    /// Somebody else is there: another attempt would find the same.
    Stranger(Error),
    /// Nobody is there, yet.
    Nobody(String),
}

/// A connection to a store. A call that waits keeps others on the same client waiting; [`Client::another`] helps.
pub struct Client {
    endpoint: String,
    token: String,
    stream: Mutex<TcpStream>,
}

impl Client {
    /// Connects to the store at `HOST:PORT`, trying again until `timeout` is over: server and name may appear late.
    ///
    /// # Errors
    /// Nobody answers there in time, the host does not resolve, or the store is another run's.
    pub fn connect(endpoint: &str, token: &str, timeout: Duration) -> Result<Self> {
        let end = Instant::now() + timeout;
        let mut pause = Duration::from_millis(20);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let why = match Self::attempt(endpoint, token, left.clamp(Duration::from_millis(10), PATIENCE)) {
                Ok(client) => return Ok(client),
                Err(Refusal::Stranger(error)) => return Err(error),
                Err(Refusal::Nobody(why)) => why,
            };
            if Instant::now() + pause >= end {
                let why = format!("{why}; tried for {:.0} s", timeout.as_secs_f64());
                return Err(Error::config("rendezvous endpoint", endpoint, why));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Connects, once; nothing takes longer than `patience`.
    pub(in crate::comm) fn attempt(endpoint: &str, token: &str, patience: Duration) -> Result<Self, Refusal> {
        let addresses = endpoint.to_socket_addrs().map_err(|e| {
            let why = "give HOST:PORT with a name that this machine knows, or an address";
            Refusal::Nobody(format!("does not resolve ({e}): {why}"))
        })?;
        let mut failure = "has no address".to_string();
        for address in addresses {
            let greeted = TcpStream::connect_timeout(&address, patience).and_then(|mut stream| {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                write_frame(&mut stream, 0, &[MAGIC, token.as_bytes()])?;
                let answer = read_frame(&mut stream, MAX_FRAME)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok((answer, stream))
            });
            let (frame, stream) = match greeted {
                Ok(answered) => answered,
                Err(e) => {
                    failure = format!("no store answers there ({e}): is rank 0, or the first host, running?");
                    continue;
                }
            };
            let words =
                frame.fields.first().map(|field| String::from_utf8_lossy(field).into_owned()).unwrap_or_default();
            return match frame.kind {
                answer::DONE => {
                    let (endpoint, token) = (endpoint.to_string(), token.to_string());
                    Ok(Self { endpoint, token, stream: Mutex::new(stream) })
                }
                answer::STRANGER => {
                    let why = format!(
                        "stale rendezvous id: the store at {endpoint} is of the run `{words}`; start all ranks with one id"
                    );
                    Err(Refusal::Stranger(Error::config("rendezvous id", token, why)))
                }
                _ => {
                    let why = format!("is something else: {words}");
                    Err(Refusal::Stranger(Error::config("rendezvous endpoint", endpoint, why)))
                }
            };
        }
        Err(Refusal::Nobody(failure))
    }

    /// A second connection to the same store.
    pub fn another(&self) -> Result<Self> {
        Self::connect(&self.endpoint, &self.token, PATIENCE)
    }

    /// The address of this end of the connection: where others that reach the store are likely to reach us.
    pub fn local_address(&self) -> Result<std::net::IpAddr> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.local_addr().map(|address| address.ip()).map_err(|e| self.lost(&e))
    }

    fn lost(&self, error: &io::Error) -> Error {
        Error::Fault(format!(
            "the store at {} is lost ({error}): its host, or the launcher there, ended",
            self.endpoint
        ))
    }

    fn ask(&self, kind: u8, fields: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = write_frame(&mut *stream, kind, fields).and_then(|()| read_frame(&mut *stream, MAX_FRAME));
        match asked {
            Ok(Frame { kind: answer::DONE, fields }) => Ok(fields),
            Ok(Frame { fields, .. }) => {
                let why = fields.first().map(|why| String::from_utf8_lossy(why).into_owned()).unwrap_or_default();
                Err(Error::Fault(format!("the store at {} refuses: {why}", self.endpoint)))
            }
            Err(error) => {
                // Half a message may be on its way: nothing that comes after it would be understood.
                let _ = stream.shutdown(Shutdown::Both);
                Err(self.lost(&error))
            }
        }
    }

    /// Sets a value; one that was there is replaced.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.ask(ask::SET, &[key.as_bytes(), value]).map(drop)
    }

    /// The value, if there is one.
    pub fn look(&self, key: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.ask(ask::LOOK, &[key.as_bytes()])?.pop())
    }

    /// The value, waited for.
    ///
    /// # Errors
    /// A fault if there is none in time.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        match self.watch(key, None, timeout)? {
            Some(value) => Ok(value),
            None => Err(Error::Fault(format!(
                "nobody has set `{key}` in the store at {} within {:.0} s",
                self.endpoint,
                timeout.as_secs_f64()
            ))),
        }
    }

    /// Adds to a counter, which begins at 0. Returns its new value.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let fields = self.ask(ask::ADD, &[key.as_bytes(), &number(amount)])?;
        fields.first().and_then(|field| as_number(field)).ok_or_else(|| self.nonsense())
    }

    /// Sets a value if the present one is `expected` (None: if there is none). Returns whether it was set, and the
    /// value that is there now.
    pub fn compare_and_set(&self, key: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<(bool, Option<Vec<u8>>)> {
        let mut fields = vec![key.as_bytes(), new];
        fields.extend(expected);
        let mut fields = self.ask(ask::SWAP, &fields)?.into_iter();
        let set = fields.next().ok_or_else(|| self.nonsense())? == [1];
        Ok((set, fields.next()))
    }

    /// Waits until all keys are there. Returns those that are missing when time is over.
    pub fn wait(&self, keys: &[String], timeout: Duration) -> Result<Vec<String>> {
        let end = Instant::now() + timeout;
        loop {
            let left = milliseconds(end.saturating_duration_since(Instant::now()));
            let fields: Vec<_> = [&left[..]].into_iter().chain(keys.iter().map(String::as_bytes)).collect();
            let missing = self.ask(ask::WAIT, &fields)?;
            if missing.is_empty() || Instant::now() >= end {
                return Ok(missing.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect());
            }
        }
    }

    /// Waits until a value is another than `last` (None: not there), or time is over. Returns the value by then.
    pub fn watch(&self, key: &str, last: Option<&[u8]>, timeout: Duration) -> Result<Option<Vec<u8>>> {
        let end = Instant::now() + timeout;
        loop {
            let left = milliseconds(end.saturating_duration_since(Instant::now()));
            let fields: Vec<_> = [&left[..], key.as_bytes()].into_iter().chain(last).collect();
            let value = self.ask(ask::WATCH, &fields)?.pop();
            if value.as_deref() != last || Instant::now() >= end {
                return Ok(value);
            }
        }
    }

    /// Removes a key. Returns whether it was there.
    pub fn delete(&self, key: &str) -> Result<bool> {
        Ok(self.ask(ask::DELETE, &[key.as_bytes()])?.pop().is_some_and(|was| was == [1]))
    }

    /// The keys that begin with `prefix`, sorted.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        let keys = self.ask(ask::KEYS, &[prefix.as_bytes()])?;
        Ok(keys.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect())
    }

    /// Waits until `world` ranks are here. A name serves once.
    ///
    /// # Errors
    /// A fault that names the ranks that are missing when time is over.
    pub fn barrier(&self, name: &str, rank: usize, world: usize, timeout: Duration) -> Result<()> {
        let key = |rank: usize| format!("barrier/{name}/{rank}");
        self.set(&key(rank), b"")?;
        let missing = self.wait(&(0..world).map(key).collect::<Vec<_>>(), timeout)?;
        if missing.is_empty() {
            return Ok(());
        }
        let ranks: Vec<_> = missing.iter().filter_map(|key| key.rsplit('/').next()?.parse().ok()).collect();
        Err(Error::Fault(format!(
            "{} missing at `{name}` after {:.0} s, of {world} ranks: did their processes start?",
            name_ranks(&ranks),
            timeout.as_secs_f64()
        )))
    }

    /// Sets a value that disappears when this process ends, its connection breaks, or it is silent for `time`.
    ///
    /// # Errors
    /// A fault if another client that is alive holds the key.
    pub fn lease(&self, key: &str, value: &[u8], time: Duration) -> Result<Lease> {
        let client = self.another()?;
        client.ask_for_lease(key, value, time)?;
        let (stop, stopped) = mpsc::channel::<()>();
        let lost = Arc::new(AtomicBool::new(false));
        let flag = lost.clone();
        let beat = move || {
            // Until the lease is dropped, and the sender with it.
            while stopped.recv_timeout(time / 4) == Err(mpsc::RecvTimeoutError::Timeout) {
                if client.ask(ask::HEARTBEAT, &[]).is_err() {
                    flag.store(true, Ordering::SeqCst);
                    return;
                }
            }
        };
        let refused = |e| Error::Device(format!("a thread for the heartbeat was refused ({e})"));
        let thread = thread::Builder::new().name("heartbeat".into()).spawn(beat).map_err(refused)?;
        Ok(Lease { stop: Some(stop), lost, thread: Some(thread) })
    }

    /// Ties a key to this very connection.
    pub(super) fn ask_for_lease(&self, key: &str, value: &[u8], time: Duration) -> Result<()> {
        self.ask(ask::LEASE, &[key.as_bytes(), value, &milliseconds(time)]).map(drop)
    }

    fn nonsense(&self) -> Error {
        Error::Fault(format!("the store at {} answers nonsense: do all ranks run one version?", self.endpoint))
    }
}

/// A key that lives as long as this value and its process; see [`Client::lease`].
pub struct Lease {
    stop: Option<mpsc::Sender<()>>,
    lost: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    /// Whether the store has not answered a heartbeat: it is gone, or took this client for dead.
    pub fn lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Ranks in words: `rank 3`, `ranks 1, 2, 5 and 12 more`.
pub(in crate::comm) fn name_ranks(ranks: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<_> = ranks.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if ranks.len() > SHOWN { format!(" and {} more", ranks.len() - SHOWN) } else { String::new() };
    format!("rank{} {}{more}", if ranks.len() == 1 { "" } else { "s" }, shown.join(", "))
}
