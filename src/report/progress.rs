//! Progress on standard error: a bar on a terminal, a plain line every few seconds elsewhere.
//!
//! Nothing here can stop a run: what cannot be written to standard error is lost.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use super::{
    human,
    metrics::{StepRecord, ValidationRecord},
};

/// Time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// The bar of training: two lines, so that every field fits on 80 columns.
const STEP_BAR: &str = "{prefix}  {wide_bar:.cyan/dim}\n  {wide_msg}";

/// The bar of other work.
const WORK_BAR: &str = "{prefix}  {wide_bar:.cyan/dim}  {msg}";

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// A bar, redrawn in place.
    Bar,
    /// At most one line every ten seconds, and the last.
    Plain,
    /// Nothing, for `--json`.
    Quiet,
}

impl Show {
    /// Quiet if asked, else a bar if standard error is a terminal that can redraw, else plain lines.
    pub fn detect(quiet: bool) -> Self {
        let redraws = io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        match (quiet, redraws) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Bar,
            (false, false) => Self::Plain,
        }
    }
}

/// Progress of training: one call a step, the fields of `metrics.jsonl`. Dropping it prints the last state.
pub struct Progress {
    output: Output,
    label: String,
    total: u64,
    pace: Pace,
}

impl Progress {
    /// Training called `label` (its run, say `base`) that goes from `start_step` finished steps to `total_steps`.
    pub fn new(label: &str, total_steps: u64, start_step: u64, show: Show) -> Self {
        Self::to(Output::new(label, total_steps, STEP_BAR, show), label, total_steps, start_step)
    }

    fn to(output: Output, label: &str, total: u64, start: u64) -> Self {
        Self { output, label: label.into(), total, pace: Pace::from(start) }
    }

    /// Shows a finished step.
    pub fn step(&self, record: &StepRecord) {
        let fields = [
            format!("loss {:.4}", record.loss),
            format!("lr {}", human::number(record.lr)),
            format!("grad {}", human::number(record.grad_norm)),
            format!("update {}", human::number(record.update_norm)),
            human::rate(record.tokens_per_second, "tok"),
            human::bytes(record.memory),
        ];
        let amount = format!("step {}/{}  {}", record.step, self.total, self.pace.time(record.step, self.total));
        self.output.status(record.step, &amount, &fields.join("  "));
    }

    /// Prints the result of a validation as a line that stays.
    pub fn validation(&self, record: &ValidationRecord) {
        let ValidationRecord { step, loss, batches, .. } = record;
        self.line(&format!("step {step}/{}  validation loss {loss:.4} ({batches} batches)", self.total));
    }

    /// Prints a line that stays, with the label before it: a checkpoint written, a warning.
    pub fn line(&self, text: &str) {
        self.output.line(&format!("{}  {text}", self.label));
    }

    /// Prints the last state, if it was not. Dropping does the same.
    pub fn finish(self) {}
}

/// What a [`WorkProgress`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Things with this name, for example `documents`.
    Count(&'static str),
}

impl Unit {
    fn amount(self, n: u64) -> String {
        match self {
            Self::Bytes => human::bytes(n),
            Self::Count(name) => format!("{} {name}", human::count(n as f64)),
        }
    }
}

/// Progress of any other long work; may be shared between threads. Dropping it prints the last state.
pub struct WorkProgress {
    output: Output,
    unit: Unit,
    total: u64,
    done: Mutex<u64>,
    pace: Pace,
}

impl WorkProgress {
    /// Work called `label`, `total` units of it.
    pub fn new(label: &str, total: u64, unit: Unit, show: Show) -> Self {
        Self::to(Output::new(label, total, WORK_BAR, show), total, unit)
    }

    fn to(output: Output, total: u64, unit: Unit) -> Self {
        Self { output, unit, total, done: Mutex::new(0), pace: Pace::from(0) }
    }

