//! Losses and gradients on a GPU.

use super::{Decision, Gradient};
use crate::{
    DType,
    backend::{
        Mut, Ref,
        cuda::{Cuda, Launch, kernels},
    },
    ops::{convert::tag, pieces::Pieces},
};

kernels! { "gradient":
    PLAIN tally(scalars: Mut, losses: Ref, targets: Ref, rows: u64);
    PLAIN accumulate(target: Mut, target_type: u32, source: Ref, source_type: u32, len: u64, add: u32);
    PLAIN square_norms(partials: Mut, gradients: Ref, gradient_type: u32, pieces: Ref, rows: Ref);
    PLAIN decide(scalars: Mut, partials: Ref, pieces: Ref, count: u32, clip: f64, nominal: f64, halt: u32);
    PLAIN finish_update(scalars: Mut, partials: Ref, count: u32);
}

/// Threads of a kernel over many blocks, and elements that each takes.
const THREADS: u32 = 512;
const PER_THREAD: usize = 4;

impl Gradient for Cuda {
    fn tally(&self, scalars: Mut<'_, Self>, losses: Ref<'_, Self>, targets: Ref<'_, Self>) {
        assert_eq!(losses.len(), targets.len());
        tally(self, Launch::blocks(1).threads(1024), scalars, losses, targets, targets.len() as u64);
    }

    fn accumulate(&self, target: Mut<'_, Self>, source: Ref<'_, Self>, add: bool) {
        assert_eq!(target.len(), source.len());
        let (len, target_type) = (target.len(), tag(target.dtype()));
        let launch = Launch::blocks(len.div_ceil(THREADS as usize * PER_THREAD)).threads(THREADS);
        let source_type = tag(source.dtype());
        accumulate(self, launch, target, target_type, source, source_type, len as u64, u32::from(add));
    }

    fn square_norms(&self, partials: Mut<'_, Self>, gradients: Ref<'_, Self>, pieces: &Pieces<Self>) {
        assert!(matches!(gradients.dtype(), DType::F32 | DType::BF16) && partials.len() == pieces.list.len());
        if !pieces.list.is_empty() {
            let (launch, gradient_type) = (Launch::blocks(pieces.list.len()).threads(THREADS), tag(gradients.dtype()));
            let (list, rows) = (pieces.device_list.view(), pieces.device_rows.view());
            square_norms(self, launch, partials, gradients, gradient_type, list, rows);
        }
    }

    fn decide(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>, pieces: &Pieces<Self>, decision: Decision) {
        let (list, count) = (pieces.device_list.view(), pieces.list.len() as u32);
        let Decision { clip, nominal, halt } = decision;
        decide(self, Launch::blocks(1), scalars, partials, list, count, clip, nominal, u32::from(halt));
    }

    fn finish_update(&self, scalars: Mut<'_, Self>, partials: Ref<'_, Self>) {
        finish_update(self, Launch::blocks(1), scalars, partials, partials.len() as u32);
    }
}
