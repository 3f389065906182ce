//! The scale of one axis of a chart and where its ticks stand.

use super::human;

/// A range of values laid over an axis, linearly or by logarithm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// An axis over `low..=high`; a range of no width is widened. With `log`, both are positive.
    pub(super) fn new(low: f64, high: f64, log: bool) -> Self {
        if high > low {
            return Self { low, high, log };
        }
        match log {
            true => Self { low: low / 2.0, high: low * 2.0, log },
            false => Self { low: low - low.abs().max(1.0) / 2.0, high: low + low.abs().max(1.0) / 2.0, log },
        }
    }

    /// The axis with `share` of its length added below and above.
    pub(super) fn padded(self, share: f64) -> Self {
        if self.log {
            let factor = (self.high / self.low).powf(share);
            return Self { low: self.low / factor, high: self.high * factor, ..self };
        }
        let room = (self.high - self.low) * share;
        Self { low: self.low - room, high: self.high + room, ..self }
    }

    /// Where `value` lies: 0 at the low end, 1 at the high end, beyond them outside.
    pub(super) fn fraction(&self, value: f64) -> f64 {
        let along = |v: f64| if self.log { v.log10() } else { v };
        (along(value) - along(self.low)) / (along(self.high) - along(self.low))
    }

    /// Values to mark, with their labels: at least two where the range allows it, at most nine.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        if !self.log {
            return self.linear_ticks();
        }
        let decades = (self.high / self.low).log10();
        let (mantissas, every): (&[u32], i32) = match decades {
            d if d < 0.7 => return self.linear_ticks(),
            d if d < 2.5 => (&[1, 2, 5], 1),
            d => (&[1], (d / 7.0).ceil() as i32),
        };
        let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        exponents
            .filter(|exponent| exponent.rem_euclid(every) == 0)
            .flat_map(|exponent| mantissas.iter().map(move |m| f64::from(*m) * 10f64.powi(exponent)))
            .filter(|value| (self.low..=self.high).contains(value))
            .map(|value| (value, label(value, value, value)))
            .collect()
    }

    /// Multiples of 1, 2 or 5 times a power of ten.
    fn linear_ticks(&self) -> Vec<(f64, String)> {
        let rough = (self.high - self.low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * 0.65).unwrap_or(rough);
        let largest = self.low.abs().max(self.high.abs());
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        (first..=last).map(|i| i as f64 * step).map(|value| (value, label(value, step, largest))).collect()
    }
}

/// The label of a tick: `step` fixes the decimals, `largest` the decimal prefix that all labels of the axis share.
fn label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if largest.abs() < 1e-3 {
        let order = |v: f64| (v.abs().log10() + 1e-9).floor();
        let decimals = (order(value) - order(step)).max(0.0) as usize;
        return format!("{value:.decimals$e}");
    }
    let (prefix, factor) = human::prefix_of(largest);
    // A hair above, so that 0.1 counts as one decimal and not two.
    let decimals = (-(step / factor).log10() - 1e-9).ceil().max(0.0) as usize;
    human::join(format!("{:.decimals$}", value / factor), prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64, log: bool) -> Vec<String> {
        Axis::new(low, high, log).ticks().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn linear_ticks_are_round_and_share_a_prefix() {
        assert_eq!(labels(0.0, 2.1e6, false), ["0", "0.5 M", "1.0 M", "1.5 M", "2.0 M"]);
        assert_eq!(labels(2.95, 3.62, false), ["3.0", "3.1", "3.2", "3.3", "3.4", "3.5", "3.6"]);
        assert_eq!(labels(0.0, 900.0, false), ["0", "200", "400", "600", "800"]);
        assert_eq!(labels(0.0, 1.3e-4, false), ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1.0e-4", "1.2e-4"]);
        assert_eq!(labels(-1.0, 1.0, false), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
    }

    #[test]
    fn logarithmic_ticks_are_decades_or_their_one_two_five() {
        assert_eq!(labels(1e9, 2e15, true), ["1 G", "10 G", "100 G", "1 T", "10 T", "100 T", "1 P"]);
        assert_eq!(labels(0.8, 60.0, true), ["1", "2", "5", "10", "20", "50"]);
        assert_eq!(labels(1e-3, 0.06, true), ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05"]);
        assert_eq!(labels(1e-6, 3e-5, true), ["1e-6", "2e-6", "5e-6", "1e-5", "2e-5"]);
        assert_eq!(labels(2.0, 4.0, true), ["2.0", "2.5", "3.0", "3.5", "4.0"]);
    }

    #[test]
    fn a_range_without_width_still_has_ticks_inside() {
        for log in [false, true] {
            let axis = Axis::new(3.0, 3.0, log);
            assert!((axis.fraction(3.0) - 0.5).abs() < 1e-12);
            assert!(!axis.ticks().is_empty());
        }
    }

    #[test]
    fn fractions_run_from_zero_to_one() {
        let axis = Axis::new(1.0, 100.0, true);
        assert_eq!((axis.fraction(1.0), axis.fraction(10.0), axis.fraction(100.0)), (0.0, 0.5, 1.0));
        let padded = Axis::new(0.0, 10.0, false).padded(0.1);
        assert!((padded.fraction(-1.0)).abs() < 1e-12 && (padded.fraction(11.0) - 1.0).abs() < 1e-12);
    }
}
