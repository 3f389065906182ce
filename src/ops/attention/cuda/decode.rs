//! Attention of few queries with many keys.

use super::{AttentionShape, HeadShape, Strided};
use crate::{
    DType,
    backend::{
        Mut, Ref,
        cuda::{Cuda, Launch, kernels},
    },
};

kernels! { "attention_decode":
    NAMED attention_decode(
        partials: Mut, q: Ref, k: Ref, v: Ref, first_key: Option<Ref>, q_stride: u64, q_rows: u64, k_stride: u64,
        k_rows: u64, v_stride: u64, v_rows: u64, heads: u32, group: u32, head_dim: u32, queries: u32, keys: u32,
        lanes: u32, scale: f32,
    );
    NAMED attention_decode_join(out: Mut, log_sum_exp: Mut, partials: Ref, splits: u32, head_dim: u32);
}

/// Most queries of a sequence for which this is meant: a tile has 64 or more, and a quarter of a group of four heads
/// reads keys and values once.
pub(super) const FEW: usize = 4;
/// Queries of a group's heads that a block has at once, keys of a split, threads of a block: the kernel has the same.
const ROWS: usize = 4;
const SPLIT: usize = 128;
const THREADS: u32 = 128;

impl Cuda {
    /// [`super::Attention::attention`] for at most [`FEW`] queries.
    pub(super) fn attention_of_few(
        &self,
        out: Mut<'_, Self>,
        log_sum_exp: Mut<'_, Self>,
        q: Strided<'_, Self>,
        k: Strided<'_, Self>,
        v: Strided<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    ) {
        let AttentionShape { heads: HeadShape { kv_heads, group, head_dim }, batch, queries, keys, scale } = shape;
        let (heads, splits) = (kv_heads * group, keys.div_ceil(SPLIT));
        let mut partials = self.workspace(DType::F32, batch * queries * heads * splits * (head_dim + 2));
        let lanes = head_dim.div_ceil(self.piece()).next_power_of_two().min(32);
        let launch = Launch::blocks(batch * kv_heads * (queries * group).div_ceil(ROWS) * splits).threads(THREADS);
        attention_decode(
            self,
            launch,
            partials.reborrow(),
            q.view,
            k.view,
            v.view,
            first_key,
            q.stride as u64,
            q.rows as u64,
            k.stride as u64,
            k.rows as u64,
            v.stride as u64,
            v.rows as u64,
            heads as u32,
            group as u32,
            head_dim as u32,
            queries as u32,
            keys as u32,
            lanes as u32,
            scale as f32,
        );
        let launch = Launch::blocks(batch * queries * heads).threads(THREADS);
        attention_decode_join(self, launch, out, log_sum_exp, partials.as_ref(), splits as u32, head_dim as u32);
    }
}
