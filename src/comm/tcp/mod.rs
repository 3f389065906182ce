//! Ranks as processes that are connected by TCP, for CPUs, and for what GPUs' hosts have to say to each other.
//!
//! Connections form the tree of [`halves`](super::halves): the rank that a range of ranks begins with adds the sum of
//! its right half to that of its left half. Sums go up and the total comes down, to all or along the way to the one that
//! wants it, so results are those of [`threads`](super::threads), bit for bit, and no rank has more than
//! log₂(world) + 1 connections.
//!
//! A thread communicates, in the order of the calls, while the rank computes on.

mod links;
#[cfg(test)]
mod tests;

use super::{
    Collective, Comm, Ticket,
    environment::World,
    meeting::Meeting,
    store::{name_ranks, read_frame, write_frame},
};
use crate::{
    DType, Error, Result,
    backend::{Backend, HostBuffer, Mut, Stream},
    machine,
    trace::{self, Lane},
};
use links::{Fault, Leaving, Link, Links};
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

/// What a rank says first to the one above it, with the token and its number.
const MAGIC: &[u8] = b"mupscale rank 1";
/// Longest such greeting, in bytes, and longest wait for it.
const GREETING: (usize, Duration) = (4 << 10, Duration::from_secs(5));
/// How often a rank that waits for others to start looks whether one was refused.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes that are received before they are added.
const PIECE: usize = 64 << 10;

/// The connected ranks of a run, before there is a device.
pub struct Tree {
    rank: usize,
    world: usize,
    links: Links,
}

/// Ranks below `rank` in the tree over `world` ranks, in the order in which their sums are added.
fn children(rank: usize, world: usize) -> Vec<usize> {
    let (mut start, mut end, mut found) = (0, world, Vec::new());
    while end - start > 1 {
        let middle = start + (end - start) / 2;
        if rank >= middle {
            start = middle;
            found.clear();
        } else {
            if rank == start {
                found.push(middle);
            }
            end = middle;
        }
    }
    found.reverse();
    found
}

/// The ranks from `rank` up to 0, both included.
fn way_up(rank: usize, world: usize) -> Vec<usize> {
    let mut way = vec![rank];
    while let Some(above) = (0..way[way.len() - 1]).find(|&above| children(above, world).contains(&way[way.len() - 1]))
    {
        way.push(above);
    }
    way
}

impl Tree {
    /// Connects the ranks of a run. Afterwards the store is not needed.
    ///
    /// # Errors
    /// A rank is missing when time is over, is there twice, or was started for another number of ranks.
    pub fn connect(world: &World, meeting: &Meeting, timeout: Duration) -> Result<Self> {
        let end = Instant::now() + timeout;
        let unusable = |e: io::Error| Error::Device(format!("a port for other ranks cannot be opened: {e}"));
        let listener = TcpListener::bind((meeting.client.local_address()?, 0)).map_err(unusable)?;
        let here = listener.local_addr().map_err(unusable)?;
        let addresses = introduce(world, meeting, here, timeout)?;
        let below = children(world.rank, world.world);
        let lost = |peer: usize, e: io::Error| {
            let name = name_ranks(&[peer]);
            Error::Fault(format!(
                "{name} cannot be reached at {}: {e}; does a firewall divide the hosts?",
                addresses[peer]
            ))
        };
        let parent = way_up(world.rank, world.world)
            .get(1)
            .copied()
            .map(|above| {
                let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
                TcpStream::connect_timeout(&addresses[above], left)
                    .and_then(|mut stream| {
                        let number = world.rank.to_le_bytes();
                        write_frame(&mut stream, 0, &[MAGIC, world.token.as_bytes(), &number])?;
                        Link::new(above, stream, timeout)
                    })
                    .map_err(|e| lost(above, e))
            })
            .transpose()?;
        let children = accept(world, &listener, &below, end, timeout)?;
        let links = Links { children, parent, timeout, leaving: Leaving::default() };
        let tree = Self { rank: world.rank, world: world.world, links };
        // Nobody asks the store any more when the rank that runs it goes on.
        tree.exchange(&[])?;
        Ok(tree)
    }

    /// Longest silence of a rank that is waited for.
    pub fn timeout(&self) -> Duration {
        self.links.timeout
    }

