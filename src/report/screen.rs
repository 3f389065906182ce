//! A run under way as a screen of text: how far, the newest numbers, and the loss as a curve of braille dots.

use std::fmt::Write;

use super::{
    human,
    metrics::{Record, SampleRecord, StepRecord, ValidationRecord},
};

/// Columns left of the plot.
const LEFT: usize = 9;
/// Steps from which the speed follows.
const RECENT: usize = 50;

/// A run as far as its `metrics.jsonl` tells.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// For people.
    pub name: String,
    /// Steps that it shall make, if that is known.
    pub steps: Option<u64>,
    train: Vec<StepRecord>,
    held_out: Vec<ValidationRecord>,
    sample: Option<SampleRecord>,
}

impl Watched {
    /// A run of which nothing has been read.
    pub fn new(name: impl Into<String>, steps: Option<u64>) -> Self {
        Self { name: name.into(), steps, ..Self::default() }
    }

    /// Takes in a record that follows those before. What a resumed run makes again replaces what it made.
    pub fn push(&mut self, record: Record) {
        let step = record.step();
        match record {
            Record::Step(r) => {
                self.train.truncate(self.train.partition_point(|old| old.step < step));
                self.held_out.truncate(self.held_out.partition_point(|old| old.step < step));
                self.train.push(r);
            }
            Record::Validation(r) => {
                self.held_out.truncate(self.held_out.partition_point(|old| old.step < step));
                self.held_out.push(r);
            }
            // Of several prompts the first is shown.
            Record::Sample(r) if r.index == 0 => self.sample = Some(r),
            Record::Sample(_) => {}
        }
    }

    /// Whether the last step has been made.
    pub fn finished(&self) -> bool {
        self.steps.is_some_and(|steps| self.train.last().is_some_and(|last| last.step >= steps))
    }

    /// Seconds until the last step, at the newest steps' speed.
    fn left(&self) -> Option<f64> {
        let last = self.train.last()?;
        let first = &self.train[self.train.len().saturating_sub(RECENT)];
        let pace = (last.seconds - first.seconds) / last.step.checked_sub(first.step).filter(|n| *n > 0)? as f64;
        Some(self.steps?.saturating_sub(last.step) as f64 * pace)
    }

    /// The screen, at most `width` columns by `height` lines; `silent` are the seconds since the file changed.
    pub fn frame(&self, width: usize, height: usize, silent: f64) -> String {
        let mut lines = self.summary(silent);
        let rows = height.saturating_sub(lines.len() + 4);
        if rows >= 3 && width >= LEFT + 10 && !self.train.is_empty() {
            lines.push(String::new());
            lines.extend(self.plot(width - LEFT, rows));
        }
        let cut = |line: String| line.chars().take(width).collect::<String>() + "\n";
        lines.into_iter().take(height).map(cut).collect()
    }

    fn summary(&self, silent: f64) -> Vec<String> {
        let Some(last) = self.train.last() else { return vec![format!("{}  no step yet", self.name)] };
        let mut first = format!("{}  step {}", self.name, last.step);
        if let Some(steps) = self.steps {
            let _ = write!(first, "/{steps}  {:.0} %", 100.0 * last.step as f64 / steps.max(1) as f64);
        }
        let _ = write!(first, "  {} tokens", human::count(last.tokens as f64));
        match self.left() {
            _ if self.finished() => first += &format!("  done in {}", human::seconds(last.seconds)),
            Some(left) => first += &format!("  {} left", human::seconds(left)),
            None => {}
        }
        // Longer than steps take, but for the slowest.
        let step = last.seconds / last.step.max(1) as f64;
        if !self.finished() && silent > (20.0 * step).max(60.0) {
            first += &format!("  nothing new for {}: has it stopped?", human::seconds(silent));
        }
        let numbers = [
            format!("loss {:.4}", last.loss),
            format!("lr {}", human::number(last.lr)),
            format!("grad {}", human::number(last.grad_norm)),
            format!("update {}", human::number(last.update_norm)),
            human::rate(last.tokens_per_second, "tok"),
            human::bytes(last.memory),
        ];
        let mut lines = vec![first, numbers.join("  ")];
        if let Some(last) = self.held_out.last() {
            let best = self.held_out.iter().filter(|r| !r.loss.is_nan()).min_by(|a, b| a.loss.total_cmp(&b.loss));
            let best = best.map_or(String::new(), |b| format!("  best {:.4} at step {}", b.loss, b.step));
            lines.push(format!("held-out loss {:.4} at step {}{best}", last.loss, last.step));
        }
        if let Some(SampleRecord { step, prompt, text, .. }) = &self.sample {
            let line: Vec<_> = prompt.split_whitespace().chain(text.split_whitespace()).collect();
            // What would move the cursor has no place on a screen.
            let line = line.join(" ").replace(char::is_control, "");
            lines.push(format!("step {step} writes: {line}"));
        }
        lines
    }

