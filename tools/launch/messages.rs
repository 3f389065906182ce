//! What the agents of the nodes and their leader tell each other through the store.
//!
//! An agent holds the key `node/ID` with a lease and puts messages under `said/NUMBER`, numbered by a counter of the
//! store, so their order is that in which they were sent. The leader reads and removes them, and answers with the steps
//! `step/1`, `step/2`, …, which every agent follows, also those that came late or wait for a place.

use mupscale::{Error, Result, comm::store::Client};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::net::IpAddr;

/// Exit code of a process that stopped because it was asked to and saved its work: it is not started again.
pub const STOPPED: i32 = 75;
/// Exit code of a launcher that lost the others.
pub const LOST: i32 = 3;

/// A node, as its agent describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its host's name.
    pub name: String,
    /// Where other nodes reach it.
    pub address: IpAddr,
    /// Its --node-rank, where nodes have numbers.
    pub number: Option<usize>,
    /// Processes that it starts.
    pub processes: usize,
    /// Whether the store lives in it.
    pub host: bool,
}

/// The first process that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// In words, with rank, process and host.
    pub what: String,
    /// Its exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// How telling it is: a signal says more than a code, and [`LOST`] may mean that another rank was lost.
    pub weight: u8,
    /// Its last lines.
    pub lines: Vec<String>,
}

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Word {
    /// No process runs; `port` is free on this node.
    Ready {
        /// For a program that wants to listen.
        port: u16,
    },
    /// All processes of the round ended, none of them in failure; the first code that is not 0.
    Ended {
        /// The round.
        round: usize,
        /// The code.
        code: i32,
    },
    /// A process failed.
    Failed {
        /// The round.
        round: usize,
        /// How.
        cause: Cause,
    },
    /// This node was sent a signal.
    Signal(i32),
}

/// A word with its speaker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// The agent.
    pub by: usize,
    /// What it said.
    pub word: Word,
}

/// A node's part of a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// The agent.
    pub agent: usize,
    /// Its node in words.
    pub node: String,
    /// Rank of its first process.
    pub first: usize,
}

/// All processes, started together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From 1.
    pub number: usize,
    /// Nodes in the order of their ranks.
    pub places: Vec<Place>,
    /// Processes.
    pub world: usize,
    /// Address and free port of the first node.
    pub master: (IpAddr, u16),
    /// A store for the processes of this round, `HOST:PORT`.
    pub store: String,
    /// Restarts after a failure so far.
    pub restarts: usize,
}

/// What the leader decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Step {
    /// Start.
    Begin(Round),
    /// Pass a signal on; the agent that got it has done so already.
    Signal(i32, usize),
    /// This agent has no place in the run, and ends.
    Refuse {
        /// The agent.
        agent: usize,
        /// Why.
        why: String,
    },
    /// End all processes and say when you are ready for another round.
    Again(String),
    /// End all processes, and then yourself.
    Over {
        /// With this code.
        code: i32,
        /// Why; empty if all went well.
        why: String,
        /// The failed process's last lines.
        lines: Vec<String>,
    },
}

/// The lease of an agent.
pub fn node_key(agent: usize) -> String {
    format!("node/{agent:06}")
}

/// The number in a key such as [`node_key`]'s.
pub fn number_in(key: &str) -> Option<usize> {
    key.rsplit('/').next()?.parse().ok()
}

/// A decision of the leader, numbered from 1.
pub fn step_key(number: usize) -> String {
    format!("step/{number:06}")
}

/// Tells the leader.
pub fn say(store: &Client, by: usize, word: Word) -> Result<()> {
    let number = store.add("words", 1)?;
    store.set(&format!("said/{number:09}"), &write(&Said { by, word }))
}

/// A message as bytes.
pub fn write(message: &impl Serialize) -> Vec<u8> {
    // The types above hold nothing that JSON cannot.
    serde_json::to_vec(message).unwrap_or_default()
}

/// A message from bytes.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let why =
        |e| Error::Fault(format!("a message that this launcher does not know ({e}): run one version on all nodes"));
    serde_json::from_slice(bytes).map_err(why)
}
