//! RoPE on a GPU.

use super::{HeadShape, Rotary};
use crate::{
    DType,
    backend::{
        Mut, Ref,
        cuda::{Cuda, Launch, kernels, warps},
    },
};

kernels! { "rotary":
    NAMED rotary(
        qkv: Mut, table: Ref, heads: u32, half: u32, width: u32, sequence: u32, first_position: u32, backward: u32,
    );
}

impl Rotary for Cuda {
    fn rotate(
        &self,
        qkv: Mut<'_, Self>,
        table: Ref<'_, Self>,
        shape: HeadShape,
        rows: usize,
        sequence: usize,
        start: usize,
        backward: bool,
    ) {
        let (width, half) = (shape.row(), shape.head_dim / 2);
        assert!(qkv.len() == rows * width && 2 * half == shape.head_dim && table.dtype() == DType::F32);
        let heads = (shape.queries() + shape.keys()) / shape.head_dim;
        let launch = Launch::blocks(rows).threads(warps(heads * half.div_ceil(self.piece())).min(256));
        let (heads, half, width, backward) = (heads as u32, half as u32, width as u32, u32::from(backward));
        rotary(self, launch, qkv, table, heads, half, width, sequence as u32, start as u32, backward);
    }
}
