//! Connections of a rank with its neighbours in the tree: whole messages, signs of life, and the cause of an end.

use crate::comm::store::name_ranks;
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Kinds of messages. A sign of life is this one byte; the others have a length (u64, little-endian) and bytes.
const ALIVE: u8 = 0;
const DATA: u8 = 1;
const FAULT: u8 = 2;

/// Longest cause of an end, in bytes.
const MAX_CAUSE: usize = 4 << 10;
/// Longest message whose length is not known beforehand.
const MAX_TEXT: usize = 256 << 20;
/// How often a rank that waits looks after its other neighbours.
const TICK: Duration = Duration::from_millis(250);

/// A connection with a neighbour.
pub struct Link {
    peer: usize,
    stream: TcpStream,
}

/// Why ranks cannot go on.
#[derive(Debug)]
pub struct Fault {
    /// In words that name the rank.
    pub cause: String,
    /// The neighbour that needs not be told: it is gone, or has told it.
    from: Option<usize>,
}

impl Fault {
    /// One that all neighbours are to be told.
    pub fn of_ours(cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), from: None }
    }
}

/// What ends this rank from its own side: set by its main thread, seen by the one that communicates.
pub type Leaving = Arc<Mutex<Option<String>>>;

/// All connections of a rank.
///
/// A rank that waits for a neighbour tells its other neighbours four times in a timeout, and more often, that it is
/// alive. So of those that wait for each other along the tree only one finds the other silent: the neighbour of the
/// rank that hangs.
pub struct Links {
    /// Those whose sums this rank adds to its own, in this order.
    pub children: Vec<Link>,
    /// The one that adds this rank's sum to its own; none for rank 0.
    pub parent: Option<Link>,
    /// Longest silence of a neighbour that is waited for.
    pub timeout: Duration,
    /// See [`Leaving`].
    pub leaving: Leaving,
}

impl Link {
    /// A connection that was made.
    pub fn new(peer: usize, stream: TcpStream, timeout: Duration) -> io::Result<Self> {
        let tick = TICK.min(timeout / 4).max(Duration::from_millis(1));
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(tick))?;
        stream.set_write_timeout(Some(tick))?;
        Ok(Self { peer, stream })
    }

    /// The rank at its other end.
    pub fn peer(&self) -> usize {
        self.peer
    }

    fn lost(&self, why: &dyn std::fmt::Display) -> Fault {
        Fault { cause: format!("{} is lost: {why}", name_ranks(&[self.peer])), from: Some(self.peer) }
    }
}

/// Whether a read or write found nothing to do in time.
fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

const CLOSED: &str = "its process ended or closed the connection";

impl Links {
    fn all(&self) -> impl Iterator<Item = &Link> {
        self.children.iter().chain(&self.parent)
    }

    /// Sends a message.
    pub fn send(&self, link: &Link, bytes: &[u8]) -> Result<(), Fault> {
        let mut header = [DATA; 9];
        header[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.write(link, &header)?;
        self.write(link, bytes)
    }

    /// Receives a message of known length, in pieces of at most `piece.len()` bytes; `take` gets where one begins.
    pub fn receive(
        &self,
        link: &Link,
        length: usize,
        piece: &mut [u8],
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<(), Fault> {
        let found = self.header(link)?;
        if found != length {
            return Err(self.out_of_step(link, found, length));
        }
        let mut at = 0;
        while at < length {
            let size = piece.len().min(length - at);
            self.read(link, &mut piece[..size])?;
            take(at, &piece[..size]);
            at += size;
        }
        Ok(())
    }

    /// Receives a message of any length.
    pub fn receive_text(&self, link: &Link) -> Result<Vec<u8>, Fault> {
        let length = self.header(link)?;
        if length > MAX_TEXT {
            return Err(self.out_of_step(link, length, MAX_TEXT));
        }
        let mut bytes = Vec::new();
        while bytes.len() < length {
            // Memory is taken as bytes arrive.
            let at = bytes.len();
            bytes.resize(length.min(at + (1 << 20)), 0);
            self.read(link, &mut bytes[at..])?;
        }
        Ok(bytes)
    }

    fn out_of_step(&self, link: &Link, found: usize, expected: usize) -> Fault {
        let cause = format!(
            "{} sends {found} bytes where {expected} are expected: ranks are out of step, which is an error of ours",
            name_ranks(&[link.peer])
        );
        Fault::of_ours(cause)
    }

    /// The length of the next message.
    fn header(&self, link: &Link) -> Result<usize, Fault> {
        let mut kind = [0];
        loop {
            self.read(link, &mut kind)?;
            match kind[0] {
                ALIVE => {}
                DATA => {
                    let mut length = [0; 8];
                    self.read(link, &mut length)?;
                    return Ok(usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX));
                }
                FAULT => return Err(self.told(link)?),
                _ => return Err(link.lost(&"it sends nonsense")),
            }
        }
    }

    /// The cause of an end that a neighbour tells.
    fn told(&self, link: &Link) -> Result<Fault, Fault> {
        let mut length = [0; 8];
        self.read(link, &mut length)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_CAUSE as u64 {
            return Err(link.lost(&"it sends nonsense"));
        }
        let mut cause = vec![0; length as usize];
        self.read(link, &mut cause)?;
        Ok(Fault { cause: String::from_utf8_lossy(&cause).into_owned(), from: Some(link.peer) })
    }

    /// Fills a buffer.
    fn read(&self, link: &Link, mut buffer: &mut [u8]) -> Result<(), Fault> {
        let mut heard = Instant::now();
        while !buffer.is_empty() {
            match (&link.stream).read(buffer) {
                Ok(0) => return Err(link.lost(&CLOSED)),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    heard = Instant::now();
                }
                Err(e) if waits(&e) => self.tick(link, heard)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(link.lost(&format!("{CLOSED} ({e})"))),
            }
        }
        Ok(())
    }

