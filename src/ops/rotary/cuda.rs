//! RoPE on a GPU.

use super::{HeadShape, Rotary, Rotation};
use crate::{
    DType,
    backend::{
        Mut,
        cuda::{Cuda, Launch, kernels, warps},
    },
};

kernels! { "rotary":
    NAMED rotary(
        qkv: Mut, table: Ref, heads: u32, half: u32, width: u32, sequence: u32, first_position: u32, backward: u32,
    );
}

impl Rotary for Cuda {
    fn rotate(&self, qkv: Mut<'_, Self>, rotation: Rotation<'_, Self>, shape: HeadShape, backward: bool) {
        let Rotation { table, sequence, start } = rotation;
        let (width, half) = (shape.row(), shape.head_dim / 2);
        assert!(qkv.len().is_multiple_of(width) && 2 * half == shape.head_dim && table.dtype() == DType::F32);
        let heads = (shape.queries() + shape.keys()) / shape.head_dim;
        let launch = Launch::blocks(qkv.len() / width).threads(warps(heads * half.div_ceil(self.piece())).min(256));
        let (heads, half, width, backward) = (heads as u32, half as u32, width as u32, u32::from(backward));
        rotary(self, launch, qkv, table, heads, half, width, sequence as u32, start as u32, backward);
    }
}
