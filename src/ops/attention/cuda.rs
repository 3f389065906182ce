//! Attention on a GPU: portable kernels for tensor cores (bf16) or plain multiplications (f32).

mod decode;

use super::{Attention, AttentionShape, HeadShape, Strided};
use crate::{
    DType,
    backend::{
        Backend, Mut, Ref,
        cuda::{Cuda, Launch, kernels},
    },
};

kernels! { "attention":
    NAMED attention_forward(
        out: Mut, log_sum_exp: Mut, q: Ref, k: Ref, v: Ref, first_key: Option<Ref>, q_stride: u64, q_rows: u64,
        k_stride: u64, k_rows: u64, v_stride: u64, v_rows: u64, heads: u32, group: u32, head_dim: u32, queries: u32,
        keys: u32, scale: f32,
    );
}

/// Kernels of attention_backward.cu.
mod backward {
    use super::kernels;

    kernels! { "attention_backward":
        NAMED attention_backward_inner(
            saved: Mut, out: Ref, dout: Ref, log_sum_exp: Ref, first_key: Option<Ref>, batch: u32, heads: u32,
            head_dim: u32, tokens: u32, padded: u32,
        );
        NAMED attention_backward_queries(
            dqkv: Mut, dout: Ref, qkv: Ref, saved: Ref, first_key: Option<Ref>, row: u64, width: u64, kv_width: u64,
            heads: u32, group: u32, head_dim: u32, tokens: u32, padded: u32, scale: f32,
        );
        NAMED attention_backward_keys(
            dqkv: Mut, dout: Ref, qkv: Ref, saved: Ref, first_key: Option<Ref>, row: u64, width: u64, kv_width: u64,
            heads: u32, group: u32, head_dim: u32, tokens: u32, padded: u32, scale: f32,
        );
    }
}

/// Head sizes that kernels are made for; others are padded with zeros to the next one.
const SIZES: [usize; 7] = [16, 32, 64, 96, 128, 192, 256];
/// Beyond this size registers do not hold dk and dv of a block's keys at once.
const BOTH: usize = 128;
/// Every tile's queries divide this: what is saved of them is padded to it.
const PADDING: usize = 128;
/// Floats that backward keeps of a query and head.
const SAVED: usize = 4;

/// kernels/attention.cuh has the same type, and the kernels' files the same tables.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    warps: usize,
    /// Blocks of 16 rows a warp.
    blocks: usize,
    columns: usize,
}

impl Tiles {
    /// Rows of a block of threads.
    fn rows(self) -> usize {
        16 * self.blocks * self.warps
    }

    fn launch(self, blocks: usize, shared: usize) -> Launch {
        Launch::blocks(blocks).threads(32 * self.warps as u32).shared(shared)
    }
}

/// TILES, BY_QUERY and BY_KEY of the kernels.
fn tiles(size: usize, compute: DType) -> [Tiles; 3] {
    let columns = |steps: &[(usize, usize)], least| {
        steps.iter().find(|&&(most, _)| size <= most).map_or(least, |&(_, columns)| columns)
    };
    let to = |most, high, low| if size <= most { high } else { low };
    if compute == DType::BF16 {
        [
            Tiles { warps: 4, blocks: to(128, 2, 1), columns: to(96, 64, 32) },
            Tiles { warps: 4, blocks: to(128, 2, 1), columns: to(192, 32, 16) },
            Tiles { warps: 4, blocks: to(64, 2, 1), columns: to(192, 32, 16) },
        ]
    } else {
        let (warps, passing) = (to(128, 4, 2), columns(&[(96, 32), (192, 16)], 8));
        [
            Tiles { warps: 4, blocks: to(96, 2, 1), columns: columns(&[(128, 32), (192, 16)], 8) },
            Tiles { warps, blocks: to(64, 2, 1), columns: passing },
            Tiles { warps, blocks: 1, columns: passing },
        ]
    }
}

/// The size that a head is padded to.
fn padded_size(head_dim: usize) -> usize {
    let size = SIZES.into_iter().find(|&size| head_dim <= size);
    size.unwrap_or_else(|| panic!("heads of {head_dim}: at most {} on a GPU", SIZES[SIZES.len() - 1]))
}