    /// The training loss as dots, two across and four down in a character, with `o` for the held-out loss.
    fn plot(&self, columns: usize, rows: usize) -> Vec<String> {
        let (first, last) = (self.train[0].step, self.train[self.train.len() - 1].step);
        let across = |step: u64, dots: usize| {
            let share = (step.saturating_sub(first)) as f64 / (last - first).max(1) as f64;
            ((share * dots as f64) as usize).min(dots - 1)
        };
        let mut sums = vec![(0.0, 0u32); 2 * columns];
        for record in self.train.iter().filter(|r| r.loss.is_finite()) {
            let sum = &mut sums[across(record.step, 2 * columns)];
            *sum = (sum.0 + record.loss, sum.1 + 1);
        }
        let means: Vec<Option<f64>> = sums.iter().map(|&(sum, n)| (n > 0).then(|| sum / f64::from(n))).collect();
        let marks: Vec<(usize, f64)> = self
            .held_out
            .iter()
            .filter(|r| r.loss.is_finite() && r.step >= first)
            .map(|r| (across(r.step.min(last), columns), r.loss))
            .collect();
        let values = || means.iter().flatten().copied().chain(marks.iter().map(|m| m.1));
        let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return vec!["no loss was finite".into()];
        }
        let down = |value: f64, dots: usize| {
            let share = if high > low { (high - value) / (high - low) } else { 0.5 };
            ((share * dots as f64) as usize).min(dots - 1)
        };
        let mut cells = vec![vec!['\u{2800}'; columns]; rows];
        let mut before: Option<usize> = None;
        for (x, mean) in means.iter().enumerate() {
            let Some(mean) = mean else { continue };
            let y = down(*mean, 4 * rows);
            let from = before.unwrap_or(y);
            for y in from.min(y)..=from.max(y) {
                let cell = &mut cells[y / 4][x / 2];
                *cell = with_dot(*cell, x % 2, y % 4);
            }
            before = Some(y);
        }
        for (x, value) in marks {
            cells[down(value, rows)][x] = 'o';
        }
        let label = |row: usize| match row {
            0 => format!("{high:>width$.4} ┤", width = LEFT - 2),
            _ if row + 1 == rows => format!("{low:>width$.4} ┤", width = LEFT - 2),
            _ => format!("{:>width$} │", "", width = LEFT - 2),
        };
        let mut lines: Vec<String> =
            cells.into_iter().enumerate().map(|(row, cells)| label(row) + &String::from_iter(cells)).collect();
        lines.push(format!("{:>width$} └{}", "loss", "─".repeat(columns), width = LEFT - 2));
        let end = format!("step {last}");
        lines.push(format!("{:>LEFT$}{first}{end:>rest$}", "", rest = columns.saturating_sub(first.to_string().len())));
        lines
    }
}

/// A braille pattern with one more dot: dots 1, 2, 3, 7 are its left column, 4, 5, 6, 8 its right one.
fn with_dot(pattern: char, x: usize, y: usize) -> char {
    const BITS: [[u32; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
    char::from_u32(pattern as u32 | BITS[x][y]).unwrap_or(pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, loss: f64) -> Record {
        Record::Step(StepRecord {
            step,
            tokens: step * 100,
            loss,
            lr: 1e-3,
            grad_norm: 0.5,
            update_norm: 0.0625,
            tokens_per_second: 100.0,
            seconds: step as f64,
            memory: 1 << 20,
        })
    }

    fn held_out(step: u64, loss: f64) -> Record {
        Record::Validation(ValidationRecord { step, tokens: 0, loss, batches: 1, seconds: step as f64 })
    }

    fn falling(steps: u64) -> Watched {
        let mut run = Watched::new("base", Some(200));
        (1..=steps).for_each(|i| run.push(step(i, 5.0 - i as f64 * 0.01)));
        run
    }

    #[test]
    fn a_frame_says_how_far_and_how_well() {
        let mut run = falling(100);
        run.push(held_out(100, 4.25));
        let frame = run.frame(80, 20, 0.0);
        for part in
            ["step 100/200  50 %  10.0 k tokens  1m 40s left", "loss 4.0000", "held-out loss 4.2500", "100 tok/s", "o"]
        {
            assert!(frame.contains(part), "{part}: {frame}");
        }
        assert!(!run.finished() && !frame.contains("stopped"));
        assert!(run.frame(80, 20, 3600.0).contains("nothing new for 1h 00m"));
    }

    #[test]
    fn a_frame_fits_any_screen() {
        let run = falling(150);
        for (width, height) in [(80, 24), (200, 60), (30, 9), (10, 3), (1, 1), (0, 0)] {
            let frame = run.frame(width, height, 0.0);
            assert!(frame.lines().count() <= height, "{width} × {height}: {frame}");
            assert!(frame.lines().all(|line| line.chars().count() <= width), "{width} × {height}: {frame}");
        }
        assert_eq!(Watched::new("new", None).frame(80, 24, 0.0), "new  no step yet\n");
    }

    #[test]
    fn a_falling_loss_falls_on_the_screen() {
        let frame = falling(200).frame(40, 13, 0.0);
        let rows: Vec<&str> = frame.lines().filter(|l| l.contains('┤') || l.contains('│')).collect();
        let first_dot = |row: &str| row.chars().skip(LEFT).position(|c| c != '\u{2800}').unwrap();
        let starts: Vec<usize> = rows.iter().map(|row| first_dot(row)).collect();
        assert!(starts.len() >= 5 && starts.is_sorted() && starts[0] == 0, "{frame}");
    }

    #[test]
    fn steps_made_again_replace_those_before() {
        let mut run = falling(100);
        run.push(held_out(100, 4.0));
        run.push(step(50, f64::NAN));
        assert_eq!((run.train.len(), run.held_out.len()), (50, 0));
        assert!(run.frame(80, 24, 0.0).contains("step 50/200"));
    }

    #[test]
    fn dots_lie_where_unicode_says() {
        assert_eq!(with_dot('\u{2800}', 0, 0), '⠁');
        assert_eq!(with_dot('\u{2800}', 1, 3), '⢀');
        assert_eq!(with_dot('⠁', 1, 0), '⠉');
    }
}
