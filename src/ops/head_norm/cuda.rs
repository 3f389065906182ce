//! Q/K norm on a GPU.

use super::HeadNorm;
use crate::{
    DType,
    backend::{
        Mut, Ref,
        cuda::{Cuda, Launch, kernels, warps},
    },
    ops::{attention::HeadShape, norm::add_up_partials, rotary::Rotation},
};

kernels! { "head_norm":
    NAMED head_norm_forward(
        out: Mut, statistics: Mut, qkv: Ref, q_gain: Ref, k_gain: Ref, table: Option<Ref>, sequence: u32,
        first_position: u32, query_heads: u32, key_heads: u32, size: u32, lanes: u32, eps: f32,
    );
    NAMED head_norm_backward(
        d: Mut, partials: Mut, qkv: Ref, statistics: Ref, q_gain: Ref, k_gain: Ref, table: Option<Ref>,
        sequence: u32, first_position: u32, rows: u64, rows_per_block: u32, query_heads: u32, key_heads: u32, size: u32, lanes: u32,
    );
}

/// Blocks that backward cuts the rows into, or fewer, and the fewest rows of a block: by the shape alone, so that results
/// do not depend on the device. Three blocks have the registers that they need of a multiprocessor, so that a GPU of 132 is
/// filled about twice.
const BLOCKS: usize = 768;
const BLOCK_ROWS: usize = 8;

/// Most threads of a block, forward and backward.
const FORWARD: u32 = 512;
const BACKWARD: u32 = 256;

/// Shared memory that a block has without asking for more: enough for 8 groups of a warp each on heads of 768 elements,
/// beyond which fewer groups fit.
const SHARED: usize = 48 << 10;

impl HeadNorm for Cuda {
    fn head_norm(
        &self,
        out: Mut<'_, Self>,
        statistics: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        rotation: Option<Rotation<'_, Self>>,
        shape: HeadShape,
        eps: f64,
    ) {
        let Heads { queries, keys, size, lanes } = Heads::new(self, shape, rotation.is_some());
        let (table, sequence, start) = places(rotation);
        assert!(out.len() == qkv.len() && q_gain.len() == size && k_gain.len() == size);
        let launch = Launch::blocks(qkv.len() / shape.row());
        let launch = launch.threads(warps((queries + 2 * keys) * lanes).min(FORWARD));
        let (queries, keys, size, lanes) = (queries as u32, keys as u32, size as u32, lanes as u32);
        let eps = eps as f32;
        head_norm_forward(
            self, launch, out, statistics, qkv, q_gain, k_gain, table, sequence, start, queries, keys, size, lanes, eps,
        );
    }

    fn head_norm_backward(
        &self,
        d: Mut<'_, Self>,
        dq_gain: Mut<'_, Self>,
        dk_gain: Mut<'_, Self>,
        qkv: Ref<'_, Self>,
        statistics: Ref<'_, Self>,
        q_gain: Ref<'_, Self>,
        k_gain: Ref<'_, Self>,
        rotation: Option<Rotation<'_, Self>>,
        shape: HeadShape,
    ) {
        let Heads { queries, keys, size, lanes } = Heads::new(self, shape, rotation.is_some());
        let (table, sequence, start) = places(rotation);
        assert!(d.len() == qkv.len() && q_gain.len() == size && k_gain.len() == size);
        let rows = qkv.len() / shape.row();
        let rows_per_block = rows.div_ceil(BLOCKS).max(BLOCK_ROWS);
        let blocks = rows.div_ceil(rows_per_block);
        // Each group of lanes has a row of sums for both gains.
        let group = 2 * size * DType::F32.size();
        let fitting = (SHARED / group * lanes / 32).max(1) as u32 * 32;
        let threads = warps((queries + keys) * lanes).min(BACKWARD).min(fitting);
        let launch = Launch::blocks(blocks).threads(threads).shared(threads as usize / lanes * group);
        let mut partials = self.workspace(DType::F32, blocks * 2 * size);
        head_norm_backward(
            self,
            launch,
            d,
            partials.reborrow(),
            qkv,
            statistics,
            q_gain,
            k_gain,
            table,
            sequence,
            start,
            rows as u64,
            rows_per_block as u32,
            queries as u32,
            keys as u32,
            size as u32,
            lanes as u32,
        );
        add_up_partials(self, dq_gain, Some(dk_gain), partials.as_ref(), size);
    }
}

/// What kernels take of a rotation: its table, the rows of a sequence, the first position.
fn places(rotation: Option<Rotation<'_, Cuda>>) -> (Option<Ref<'_, Cuda>>, u32, u32) {
    match rotation {
        Some(Rotation { table, sequence, start }) => {
            assert_eq!(table.dtype(), DType::F32);
            (Some(table), sequence as u32, start as u32)
        }
        None => (None, 1, 0),
    }
}

/// How many heads, their size, and the lanes that share one: a power of two, at most a warp.
struct Heads {
    queries: usize,
    keys: usize,
    size: usize,
    lanes: usize,
}

impl Heads {
    /// Where heads are `turned`, a lane has pieces of both halves.
    fn new(cuda: &Cuda, shape: HeadShape, turned: bool) -> Self {
        let size = shape.head_dim;
        assert!(!turned || size.is_multiple_of(2), "heads of {size} have no halves");
        let lanes = if turned { size / 2 } else { size }.div_ceil(cuda.piece()).next_power_of_two().min(32);
        Self { queries: shape.queries() / size, keys: shape.keys() / size, size, lanes }
    }
}