    /// Counts `n` more units as done.
    pub fn advance(&self, n: u64) {
        // Held to the end, so that states are shown in the order of their counts.
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += n;
        let amount = format!("{} of {}", self.unit.amount(*done), self.unit.amount(self.total));
        let speed = self.unit.amount(self.pace.per_second(*done) as u64);
        let time = self.pace.time(*done, self.total);
        self.output.status(*done, &amount, &format!("{speed}/s  {time}"));
    }

    /// Prints the last state, if it was not. Dropping does the same.
    pub fn finish(self) {}
}

/// Speed since the start, from which the time left follows.
struct Pace {
    since: Instant,
    start: u64,
}

impl Pace {
    fn from(start: u64) -> Self {
        Self { since: Instant::now(), start }
    }

    /// Units a second since the start.
    fn per_second(&self, done: u64) -> f64 {
        done.saturating_sub(self.start) as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
    }

    /// Seconds until `total`; infinite before anything is done.
    fn left(&self, done: u64, total: u64) -> f64 {
        total.saturating_sub(done) as f64 / self.per_second(done)
    }

    /// The time left in words, or at the end the time taken.
    fn time(&self, done: u64, total: u64) -> String {
        match done < total {
            true => format!("{} left", human::seconds(self.left(done, total))),
            false => format!("in {}", human::seconds(self.since.elapsed().as_secs_f64())),
        }
    }
}

/// Where progress goes.
enum Output {
    Bar(Bar),
    Plain(Mutex<Plain>),
    Quiet,
}

impl Output {
    fn new(label: &str, total: u64, template: &str, show: Show) -> Self {
        match show {
            Show::Bar => Self::Bar(Bar::new(label, total, template, ProgressDrawTarget::stderr())),
            Show::Plain => Self::plain(label, Box::new(io::stderr()), PLAIN_INTERVAL),
            Show::Quiet => Self::Quiet,
        }
    }

    fn plain(label: &str, out: Box<dyn Write + Send>, every: Duration) -> Self {
        Self::Plain(Mutex::new(Plain { label: label.into(), out, every, last: None, pending: None }))
    }

    /// Replaces the state shown: how far (`position` as a number, `amount` in words) and the `fields` beside it.
    fn status(&self, position: u64, amount: &str, fields: &str) {
        match self {
            Self::Bar(bar) => bar.status(position, amount, fields),
            Self::Plain(plain) => plain.lock().unwrap_or_else(PoisonError::into_inner).status(amount, fields),
            Self::Quiet => {}
        }
    }

    /// Prints a line that stays.
    fn line(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.line(text),
            Self::Plain(plain) => plain.lock().unwrap_or_else(PoisonError::into_inner).line(text),
            Self::Quiet => {}
        }
    }
}

/// A bar and its label.
struct Bar {
    label: String,
    bar: ProgressBar,
}

impl Bar {
    fn new(label: &str, total: u64, template: &str, target: ProgressDrawTarget) -> Self {
        let style = ProgressStyle::with_template(template).expect("the templates are constants").progress_chars("━━─");
        let bar = ProgressBar::with_draw_target(Some(total), target)
            .with_style(style)
            .with_prefix(label.to_owned())
            .with_finish(ProgressFinish::Abandon);
        Self { label: label.into(), bar }
    }

    fn status(&self, position: u64, amount: &str, fields: &str) {
        self.bar.set_prefix(format!("{}  {amount}", self.label));
        self.bar.set_message(fields.to_owned());
        self.bar.set_position(position);
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(io::stderr(), "{text}");
        });
    }
}

/// Plain lines, not too many of them.
struct Plain {
    label: String,
    out: Box<dyn Write + Send>,
    every: Duration,
    last: Option<Instant>,
    /// The newest state, if it has not been printed.
    pending: Option<String>,
}

impl Plain {
    fn status(&mut self, amount: &str, fields: &str) {
        let text = format!("{}  {amount}  {fields}", self.label);
        if self.last.is_none_or(|last| last.elapsed() >= self.every) {
            self.last = Some(Instant::now());
            self.pending = None;
            self.line(&text);
        } else {
            self.pending = Some(text);
        }
    }