    /// Every rank's bytes, by rank.
    pub fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.gather(mine).map_err(|fault| {
            self.links.tell(&fault);
            Error::Fault(fault.cause)
        })
    }

    fn gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Fault> {
        let mut all = entry(self.rank, mine);
        for child in &self.links.children {
            all.extend(self.links.receive_text(child)?);
        }
        if let Some(parent) = &self.links.parent {
            self.links.send(parent, &all)?;
            all = self.links.receive_text(parent)?;
        }
        for child in self.links.children.iter().rev() {
            self.links.send(child, &all)?;
        }
        let mut found = vec![None; self.world];
        let mut rest = &all[..];
        while let Some((rank, bytes, after)) = next_entry(rest) {
            if let Some(slot) = found.get_mut(rank) {
                *slot = Some(bytes.to_vec());
            }
            rest = after;
        }
        let whole: Option<Vec<_>> = found.into_iter().collect();
        whole
            .filter(|_| rest.is_empty())
            .ok_or_else(|| Fault::of_ours("ranks exchange nonsense: do all run one version?"))
    }

    /// Does a collective with a tensor's bytes; sums are of f64 values.
    fn perform(&self, what: Collective, values: &mut [u8], piece: &mut [u8]) -> Result<(), Fault> {
        match what {
            Collective::Sum => {
                self.add_up(values, piece)?;
                self.spread(0, values, piece)
            }
            Collective::SumTo(rank) => {
                self.add_up(values, piece)?;
                self.hand_down(rank, values, piece)
            }
            Collective::CopyFrom(rank) => self.spread(rank, values, piece),
        }
    }

    /// Rank 0 gets the sum; the others have parts of it.
    fn add_up(&self, values: &mut [u8], piece: &mut [u8]) -> Result<(), Fault> {
        const SIZE: usize = size_of::<f64>();
        for child in &self.links.children {
            self.links.receive(child, values.len(), piece, |at, theirs| {
                let (ours, _) = values[at..at + theirs.len()].as_chunks_mut::<SIZE>();
                for (left, right) in ours.iter_mut().zip(theirs.as_chunks::<SIZE>().0) {
                    *left = (f64::from_le_bytes(*left) + f64::from_le_bytes(*right)).to_le_bytes();
                }
            })?;
        }
        self.links.parent.iter().try_for_each(|parent| self.links.send(parent, values))
    }

    /// What rank 0 has goes to `rank`, and to those between.
    fn hand_down(&self, rank: usize, values: &mut [u8], piece: &mut [u8]) -> Result<(), Fault> {
        let way = way_up(rank, self.world);
        let Some(at) = way.iter().position(|&r| r == self.rank) else { return Ok(()) };
        self.links.parent.iter().try_for_each(|parent| self.take(parent, values, piece))?;
        let below = at.checked_sub(1).map(|next| way[next]);
        self.links.children.iter().filter(|c| Some(c.peer()) == below).try_for_each(|c| self.links.send(c, values))
    }

    /// What `rank` has goes to all, along every connection away from it.
    fn spread(&self, rank: usize, values: &mut [u8], piece: &mut [u8]) -> Result<(), Fault> {
        let way = way_up(rank, self.world);
        // The neighbour on the side of `rank`: below, where this rank lies on its way up, else above.
        let source = match way.iter().position(|&r| r == self.rank) {
            Some(at) => at.checked_sub(1).map(|next| way[next]),
            None => self.links.parent.as_ref().map(Link::peer),
        };
        let neighbours = || self.links.parent.iter().chain(self.links.children.iter().rev());
        neighbours().filter(|n| Some(n.peer()) == source).try_for_each(|n| self.take(n, values, piece))?;
        neighbours().filter(|n| Some(n.peer()) != source).try_for_each(|n| self.links.send(n, values))
    }

    /// Receives values in place of those that are there.
    fn take(&self, link: &Link, values: &mut [u8], piece: &mut [u8]) -> Result<(), Fault> {
        self.links.receive(link, values.len(), piece, |at, part| values[at..at + part.len()].copy_from_slice(part))
    }
}

/// Bytes of a rank among those of others.
fn entry(rank: usize, bytes: &[u8]) -> Vec<u8> {
    let header = [rank as u64, bytes.len() as u64].map(u64::to_le_bytes).concat();
    [&header, bytes].concat()
}

fn next_entry(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let (rank, rest) = bytes.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (bytes, rest) = rest.split_at_checked(length)?;
    Some((usize::try_from(u64::from_le_bytes(*rank)).ok()?, bytes, rest))
}

