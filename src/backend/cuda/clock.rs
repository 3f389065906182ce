//! When a GPU did what it was given, in the host's time: for a trace.

use super::{
    Cuda,
    driver::{Event, EventPool},
};
use crate::{
    Result,
    backend::{Backend, Stream},
    trace::Stamp,
};
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Events that tell times, and a point of which both the GPU's time and the host's are known.
#[derive(Default)]
pub(super) struct Clock {
    zero: OnceLock<Option<Zero>>,
    /// Whether work is being recorded as a graph: its events would tell nothing.
    recording: AtomicBool,
}

struct Zero {
    pool: Arc<EventPool>,
    point: Arc<(Event, Instant)>,
}

impl Clock {
    /// Says whether work is being recorded.
    pub(super) fn recording(&self, now: bool) {
        self.recording.store(now, Ordering::Relaxed);
    }
}

impl Cuda {
    /// See [`Backend::stamp`].
    pub(super) fn clock_stamp(&self, stream: Stream) -> Option<Stamp> {
        if self.clock.recording.load(Ordering::Relaxed) {
            return None;
        }
        // Without it there is no trace of the GPU, and nothing else is lost.
        let zero = self.clock.zero.get_or_init(|| self.clock_zero().ok()).as_ref()?;
        let event = Event::record(&zero.pool, self.queue(stream)).ok()?;
        let (point, context) = (zero.point.clone(), self.context.clone());
        Some(Stamp::Later(Box::new(move || {
            let seconds = event.seconds_since(&point.0, &context).ok()?;
            Some(point.1 + Duration::from_secs_f64(seconds.max(0.0)))
        })))
    }

    /// Waits until the GPU is idle: then its time is the host's, but for the microseconds of the call.
    fn clock_zero(&self) -> Result<Zero> {
        let pool = Arc::new(EventPool::timed());
        self.synchronize(&self.record(Stream::Compute))?;
        let event = Event::record(&pool, self.queue(Stream::Compute))?;
        self.synchronize(&event)?;
        Ok(Zero { pool, point: Arc::new((event, Instant::now())) })
    }
}