    fn write(&self, link: &Link, mut bytes: &[u8]) -> Result<(), Fault> {
        let mut heard = Instant::now();
        while !bytes.is_empty() {
            match (&link.stream).write(bytes) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    heard = Instant::now();
                }
                Err(e) if waits(&e) => self.tick(link, heard)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // It may have said why before it went.
                Err(e) => return Err(self.glance(link).err().unwrap_or_else(|| link.lost(&format!("{CLOSED} ({e})")))),
            }
        }
        Ok(())
    }

    /// While a neighbour is waited for: looks whether this rank or another neighbour ends, and tells the others that
    /// this rank is alive.
    fn tick(&self, awaited: &Link, heard: Instant) -> Result<(), Fault> {
        if let Some(cause) = self.leaving.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(Fault::of_ours(cause));
        }
        for link in self.all().filter(|link| link.peer != awaited.peer) {
            self.glance(link)?;
            match (&link.stream).write(&[ALIVE]) {
                Err(e) if !waits(&e) => return Err(link.lost(&format!("{CLOSED} ({e})"))),
                _ => {}
            }
        }
        if heard.elapsed() < self.timeout {
            return Ok(());
        }
        let seconds = self.timeout.as_secs_f64();
        let why = format!("nothing was heard of it for {seconds:.0} s (comm.timeout); it hangs, or the network does");
        Err(awaited.lost(&why))
    }

    /// Looks whether all neighbours are there, and takes what they have to say of an end.
    pub fn look(&self) -> Result<(), Fault> {
        self.all().try_for_each(|link| self.glance(link))
    }

    /// Reads what a neighbour has sent as far as it is a sign of life; an end, or its cause, is an error.
    fn glance(&self, link: &Link) -> Result<(), Fault> {
        loop {
            let mut kind = [0];
            let peeked = link.stream.set_nonblocking(true).and_then(|()| link.stream.peek(&mut kind));
            let restored = link.stream.set_nonblocking(false);
            match (peeked, restored) {
                (_, Err(e)) => return Err(link.lost(&e)),
                (Ok(0), _) => return Err(link.lost(&CLOSED)),
                (Ok(_), _) if kind[0] == ALIVE => self.read(link, &mut kind)?,
                (Ok(_), _) if kind[0] == FAULT => {
                    self.read(link, &mut kind)?;
                    return Err(self.told(link)?);
                }
                (Ok(_), _) => return Ok(()),
                (Err(e), _) if waits(&e) || e.kind() == io::ErrorKind::Interrupted => return Ok(()),
                (Err(e), _) => return Err(link.lost(&format!("{CLOSED} ({e})"))),
            }
        }
    }

    /// Tells the neighbours why there is an end, as far as they listen.
    pub fn tell(&self, fault: &Fault) {
        let cause = fault.cause.as_bytes();
        let cause = &cause[..cause.len().min(MAX_CAUSE)];
        let mut bytes = vec![FAULT];
        bytes.extend((cause.len() as u64).to_le_bytes());
        bytes.extend(cause);
        for link in self.all().filter(|link| Some(link.peer) != fault.from) {
            let _ = (&link.stream).write(&bytes);
        }
    }
}
