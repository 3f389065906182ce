//! Elementwise optimizers on a GPU: one launch for all parameters, and one for the sums of their changes.

use super::{Arenas, Method, Optimizer};
use crate::{
    DType,
    backend::{
        Backend, Mut, Ref,
        cuda::{Cuda, Launch, kernels},
    },
    ops::{convert::tag, pieces::Pieces, stochastic},
};

kernels! { "optimizer":
    NAMED sgd(
        weights: Mut, master: Option<Mut>, first: Option<Mut>, moment_type: u32, gradients: Ref, gradient_type: u32,
        chunks: Mut, scalars: Ref, pieces: Ref, rows: Ref, rounding: u64, origin: u64, momentum: f64, dampening: f64,
        nesterov: u32,
    );
    NAMED adam(
        weights: Mut, master: Option<Mut>, first: Mut, second: Mut, maximum: Option<Mut>, moment_type: u32,
        gradients: Ref, gradient_type: u32, chunks: Mut, scalars: Ref, pieces: Ref, rows: Ref, rounding: u64,
        origin: u64, beta1: f64, beta2: f64, coupled: u32,
    );
    NAMED lion(
        weights: Mut, master: Option<Mut>, first: Mut, moment_type: u32, gradients: Ref, gradient_type: u32,
        chunks: Mut, scalars: Ref, pieces: Ref, rows: Ref, rounding: u64, origin: u64, beta1: f64, beta2: f64,
    );
    NAMED sum_chunks(partials: Mut, chunks: Ref, count: u32);
}

/// Blocks that share a piece, and leave a sum each.
const CHUNKS: usize = 8;

impl Optimizer for Cuda {
    fn update(
        &self,
        arenas: Arenas<'_, Self>,
        partials: Mut<'_, Self>,
        scalars: Ref<'_, Self>,
        pieces: &Pieces<Self>,
        method: Method,
    ) {
        let Arenas { weights, master, first, second, maximum, gradients } = arenas;
        let count = pieces.list.len();
        let moments = [&first, &second, &maximum].map(|moment| moment.as_ref().map(Mut::dtype));
        assert!(partials.len() == count && moments.iter().flatten().all(|dtype| Some(*dtype) == moments[0]));
        self.assert_types(gradients.dtype(), moments[0]);
        assert!(master.is_some() || weights.dtype() == DType::F32, "weights of {} need a master copy", weights.dtype());
        if count == 0 {
            return;
        }
        let mut sums = self.workspace(DType::F64, count * CHUNKS);
        let (launch, chunks) = (Launch::blocks(count * CHUNKS), sums.reborrow());
        let (list, rows) = (pieces.device_list.view(), pieces.device_rows.view());
        let (g, m) = (tag(gradients.dtype()), tag(moments[0].unwrap_or(DType::F32)));
        let [_, rounding] = stochastic::stream(0.0).key();
        match method {
            Method::Sgd { momentum, dampening, nesterov } => {
                let first = first.filter(|_| momentum != 0.0);
                assert!(first.is_some() || momentum == 0.0, "momentum without a moment");
                let nesterov = u32::from(nesterov);
                sgd(
                    self,
                    launch,
                    weights,
                    master,
                    first,
                    m,
                    gradients,
                    g,
                    chunks,
                    scalars,
                    list,
                    rows,
                    rounding,
                    pieces.origin,
                    momentum,
                    dampening,
                    nesterov,
                );
            }
            Method::Adam { beta1, beta2, coupled, amsgrad } => {
                let (Some(first), Some(second)) = (first, second) else { panic!("Adam without moments") };
                assert!(maximum.is_some() || !amsgrad, "amsgrad without a maximum");
                let (maximum, coupled) = (maximum.filter(|_| amsgrad), u32::from(coupled));
                adam(
                    self,
                    launch,
                    weights,
                    master,
                    first,
                    second,
                    maximum,
                    m,
                    gradients,
                    g,
                    chunks,
                    scalars,
                    list,
                    rows,
                    rounding,
                    pieces.origin,
                    beta1,
                    beta2,
                    coupled,
                );
            }
            Method::Lion { beta1, beta2 } => {
                let first = first.expect("Lion has a moment");
                lion(
                    self,
                    launch,
                    weights,
                    master,
                    first,
                    m,
                    gradients,
                    g,
                    chunks,
                    scalars,
                    list,
                    rows,
                    rounding,
                    pieces.origin,
                    beta1,
                    beta2,
                );
            }
        }
        sum_chunks(self, Launch::blocks(count.div_ceil(256)), partials, sums.as_ref(), count as u32);
    }
}

impl Cuda {
    /// Kernels of the update know gradients in f32, or in bf16 beside activations in bf16, and moments in either.
    pub(in crate::ops) fn assert_types(&self, gradient: DType, moment: Option<DType>) {
        let known = |dtype| dtype == DType::F32 || dtype == DType::BF16 && self.compute() == DType::BF16;
        assert!(known(gradient), "gradients of {gradient} beside activations of {}", self.compute());
        assert!(moment.is_none_or(|moment| matches!(moment, DType::F32 | DType::BF16)), "moments of {moment:?}");
    }
}