    fn line(&mut self, text: &str) {
        let _ = writeln!(self.out, "{text}").and_then(|()| self.out.flush());
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        if let Some(text) = self.pending.take() {
            self.line(&text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Keeps what is written to it.
    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Page {
        fn lines(&self) -> Vec<String> {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
        }

        fn output(&self, every: Duration) -> Output {
            Output::plain("base", Box::new(self.clone()), every)
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    /// What is said of a [`record`].
    const FIELDS: &str = "loss 4.2500  lr 0.00100  grad 0.500  update 0.0625  45.2 k tok/s  312.0 MiB";

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            tokens: step * 512,
            loss: 4.25,
            lr: 1e-3,
            grad_norm: 0.5,
            update_norm: 0.0625,
            tokens_per_second: 45_200.0,
            seconds: 1.0,
            memory: 312 << 20,
        }
    }

    #[test]
    fn plain_output_has_the_first_state_and_the_last() {
        let page = Page::default();
        let progress = Progress::to(page.output(HOUR), "base", 20, 0);
        (1..=20).for_each(|step| progress.step(&record(step)));
        assert_eq!(page.lines().len(), 1);
        progress.finish();
        let lines = page.lines();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("base  step 1/20  ") && lines[0].contains(" left  "), "{lines:?}");
        assert!(lines[1].starts_with("base  step 20/20  in ") && lines[1].ends_with(FIELDS), "{lines:?}");
    }

    #[test]
    fn a_state_already_printed_is_not_printed_again() {
        let page = Page::default();
        let progress = Progress::to(page.output(Duration::ZERO), "base", 3, 0);
        (1..=3).for_each(|step| progress.step(&record(step)));
        drop(progress);
        assert_eq!(page.lines().len(), 3);
    }

    #[test]
    fn validations_and_messages_are_lines_at_once() {
        let page = Page::default();
        let progress = Progress::to(page.output(HOUR), "base", 20, 0);
        progress.validation(&ValidationRecord { step: 10, tokens: 5120, loss: 3.5, batches: 8, seconds: 2.0 });
        progress.line("saved");
        assert_eq!(page.lines(), ["base  step 10/20  validation loss 3.5000 (8 batches)", "base  saved"]);
    }

    #[test]
    fn work_counts_over_threads_and_ends_with_the_whole() {
        let page = Page::default();
        let work = WorkProgress::to(page.output(HOUR), 8 << 20, Unit::Bytes);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| work.advance(1 << 20));
            }
        });
        work.finish();
        assert!(page.lines().last().unwrap().starts_with("base  8.0 MiB of 8.0 MiB  "), "{:?}", page.lines());
    }

    #[test]
    fn time_left_counts_from_where_the_run_resumed() {
        let since = Instant::now() - Duration::from_secs(1000);
        let pace = Pace { since, start: 100 };
        // Ten steps in a thousand seconds, and ninety to go; the machine may stall for a few seconds here.
        assert!((pace.left(110, 200) - 9000.0).abs() < 50.0);
        assert_eq!(pace.left(100, 200), f64::INFINITY);
        assert_eq!(pace.time(100, 200), "- left");
        assert!(pace.time(110, 200).starts_with("2h 30m") && pace.time(200, 200).starts_with("in 16m"));
    }

    #[test]
    fn the_bar_carries_the_same_fields() {
        let bar = Bar::new("base", 20, STEP_BAR, ProgressDrawTarget::hidden());
        let shown = bar.bar.clone();
        let progress = Progress::to(Output::Bar(bar), "base", 20, 0);
        progress.step(&record(20));
        assert_eq!(shown.position(), 20);
        assert!(shown.prefix().starts_with("base  step 20/20  in "), "{}", shown.prefix());
        assert_eq!(shown.message(), FIELDS);
    }

    #[test]
    fn quiet_is_quiet_whatever_the_terminal() {
        assert_eq!(Show::detect(true), Show::Quiet);
        assert_ne!(Show::detect(false), Show::Quiet);
    }
}