/// Tells the store where this rank listens, and learns it of all others.
fn introduce(world: &World, meeting: &Meeting, here: SocketAddr, timeout: Duration) -> Result<Vec<SocketAddr>> {
    let Meeting { client, prefix, .. } = meeting;
    let key = |rank: usize| format!("{prefix}/address/{rank}");
    let refused = format!("{prefix}/refused");
    let refuse = |error: Error| {
        client.set(&refused, b"")?;
        // The others look for it before the store goes with this process.
        thread::sleep(LOOK * 3 / 2);
        Err(error)
    };
    let mine = world.world.to_string();
    if let (false, Some(theirs)) = client.compare_and_set(&format!("{prefix}/world"), None, mine.as_bytes())? {
        let theirs = String::from_utf8_lossy(&theirs).into_owned();
        if theirs != mine {
            let why = format!("rank {} was started for as many ranks, others for {theirs}", world.rank);
            return refuse(Error::config("world size", mine, why));
        }
    }
    if !client.compare_and_set(&key(world.rank), None, here.to_string().as_bytes())?.0 {
        let why = "another process of this run has this rank: was it started twice?";
        return refuse(Error::config("rank", world.rank, why));
    }
    let keys: Vec<_> = (0..world.world).map(key).collect();
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let missing = client.wait(&keys, left.min(LOOK))?;
        if client.look(&refused)?.is_some() {
            return Err(Error::Elsewhere { code: 2 });
        }
        if missing.is_empty() {
            break;
        }
        if left.is_zero() {
            let ranks: Vec<_> = missing.iter().filter_map(|key| key.rsplit('/').next()?.parse().ok()).collect();
            return Err(Error::Fault(format!(
                "{} of {} missing after {:.0} s (comm.timeout): did the processes start, and reach the store?",
                name_ranks(&ranks),
                world.world,
                timeout.as_secs_f64()
            )));
        }
    }
    keys.iter()
        .map(|key| {
            let address = client.get(key, LOOK)?;
            let text = String::from_utf8_lossy(&address);
            text.parse().map_err(|_| Error::Fault(format!("the store holds no address at {key}: {text}")))
        })
        .collect()
}

/// Takes the connections of the ranks below.
fn accept(
    world: &World,
    listener: &TcpListener,
    below: &[usize],
    end: Instant,
    timeout: Duration,
) -> Result<Vec<Link>> {
    let unusable = |e: io::Error| Error::Device(format!("connections of other ranks cannot be taken: {e}"));
    listener.set_nonblocking(true).map_err(unusable)?;
    let mut found: Vec<Option<Link>> = below.iter().map(|_| None).collect();
    while found.iter().any(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Whoever does not belong here is cut off.
                let Some((rank, stream)) = greet(world, stream) else { continue };
                if let Some(at) = below.iter().position(|&r| r == rank) {
                    found[at] = Some(Link::new(rank, stream, timeout).map_err(unusable)?);
                }
            }
            Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(2)),
            Err(_) => {
                let missing: Vec<_> =
                    below.iter().zip(&found).filter(|(_, link)| link.is_none()).map(|(&r, _)| r).collect();
                let name = name_ranks(&missing);
                return Err(Error::Fault(format!("{name} did not connect with rank {} in time", world.rank)));
            }
        }
    }
    Ok(found.into_iter().flatten().collect())
}

/// The rank that a connection says it comes from, if it is of this run.
fn greet(world: &World, mut stream: TcpStream) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(GREETING.1)).ok()?;
    let greeting = read_frame(&mut stream, GREETING.0).ok()?;
    match &greeting.fields[..] {
        [magic, token, rank] if magic == MAGIC && token == world.token.as_bytes() => {
            Some((usize::from_le_bytes(rank[..].try_into().ok()?), stream))
        }
        _ => None,
    }
}

/// One rank among connected processes.
pub struct Tcp<B: Backend> {
    rank: usize,
    world: usize,
    jobs: Sender<Job<B>>,
    leaving: Leaving,
    lost: Lost,
    /// Memory of earlier collectives, for those of the same size.
    spare: Mutex<Vec<B::Host>>,
}

/// The cause of a fault, once there is one: seen while nothing is asked of the communicating thread.
type Lost = Arc<Mutex<Option<String>>>;

/// What the communicating thread does.
enum Job<B: Backend> {
    Together(Collective, B::Host, SyncSender<Result<B::Host>>),
    Exchange(Vec<u8>, SyncSender<Result<Vec<Vec<u8>>>>),
    Leave(String, SyncSender<()>),
}

