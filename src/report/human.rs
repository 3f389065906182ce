//! Numbers as people read them, in few characters.

/// Decimal prefixes, each a thousand times the one before.
const PREFIXES: [&str; 9] = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];

/// Bytes with a binary prefix: `312.4 MiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        // 1023.95 and above would be printed as 1024.0.
        if value < 1023.95 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") }
}

/// A count with three significant digits and a decimal prefix: `7`, `45.2 k`, `1.20 M`.
pub fn count(x: f64) -> String {
    if !x.is_finite() || (x.fract() == 0.0 && x.abs() < 1000.0) {
        return x.to_string();
    }
    let (value, power) = prefixed(x);
    let decimals = (2 - power.digits).max(0) as usize;
    join(format!("{value:.decimals$}"), power.prefix)
}

/// A count a second: `45.2 k tok/s`.
pub fn rate(per_second: f64, unit: &str) -> String {
    format!("{} {unit}/s", count(per_second))
}

/// A duration in seconds: `12.3 s`, `1m 23s`, `2h 05m`, `3d 04h`; `-` when it is not known.
pub fn seconds(s: f64) -> String {
    if !s.is_finite() || s < 0.0 {
        return "-".into();
    }
    // From 59.95 on, one decimal would read 60.0.
    if s < 59.95 {
        return format!("{s:.1} s");
    }
    let whole = s.round() as u64;
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
    match (hours, days) {
        (0, _) => format!("{minutes}m {:02}s", whole % 60),
        (_, 0) => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

/// A quantity of any size with three significant digits: `0.512`, `12.3`, `1.00e-5`.
pub fn number(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return x.to_string();
    }
    let (_, exponent) = scientific(x, 2);
    if (-3..5).contains(&exponent) { format!("{x:.*}", (2 - exponent).max(0) as usize) } else { format!("{x:.2e}") }
}

/// The decimal prefix of a number and how many digits stand before its point, less one.
struct Power {
    prefix: &'static str,
    digits: i32,
}

/// `x` over its decimal prefix, chosen after rounding to three digits, so that 999,999 is 1.00 M.
fn prefixed(x: f64) -> (f64, Power) {
    let (mantissa, exponent) = scientific(x, 2);
    let group = exponent.div_euclid(3).clamp(0, PREFIXES.len() as i32 - 1);
    let digits = exponent - 3 * group;
    (mantissa * 10f64.powi(digits), Power { prefix: PREFIXES[group as usize], digits })
}

/// Mantissa and decimal exponent of a finite `x`, rounded to `decimals` places of the mantissa.
fn scientific(x: f64, decimals: usize) -> (f64, i32) {
    let text = format!("{x:.decimals$e}");
    text.split_once('e')
        .and_then(|(mantissa, exponent)| Some((mantissa.parse().ok()?, exponent.parse().ok()?)))
        .unwrap_or((x, 0))
}

/// The largest decimal prefix not above `magnitude`, and its factor: `("M", 1e6)` for 2,500,000.
pub(super) fn prefix_of(magnitude: f64) -> (&'static str, f64) {
    let (_, power) = prefixed(if magnitude.is_finite() { magnitude } else { 0.0 });
    let group = PREFIXES.iter().position(|p| *p == power.prefix).unwrap_or(0);
    (power.prefix, 10f64.powi(3 * group as i32))
}

/// A number and its prefix with one space between, or the number alone.
pub(super) fn join(number: String, prefix: &str) -> String {
    if prefix.is_empty() { number } else { format!("{number} {prefix}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_the_prefix_that_keeps_them_short() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (327_575_142, "312.4 MiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (80 << 30, "80.0 GiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn counts_keep_three_digits_and_round_into_the_next_prefix() {
        for (x, text) in [
            (7.0, "7"),
            (999.0, "999"),
            (1000.0, "1.00 k"),
            (45_230.0, "45.2 k"),
            (999_999.0, "1.00 M"),
            (123_456_789.0, "123 M"),
            (0.0123, "0.0123"),
            (6.5e18, "6.50 E"),
            (-1500.0, "-1.50 k"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(count(x), text);
        }
        assert_eq!(rate(45_230.0, "tok"), "45.2 k tok/s");
    }

    #[test]
    fn durations_use_their_two_largest_units() {
        for (s, text) in [
            (0.04, "0.0 s"),
            (59.96, "1m 00s"),
            (83.2, "1m 23s"),
            (3599.6, "1h 00m"),
            (7500.0, "2h 05m"),
            (273_600.0, "3d 04h"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(seconds(s), text);
        }
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (x, text) in [
            (0.0, "0"),
            (0.512_34, "0.512"),
            (12.36, "12.4"),
            (1e-3, "0.00100"),
            (1e-5, "1.00e-5"),
            (99_940.0, "99940"),
        ] {
            assert_eq!(number(x), text);
        }
    }
}
