//! The leader decides when a round begins and ends. It runs beside the agent of the node that hosts the store, so it is
//! never lost without the store.

use crate::{
    messages::{
        Cause, LOST, Node, Place, Round, STOPPED, Said, Step, Word, node_key, number_in, read, step_key, write,
    },
    options::{Conf, Nodes},
};
use mupscale::{
    Result,
    comm::store::{Client, Server},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    thread::sleep,
    time::{Duration, Instant},
};

/// After a failure the leader looks for a lost node, or for a more telling failure, for so long: it may explain this one.
const SETTLE: Duration = Duration::from_secs(1);

/// What a run's leader goes by.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How many nodes.
    pub nodes: Nodes,
    /// How long to wait for them.
    pub conf: Conf,
    /// Restarts after failures.
    pub max_restarts: usize,
    /// Pause between looks.
    pub interval: Duration,
    /// The run's name; with the round's number the token of the processes' store.
    pub run: String,
    /// Where that store listens.
    pub address: IpAddr,
}

/// Token of the store for the processes of a round.
pub fn token(run: &str, round: usize) -> String {
    format!("{run}/{round}")
}

enum Phase {
    /// Nodes gather; since when, and since when there are enough.
    Gathering { since: Instant, enough: Option<Instant> },
    /// A round runs.
    Running { places: Vec<Place>, ended: BTreeMap<usize, i32>, failure: Option<(Cause, Instant)> },
}

/// See the module.
pub struct Leader {
    rules: Rules,
    store: Client,
    phase: Phase,
    nodes: BTreeMap<usize, Node>,
    /// Agents that wait for a round, with a port that is free there.
    ready: BTreeMap<usize, u16>,
    /// Agents that were told to stop by a signal, and by which.
    leaving: BTreeMap<usize, i32>,
    /// Agents whose number another one has, since when, and whether they were told. For the time of a lease the other one
    /// may be a lost node, which this one replaces.
    twins: BTreeMap<usize, (Instant, bool)>,
    steps: usize,
    rounds: usize,
    restarts: usize,
    /// The store for the processes of the round, kept until the next one begins: they may need it to end well.
    served: Option<Server>,
}

impl Leader {
    /// A leader that speaks through `store`.
    pub fn new(rules: Rules, store: Client) -> Self {
        let phase = Phase::Gathering { since: Instant::now(), enough: None };
        Self {
            rules,
            store,
            phase,
            nodes: BTreeMap::new(),
            ready: BTreeMap::new(),
            leaving: BTreeMap::new(),
            twins: BTreeMap::new(),
            steps: 0,
            rounds: 0,
            restarts: 0,
            served: None,
        }
    }

    /// Leads until the run is over.
    pub fn lead(mut self) -> Result<()> {
        loop {
            self.hear()?;
            let over = match self.phase {
                Phase::Gathering { .. } => self.gather()?,
                Phase::Running { .. } => self.watch()?,
            };
            if over {
                return self.farewell();
            }
            sleep(self.rules.interval);
        }
    }