/// How often a rank that asks nothing of its neighbours looks whether they are there.
const IDLE: Duration = Duration::from_millis(250);
/// Time for the last words of a rank that leaves.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl<B: Backend> Tcp<B> {
    /// Starts the thread that communicates.
    pub fn new(tree: Tree) -> Result<Self> {
        let (jobs, work) = mpsc::channel();
        let (rank, world, leaving) = (tree.rank, tree.world, tree.links.leaving.clone());
        let refused = |e| Error::Device(format!("a thread for communication was refused ({e})"));
        let lost = Lost::default();
        let noted = lost.clone();
        thread::Builder::new()
            .name("communication".into())
            .spawn(move || serve(&tree, &work, &noted))
            .map_err(refused)?;
        Ok(Self { rank, world, jobs, leaving, lost, spare: Mutex::default() })
    }

    /// Why the ranks cannot go on, as far as it is known: for those who wait for a device meanwhile.
    pub fn lost(&self) -> Option<String> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn ask<T>(&self, job: impl FnOnce(SyncSender<T>) -> Job<B>) -> Receiver<T> {
        let (answer, receiver) = mpsc::sync_channel(1);
        // A thread that is gone has dropped the answer as well.
        let _ = self.jobs.send(job(answer));
        receiver
    }
}

/// Does jobs in their order, and between them looks whether neighbours are there; after a fault all fail for its cause.
fn serve<B: Backend>(tree: &Tree, jobs: &Receiver<Job<B>>, lost: &Lost) {
    let mut fault: Option<Fault> = None;
    let mut piece = vec![0; PIECE];
    let mut attempt = |work: &mut dyn FnMut(&mut [u8]) -> Result<(), Fault>| -> Result<()> {
        if fault.is_none()
            && let Err(found) = work(&mut piece)
        {
            tree.links.tell(&found);
            *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(found.cause.clone());
            fault = Some(found);
        }
        fault.as_ref().map_or(Ok(()), |fault| Err(Error::Fault(fault.cause.clone())))
    };
    // An answer that nobody waits for any more is no matter.
    loop {
        let job = match jobs.recv_timeout(IDLE) {
            Ok(job) => job,
            Err(RecvTimeoutError::Timeout) => {
                // Told by the next job, or by `Tcp::lost`.
                let _ = attempt(&mut |_| tree.links.look());
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        match job {
            Job::Together(what, mut values, answer) => {
                let bytes = values.bytes().len();
                let words = format_args!("{} of {}", what.name(), machine::size(bytes));
                let _span = trace::span(Lane::Communication, words);
                let done = attempt(&mut |piece| tree.perform(what, values.bytes_mut(), piece));
                let _ = answer.send(done.map(|()| values));
            }
            Job::Exchange(mine, answer) => {
                let _exchange = trace::span(Lane::Communication, "hosts exchange");
                let mut all = Vec::new();
                let done = attempt(&mut |_| tree.gather(&mine).map(|found| all = found));
                let _ = answer.send(done.map(|()| all));
            }
            Job::Leave(cause, answer) => {
                let _ = attempt(&mut |_| Err(Fault::of_ours(&cause[..])));
                let _ = answer.send(());
            }
        }
    }
}

fn gone(_: mpsc::RecvError) -> Error {
    Error::Fault("the thread that communicates ended: an error of ours".into())
}

impl<B: Backend> Comm<B> for Tcp<B> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn begin(&self, backend: &B, stream: Stream, what: Collective, values: Mut<'_, B>) -> Result<Ticket<B>> {
        let (gives, gets) = match what {
            Collective::Sum => (true, true),
            Collective::SumTo(rank) => (true, rank == self.rank),
            Collective::CopyFrom(rank) => (rank == self.rank, rank != self.rank),
        };
        assert!(values.dtype() == DType::F64 || matches!(what, Collective::CopyFrom(_)), "sums of {}", values.dtype());
        let bytes = values.len() * values.dtype().size();
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let mut host = match spare.iter().position(|host| host.bytes().len() == bytes) {
            Some(at) => spare.swap_remove(at),
            None => backend.host(bytes)?,
        };
        drop(spare);
        if gives {
            backend.download(stream, values.as_ref(), &mut host, 0);
            backend.synchronize(&backend.record(stream))?;
        }
        Ok(Ticket::Answer(self.ask(|answer| Job::Together(what, host, answer)), gets))
    }

    fn finish(&self, backend: &B, stream: Stream, ticket: Ticket<B>, values: Mut<'_, B>) -> Result<()> {
        let Ticket::Answer(answer, gets) = ticket else { return Ok(()) };
        let waiting = trace::span(Lane::Host, "wait for other ranks");
        let host = answer.recv().map_err(gone)??;
        drop(waiting);
        if gets {
            backend.upload(stream, &host, 0..host.bytes().len(), values);
            backend.synchronize(&backend.record(stream))?;
        }
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(host);
        Ok(())
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.ask(|answer| Job::Exchange(mine.to_vec(), answer)).recv().map_err(gone)?
    }

    fn leave(&self, cause: &str) {
        *self.leaving.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause.into());
        let _ = self.ask(|answer| Job::Leave(cause.into(), answer)).recv_timeout(LAST_WORDS);
    }
}
