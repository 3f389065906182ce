//! Learning-rate schedules.

use crate::config::{ScheduleConfig, ScheduleKind};

/// The learning rate at step `step` (from 1) of `steps`, as a part of the top.
///
/// It rises linearly over `warmup` steps, reaching the top at step `warmup`, and then follows the schedule's form,
/// reaching `final` at the last step.
pub fn factor(schedule: &ScheduleConfig, step: u64, steps: u64) -> f64 {
    if step < schedule.warmup {
        return step as f64 / schedule.warmup as f64;
    }
    let fall = |start: u64| {
        let length = steps.saturating_sub(start).max(1) as f64;
        (step.saturating_sub(start) as f64 / length).min(1.0)
    };
    let down = |part: f64| 1.0 - (1.0 - schedule.end) * part;
    match schedule.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => down(fall(schedule.warmup)),
        ScheduleKind::Cosine => down((1.0 - (std::f64::consts::PI * fall(schedule.warmup)).cos()) / 2.0),
        ScheduleKind::Wsd => down(fall(steps - schedule.decay.unwrap_or(steps / 5).min(steps))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(kind: ScheduleKind, step: u64) -> f64 {
        factor(&ScheduleConfig { kind, warmup: 10, end: 0.1, decay: None }, step, 100)
    }

    #[test]
    fn schedules_meet_their_corners() {
        use ScheduleKind::{Constant, Cosine, Linear, Wsd};
        for kind in [Constant, Linear, Cosine, Wsd] {
            assert_eq!(at(kind, 5), 0.5);
            assert_eq!(at(kind, 10), 1.0);
            let end = if kind == Constant { 1.0 } else { 0.1 };
            assert!((at(kind, 100) - end).abs() < 1e-12);
        }
        assert!((at(Linear, 55) - 0.55).abs() < 1e-12);
        assert!((at(Cosine, 55) - 0.55).abs() < 1e-12);
        assert_eq!(at(Wsd, 80), 1.0);
        assert!((at(Wsd, 90) - 0.55).abs() < 1e-12);
    }
}