    /// Gives all agents the time to read the last step; each ends its lease when it has ended, so those that are still
    /// there are not those that have read it.
    fn farewell(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(5);
        let agents = |prefix: &str| -> Result<BTreeSet<_>> {
            Ok(self.store.keys(prefix)?.iter().filter_map(|key| number_in(key)).collect())
        };
        while !agents("node/")?.is_subset(&agents("read/")?) && Instant::now() < end {
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn decide(&mut self, step: &Step) -> Result<()> {
        self.steps += 1;
        self.store.set(&step_key(self.steps), &write(step))
    }

    fn over(&mut self, code: i32, why: String, lines: Vec<String>) -> Result<bool> {
        self.decide(&Step::Over { code, why, lines })?;
        Ok(true)
    }

    /// Takes in who is there and what was said.
    fn hear(&mut self) -> Result<()> {
        let keys = self.store.keys("node/")?;
        let alive: Vec<usize> = keys.iter().filter_map(|key| number_in(key)).collect();
        self.nodes.retain(|agent, _| alive.contains(agent));
        self.ready.retain(|agent, _| alive.contains(agent));
        self.leaving.retain(|agent, _| alive.contains(agent));
        for agent in alive {
            if !self.nodes.contains_key(&agent)
                && let Some(node) = self.store.look(&node_key(agent))?
            {
                self.nodes.insert(agent, read(&node)?);
            }
        }
        for key in self.store.keys("said/")? {
            let Some(said) = self.store.look(&key)? else { continue };
            self.store.delete(&key)?;
            self.listen(read(&said)?)?;
        }
        self.refuse_twins()
    }

    /// Refuses nodes whose number another one has and keeps.
    fn refuse_twins(&mut self) -> Result<()> {
        let older = |agent: usize, node: &Node| {
            let same =
                self.nodes.range(..agent).find(|(_, other)| node.number.is_some() && other.number == node.number);
            same.map(|(_, other)| {
                (agent, format!("--node-rank {} was given to {}", node.number.unwrap_or(0), other.name))
            })
        };
        let twins: BTreeMap<_, _> = self.nodes.iter().filter_map(|(agent, node)| older(*agent, node)).collect();
        self.twins.retain(|agent, _| twins.contains_key(agent));
        for (agent, why) in twins {
            let (since, told) = self.twins.entry(agent).or_insert_with(|| (Instant::now(), false));
            if since.elapsed() > self.rules.conf.lease && !std::mem::replace(told, true) {
                self.decide(&Step::Refuse { agent, why })?;
            }
        }
        Ok(())
    }

    fn listen(&mut self, Said { by, word }: Said) -> Result<()> {
        match (word, &mut self.phase) {
            (Word::Ready { port }, _) => drop(self.ready.insert(by, port)),
            (Word::Signal(signal), _) => {
                if ![libc::SIGUSR1, libc::SIGUSR2].contains(&signal) {
                    self.leaving.insert(by, signal);
                }
                self.decide(&Step::Signal(signal, by))?;
            }
            (Word::Ended { round, code }, Phase::Running { ended, .. }) if round == self.rounds => {
                ended.insert(by, code);
            }
            (Word::Failed { round, cause }, Phase::Running { failure, .. }) if round == self.rounds => {
                let (first, _) = failure.get_or_insert((cause.clone(), Instant::now()));
                if cause.weight > first.weight {
                    *first = cause;
                }
            }
            // Of a round that is over.
            (Word::Ended { .. } | Word::Failed { .. }, _) => {}
        }
        Ok(())
    }

    /// Agents that would take part in a round, in the order of their ranks: by number, or the host first and then as
    /// they came.
    fn candidates(&self) -> Vec<usize> {
        let mut agents: Vec<_> = self.ready.keys().copied().filter(|agent| !self.leaving.contains_key(agent)).collect();
        agents.retain(|agent| self.nodes.contains_key(agent) && !self.twins.contains_key(agent));
        agents.sort_by_key(|agent| (self.nodes[agent].number, !self.nodes[agent].host, *agent));
        agents
    }

    fn gather(&mut self) -> Result<bool> {
        let host_leaves = self.leaving.keys().any(|agent| self.nodes.get(agent).is_some_and(|node| node.host));
        if let Some(&signal) = self.leaving.values().next().filter(|_| host_leaves || !self.elastic()) {
            return self.over(128 + signal, format!("stopped by {}", signal_name(signal)), vec![]);
        }
        let (agents, Nodes { min, max }) = (self.candidates(), self.rules.nodes);
        let Phase::Gathering { since, enough } = &mut self.phase else { return Ok(false) };
        if agents.len() >= min {
            let patience = enough.get_or_insert_with(Instant::now).elapsed();
            if agents.len() >= max || patience >= self.rules.conf.last_call {
                self.begin(&agents[..agents.len().min(max)])?;
            }
            return Ok(false);
        }
        *enough = None;
        if since.elapsed() < self.rules.conf.join {
            return Ok(false);
        }
        let names: Vec<_> = self.nodes.values().map(|node| node.name.as_str()).collect();
        let why = format!(
            "{} of {min} nodes came within {:.0} s ({}): start the others, or wait longer with --rdzv-conf join_timeout=SECONDS",
            agents.len(),
            self.rules.conf.join.as_secs_f64(),
            names.join(", ")
        );
        self.over(LOST, why, vec![])
    }

    fn begin(&mut self, agents: &[usize]) -> Result<()> {
        self.rounds += 1;
        let (mut places, mut world) = (Vec::new(), 0);
        for &agent in agents {
            let Node { name, address, processes, .. } = &self.nodes[&agent];
            places.push(Place { agent, node: format!("{name} ({address})"), first: world });
            world += processes;
        }
        let address = SocketAddr::new(self.rules.address, 0).to_string();
        let served = Server::start(&address, &token(&self.rules.run, self.rounds))?;
        let round = Round {
            number: self.rounds,
            places: places.clone(),
            world,
            master: (self.nodes[&agents[0]].address, self.ready[&agents[0]]),
            store: served.address().to_string(),
            restarts: self.restarts,
        };
        self.served = Some(served);
        self.ready.retain(|agent, _| !agents.contains(agent));
        self.phase = Phase::Running { places, ended: BTreeMap::new(), failure: None };
        self.decide(&Step::Begin(round))
    }

    /// Whether nodes may come and go.
    fn elastic(&self) -> bool {
        self.rules.nodes.min < self.rules.nodes.max
    }

    fn watch(&mut self) -> Result<bool> {
        let Phase::Running { places, ended, failure } = &self.phase else { return Ok(false) };
        let gone = |place: &&Place| !self.nodes.contains_key(&place.agent) && !ended.contains_key(&place.agent);
        let lost = places.iter().find(gone).map(|place| format!("node {}, {},", place.agent, place.node));
        let (all, ended) = (ended.len() == places.len(), ended.clone());
        let failure = failure.as_ref().filter(|(_, since)| places.len() == 1 || since.elapsed() >= SETTLE).cloned();
        let (room, members) = (places.len() < self.rules.nodes.max, places.clone());

        let told = members.iter().find_map(|place| self.leaving.get(&place.agent));
        if let Some(&signal) = told
            && (all || failure.is_some() || lost.is_some())
        {
            let stays =
                |place: &&Place| self.nodes.contains_key(&place.agent) && !self.leaving.contains_key(&place.agent);
            let (staying, host) = (members.iter().filter(stays).count(), self.nodes.iter().find(|(_, node)| node.host));
            let goes_on = self.elastic()
                && staying >= self.rules.nodes.min
                && host.is_some_and(|(agent, _)| !self.leaving.contains_key(agent));
            if goes_on {
                return self.again("a node was told to leave".into());
            }
            let code = worst(&ended).or(failure.map(|(cause, _)| cause.code)).unwrap_or(0);
            let how = if code == 0 || code == STOPPED { "" } else { "; not all processes ended well" };
            return self.over(code, format!("stopped by {}{how}", signal_name(signal)), vec![]);
        }
        if let Some(node) = lost {
            let what = format!("{node} is lost: nothing is heard of its launcher");
            if self.elastic() {
                return self.again(what);
            }
            return self.fail(Cause { what, code: LOST, weight: 2, lines: vec![] });
        }
        if let Some((cause, _)) = failure {
            return self.fail(cause);
        }
        if all {
            let code = worst(&ended).unwrap_or(0);
            let why = if code == 0 { String::new() } else { format!("the processes stopped with exit code {code}") };
            return self.over(code, why, vec![]);
        }
        // Who has ended in part is not disturbed by newcomers.
        let newcomer = self.ready.keys().find(|agent| !self.leaving.contains_key(agent));
        if let Some(newcomer) = newcomer.filter(|_| room && ended.is_empty()) {
            let name = self.nodes.get(newcomer).map_or("a node", |node| node.name.as_str());
            return self.again(format!("{name} joins"));
        }
        Ok(false)
    }

    fn fail(&mut self, cause: Cause) -> Result<bool> {
        if self.restarts == self.rules.max_restarts {
            let after = match self.restarts {
                0 => String::new(),
                restarts => format!(", after {restarts} restarts"),
            };
            return self.over(cause.code, format!("{}{after}", cause.what), cause.lines);
        }
        self.restarts += 1;
        self.again(format!("{}; restart {} of {}", cause.what, self.restarts, self.rules.max_restarts))
    }

    fn again(&mut self, why: String) -> Result<bool> {
        self.phase = Phase::Gathering { since: Instant::now(), enough: None };
        self.decide(&Step::Again(why))?;
        Ok(false)
    }
}

/// The first code that is not 0; a real failure before a stop on request.
fn worst(ended: &BTreeMap<usize, i32>) -> Option<i32> {
    let codes = || ended.values().copied().filter(|code| *code != 0);
    codes().find(|code| *code != STOPPED).or(codes().next())
}

/// `SIGTERM`
pub fn signal_name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or(format!("signal {signal}"), Into::into)
}