impl Cuda {
    fn attention_backward_inner<'a>(
        &'a self,
        out: Ref<'_, Self>,
        dout: Ref<'_, Self>,
        log_sum_exp: Ref<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    ) -> Mut<'a, Self> {
        let AttentionShape { heads: HeadShape { kv_heads, group, head_dim }, batch, queries: tokens, .. } = shape;
        let (heads, padded) = (kv_heads * group, tokens.next_multiple_of(PADDING));
        let items = batch * padded * heads;
        let mut saved = self.workspace(DType::F32, items * SAVED);
        let launch = Launch::blocks((items * head_dim.div_ceil(8).next_power_of_two()).div_ceil(256));
        let [batch, heads, head_dim, tokens, padded] = [batch, heads, head_dim, tokens, padded].map(|n| n as u32);
        backward::attention_backward_inner(
            self,
            launch,
            saved.reborrow(),
            out,
            dout,
            log_sum_exp,
            first_key,
            batch,
            heads,
            head_dim,
            tokens,
            padded,
        );
        saved
    }
}

impl Attention for Cuda {
    /// The largest template of the kernels.
    const LARGEST_HEAD: usize = 256;

    fn attention(
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
        let heads = kv_heads * group;
        assert!(queries <= keys && keys <= i32::MAX as usize && scale > 0.0, "attention of {shape:?}");
        assert!(out.len() == batch * queries * heads * head_dim && log_sum_exp.len() == batch * queries * heads);
        if out.is_empty() {
            return;
        }
        let size = padded_size(head_dim);
        if queries <= decode::FEW {
            return self.attention_of_few(out, log_sum_exp, q, k, v, first_key, shape);
        }
        let [tiles, ..] = tiles(size, self.compute());
        let shared = (tiles.rows() + 4 * tiles.columns) * size * self.compute().size();
        attention_forward(
            self,
            tiles.launch(batch * heads * queries.div_ceil(tiles.rows()), shared),
            out,
            log_sum_exp,
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
            scale as f32,
        );
    }

    fn attention_backward(
        &self,
        dqkv: Mut<'_, Self>,
        dout: Ref<'_, Self>,
        out: Ref<'_, Self>,
        log_sum_exp: Ref<'_, Self>,
        qkv: Ref<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    ) {
        assert_eq!(shape.queries, shape.keys, "backward is for whole sequences");
        let AttentionShape { heads: HeadShape { kv_heads, group, head_dim }, batch, queries: tokens, .. } = shape;
        let heads = kv_heads * group;
        assert!(tokens <= i32::MAX as usize && shape.scale > 0.0, "attention of {shape:?}");
        assert!(dqkv.len() == batch * tokens * shape.heads.row() && qkv.len() == dqkv.len());
        assert!(dout.len() == batch * tokens * shape.heads.queries() && out.len() == dout.len());
        if dqkv.is_empty() {
            return;
        }
        let saved = self.attention_backward_inner(out, dout, log_sum_exp, first_key, shape);
        let size = padded_size(head_dim);
        let [_, by_query, by_key] = tiles(size, self.compute());
        let shared = |tiles: Tiles, saved: usize| {
            (2 * tiles.rows() + 4 * tiles.columns) * size * self.compute().size() + saved * 4 * SAVED
        };
        let blocks = |tiles: Tiles, heads: usize| batch * heads * tokens.div_ceil(tiles.rows());
        let each = if size > BOTH { 2 } else { 1 };
        let by_query = by_query.launch(blocks(by_query, heads), shared(by_query, by_query.rows()));
        let by_key = by_key.launch(blocks(by_key, kv_heads) * each, shared(by_key, 2 * by_key.columns));
        let mut dqkv = dqkv;
        for (kernel, launch) in [
            (backward::attention_backward_queries as Pass, by_query),
            (backward::attention_backward_keys as Pass, by_key),
        ] {
            kernel(
                self,
                launch,
                dqkv.reborrow(),
                dout,
                qkv,
                saved.as_ref(),
                first_key,
                shape.heads.row() as u64,
                shape.heads.queries() as u64,
                shape.heads.keys() as u64,
                heads as u32,
                group as u32,
                head_dim as u32,
                tokens as u32,
                tokens.next_multiple_of(PADDING) as u32,
                shape.scale as f32,
            );
        }
    }
}

/// One of backward's passes.
type Pass = fn(
    &Cuda,
    Launch,
    Mut<'_, Cuda>,
    Ref<'_, Cuda>,
    Ref<'_, Cuda>,
    Ref<'_, Cuda>,
    Option<Ref<'_, Cuda>>,
    u64,
    u64,
    u64,
    u32,
    u32,
    u32,
    u32,
    u32,
    f32,
);
