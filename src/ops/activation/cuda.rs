//! Activations on a GPU.

use super::{Activate, Activation};
use crate::backend::{
    Mut, Ref,
    cuda::{Cuda, Launch, kernels},
};

kernels! { "activation":
    NAMED activate(y: Mut, x: Ref, n: u64, kind: u32);
    NAMED activate_backward(d: Mut, x: Ref, n: u64, kind: u32);
    NAMED gate(y: Mut, gate_up: Ref, ffn: u32);
    NAMED gate_backward(dgate_up: Mut, dy: Ref, gate_up: Ref, ffn: u32);
}

/// Pieces that a thread takes of a vector.
const PIECES: usize = 2;

impl Activate for Cuda {
    fn activate(&self, y: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation) {
        let n = x.len();
        assert_eq!(y.len(), n);
        activate(self, over(self, n), y, x, n as u64, number(kind));
    }

    fn activate_backward(&self, d: Mut<'_, Self>, x: Ref<'_, Self>, kind: Activation) {
        let n = x.len();
        assert_eq!(d.len(), n);
        activate_backward(self, over(self, n), d, x, n as u64, number(kind));
    }

    fn gate(&self, y: Mut<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize) {
        assert_eq!(2 * y.len(), gate_up.len());
        let launch = Launch::pieces(y.len() / ffn, ffn.div_ceil(self.piece()));
        gate(self, launch, y, gate_up, ffn as u32);
    }

    fn gate_backward(&self, dgate_up: Mut<'_, Self>, dy: Ref<'_, Self>, gate_up: Ref<'_, Self>, ffn: usize) {
        assert!(dgate_up.len() == gate_up.len() && 2 * dy.len() == gate_up.len());
        let launch = Launch::pieces(dy.len() / ffn, ffn.div_ceil(self.piece()));
        gate_backward(self, launch, dgate_up, dy, gate_up, ffn as u32);
    }
}

/// Blocks over a vector.
fn over(cuda: &Cuda, n: usize) -> Launch {
    Launch::blocks(n.div_ceil(256 * PIECES * cuda.piece()))
}

/// The kind's number in the kernels.
fn number(kind: Activation) -> u32 {
    match kind {
        Activation::GeluTanh => 0,
        Activation::GeluExact => 1,
        Activation::Relu => 2,
    }
}
