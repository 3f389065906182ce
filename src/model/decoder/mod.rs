//! The decoder-only transformer, by composition: `gpt2` and `llama` choose its parts (see [`DecoderSpec`]).
//!
//! Block: x ← x + α·O(attention(rope(qk_norm(QKV(norm1(x)))))); x ← x + α·down(f(up(norm2(x)))). The add is fused with
//! the norm behind it, across the border of blocks. Forward and backward are written by hand and proved by central
//! differences in f64 (`tests/gradients.rs`).

mod activations;
mod backward;
mod forward;
mod generate;
mod rows;

pub use activations::{ActivationSlots, Activations, Recompute};
pub use generate::Generator;
pub use rows::{BlockRows, DecoderRows, Layer, VOCAB_MULTIPLE, table};

use super::{
    MicroBatch, float_tensor,
    param::Table,
    spec::{DecoderSpec, Scaling},
};
use crate::{
    Result,
    backend::{Backend, Tensor},
    dims::Width,
    ops::{
        attention::{AttentionShape, HeadShape},
        head::ReadoutShape,
        linear::LinearShape,
        norm::NormShape,
        rotary::Rotation,
    },
};

/// A decoder at a shape: rows, constants of the forward pass, the table of rotary angles.
pub struct Decoder<B: Backend> {
    /// What it is.
    pub spec: DecoderSpec,
    /// Its parameters.
    pub table: Table,
    rows: DecoderRows,
    attention_scale: f64,
    readout_scale: f64,
    angles: Option<Tensor<B>>,
}

impl<B: Backend> Decoder<B> {
    /// Prepares a decoder on a device.
    pub fn new(backend: &B, spec: &DecoderSpec, scaling: &Scaling) -> Result<Self> {
        let (table, rows) = table(spec);
        let angles = match spec.positions.frequencies(spec.dims.get(Width::HeadDim)) {
            None => None,
            Some(frequencies) => {
                let angles = rotary_angles(spec.context, &frequencies);
                Some(float_tensor(backend, backend.statistics(), &angles)?)
            }
        };
        let (attention_scale, readout_scale) = (spec.attention_scale(scaling), spec.readout_scale(scaling));
        Ok(Self { spec: spec.clone(), table, rows, attention_scale, readout_scale, angles })
    }

    fn width(&self) -> usize {
        self.spec.dims.get(Width::Residual)
    }

    fn ffn(&self) -> usize {
        self.spec.dims.get(Width::Ffn)
    }

    fn heads(&self) -> HeadShape {
        let dims = &self.spec.dims;
        HeadShape {
            kv_heads: dims.get(Width::KvHeads),
            group: dims.get(Width::Group),
            head_dim: dims.get(Width::HeadDim),
        }
    }

    /// How tokens are turned that stand from position `start` on in sequences of this length; not at all where positions
    /// are learned.
    fn rotation(&self, sequence: usize, start: usize) -> Option<Rotation<'_, B>> {
        self.angles.as_ref().map(|angles| Rotation { table: angles.view(), sequence, start })
    }

    fn norm_shape(&self, rows: usize) -> NormShape {
        NormShape { rows, width: self.width(), kind: self.spec.norm, eps: self.spec.norm_eps }
    }

    fn linear_shape(&self, rows: usize, inputs: usize, outputs: usize) -> LinearShape {
        LinearShape { rows, inputs, outputs }
    }

    fn readout_shape(&self, rows: usize) -> ReadoutShape {
        let padded = self.table.rows[self.rows.readout.start].padded;
        ReadoutShape { rows, width: self.width(), classes: self.spec.vocab, padded, scale: self.readout_scale }
    }

    fn attention_shape(&self, micro: MicroBatch) -> AttentionShape {
        AttentionShape {
            heads: self.heads(),
            batch: micro.samples,
            queries: micro.length,
            keys: micro.length,
            scale: self.attention_scale,
        }
    }
}

/// (cos, sin) of position × frequency, positions × frequencies × 2.
fn rotary_angles(positions: usize, frequencies: &[f64]) -> Vec<f64> {
    let mut angles = Vec::with_capacity(positions * frequencies.len() * 2);
    for position in 0..positions {
        for frequency in frequencies {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            angles.extend([cos, sin]);
        }
    }
    angles
}
