//! Recording the work of a step once, and replaying it: one call instead of a thousand launches.
#![allow(unsafe_code, reason = "captures streams")]

use super::{Cuda, driver::cuda};
use crate::{
    Result,
    backend::{Backend, Stream},
    trace::Lane,
};
use cudarc::driver::sys;
use std::ptr;

/// Work to be replayed. The first run is eager, and brings everything into being that work needs (functions, algorithms,
/// scratch memory); the second is recorded; later ones replay it.
#[derive(Default)]
pub enum Graph {
    /// Not run yet.
    #[default]
    New,
    /// Ran once.
    Warm,
    /// Recorded.
    Ready(Recorded),
}

/// A graph that the driver can launch.
pub struct Recorded(sys::CUgraphExec);

// SAFETY: a graph may be launched from any thread, by one at a time: launching takes `&mut Graph`.
unsafe impl Send for Recorded {}

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: instantiated once, dropped once; launches under way finish first.
        let _ = cuda!(cuGraphExecDestroy(self.0));
    }
}

impl Cuda {
    /// See [`crate::backend::Backend::begin`].
    pub(super) fn begin_graph(&self, graph: &mut Graph) -> Result<bool> {
        self.bind()?;
        match graph {
            _ if self.options().eager => return Ok(true),
            Graph::New => return Ok(true),
            Graph::Warm => {
                let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                // SAFETY: a live stream that is not being captured.
                cuda!(cuStreamBeginCapture_v2(self.queue(Stream::Compute).raw, mode))?;
                self.clock.recording(true);
                return Ok(true);
            }
            Graph::Ready(recorded) => self.launch_graph(recorded)?,
        }
        Ok(false)
    }

    /// See [`crate::backend::Backend::end`].
    pub(super) fn end_graph(&self, graph: &mut Graph, worked: Result<()>) -> Result<()> {
        match graph {
            _ if self.options().eager => worked,
            Graph::New => worked.map(|()| *graph = Graph::Warm),
            Graph::Warm => {
                let recorded = self.end_capture(worked)?;
                self.launch_graph(&recorded)?;
                *graph = Graph::Ready(recorded);
                Ok(())
            }
            Graph::Ready(_) => unreachable!("replayed, so nothing was begun"),
        }
    }

    fn launch_graph(&self, recorded: &Recorded) -> Result<()> {
        let _span = self.span(Stream::Compute, Lane::Compute, "recorded work");
        // SAFETY: a live graph and a live stream.
        cuda!(cuGraphLaunch(recorded.0, self.queue(Stream::Compute).raw))
    }

    fn end_capture(&self, worked: Result<()>) -> Result<Recorded> {
        self.clock.recording(false);
        let worked = worked.and_then(|()| self.fault());
        let mut graph = ptr::null_mut();
        // SAFETY: the capture begun by `begin_graph`; ended also when the work failed, so that the stream can be used
        // again.
        let ended = cuda!(cuStreamEndCapture(self.queue(Stream::Compute).raw, &mut graph));
        worked.and(ended)?;
        let mut recorded = ptr::null_mut();
        // SAFETY: a captured graph; a plain out-parameter.
        let instantiated = cuda!(cuGraphInstantiateWithFlags(&mut recorded, graph, 0));
        // SAFETY: the graph is not needed once it is instantiated.
        let destroyed = cuda!(cuGraphDestroy(graph));
        instantiated.and(destroyed)?;
        Ok(Recorded(recorded))
    }
}
