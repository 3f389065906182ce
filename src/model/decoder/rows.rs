//! The decoder's parameters: its table and where each part of a block finds its rows.

use super::super::{
    param::{Init, Kind, Span, Table, TableBuilder},
    spec::{DecoderSpec, FeedForward, Positions},
};
use crate::dims::{
    Axis,
    Width::{self, Ffn, Group, HeadDim, KvHeads, Residual},
};

/// A weight and, if it has one, its bias.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Weight, or gain of a norm.
    pub weight: Span,
    /// Bias.
    pub bias: Option<Span>,
}

/// Rows of one block.
#[derive(Clone, Debug)]
pub struct BlockRows {
    /// Norm before attention.
    pub norm1: Layer,
    /// Q, K and V, glued.
    pub qkv: Layer,
    /// Gains of Q and K norm.
    pub qk_norm: Option<(Span, Span)>,
    /// Attention's output.
    pub output: Layer,
    /// Norm before the MLP.
    pub norm2: Layer,
    /// Up, or gate and up, glued.
    pub up: Layer,
    /// Down.
    pub down: Layer,
}

/// Rows of a decoder.
#[derive(Clone, Debug)]
pub struct DecoderRows {
    /// Token embedding.
    pub embedding: Span,
    /// Position embedding.
    pub positions: Option<Span>,
    /// Blocks.
    pub blocks: Vec<BlockRows>,
    /// Norm at the end.
    pub norm: Layer,
    /// Readout; the token embedding if tied.
    pub readout: Span,
}

/// The vocabulary's rows are a multiple of this in memory.
pub const VOCAB_MULTIPLE: usize = 64;

/// The table of a decoder. Groups: 0 the embeddings, 1 … the blocks, last the norm at the end and the readout.
pub fn table(spec: &DecoderSpec) -> (Table, DecoderRows) {
    let mut t = TableBuilder::new(&spec.dims);
    let residual = Axis::widths(&[Residual], &spec.dims);
    let vocab = Axis::fixed("vocab", spec.vocab);
    let normal = Init::Normal(spec.init_std);
    let embedding = t.row("embedding.weight", Kind::Embedding, vec![vocab.clone(), residual.clone()], normal);
    t.pad(&embedding, VOCAB_MULTIPLE);
    let positions = (spec.positions == Positions::Learned).then(|| {
        let axes = vec![Axis::fixed("context", spec.context), residual.clone()];
        t.row("positions.weight", Kind::Embedding, axes, normal)
    });
    let blocks = (0..spec.layers).map(|i| block(&mut t, spec, i)).collect();
    t.next_group();
    let norm = norm(&mut t, "norm_f", spec);
    let readout = if spec.tied {
        embedding.clone()
    } else {
        let readout = t.row("readout.weight", Kind::Readout, vec![vocab, residual], normal);
        t.pad(&readout, VOCAB_MULTIPLE);
        readout
    };
    (t.build(), DecoderRows { embedding, positions, blocks, norm, readout })
}

fn block(t: &mut TableBuilder, spec: &DecoderSpec, i: usize) -> BlockRows {
    t.next_group();
    let dims = &spec.dims;
    let (residual, ffn) = (&[Residual][..], &[Ffn][..]);
    let (heads, keys) = (&[KvHeads, Group, HeadDim][..], &[KvHeads, HeadDim][..]);
    let name = |part: &str| format!("blocks.{i}.{part}");
    let norm1 = norm(t, &name("norm1"), spec);
    let parts = [("attention.q", heads), ("attention.k", keys), ("attention.v", keys)];
    let qkv = stacked(t, spec, &parts.map(|(part, axis)| (name(part), axis)), residual, spec.qkv_bias);
    let qk_norm = spec.qk_norm.then(|| {
        let mut gain = |part| t.row(name(part), Kind::Vector, vec![Axis::widths(&[HeadDim], dims)], Init::Ones);
        (gain("attention.q_norm.weight"), gain("attention.k_norm.weight"))
    });
    let output = stacked(t, spec, &[(name("attention.o"), residual)], heads, spec.bias);
    let norm2 = norm(t, &name("norm2"), spec);
    let up = match spec.feed_forward {
        FeedForward::Plain { .. } => stacked(t, spec, &[(name("mlp.up"), ffn)], residual, spec.bias),
        FeedForward::Gated => stacked(t, spec, &[(name("mlp.gate"), ffn), (name("mlp.up"), ffn)], residual, spec.bias),
    };
    let down = stacked(t, spec, &[(name("mlp.down"), residual)], ffn, spec.bias);
    BlockRows { norm1, qkv, qk_norm, output, norm2, up, down }
}

fn norm(t: &mut TableBuilder, name: &str, spec: &DecoderSpec) -> Layer {
    let axis = vec![Axis::widths(&[Residual], &spec.dims)];
    let weight = t.row(format!("{name}.weight"), Kind::Vector, axis.clone(), Init::Ones);
    let bias = spec.norm_bias.then(|| t.row(format!("{name}.bias"), Kind::Vector, axis, Init::Zeros));
    Layer { weight, bias }
}

/// Linear layers with the same input, stacked along their outputs: one matrix in memory, one GEMM.
fn stacked(
    t: &mut TableBuilder,
    spec: &DecoderSpec,
    parts: &[(String, &[Width])],
    input: &[Width],
    bias: bool,
) -> Layer {
    let axis = |widths| Axis::widths(widths, &spec.dims);
    let mut weight: Option<Span> = None;
    for (name, output) in parts {
        let axes = vec![axis(output), axis(input)];
        let row = t.row(format!("{name}.weight"), Kind::Hidden, axes, Init::Normal(spec.init_std));
        weight = Some(weight.map_or(row.clone(), |first| first.start..row.end));
    }
    let weight = t.glue(weight.unwrap_or_default());
    let bias = bias.then(|| {
        let mut first: Option<Span> = None;
        for (name, output) in parts {
            let row = t.row(format!("{name}.bias"), Kind::Vector, vec![axis(output)], Init::Zeros);
            first.get_or_insert(row);
        }
        t.glue(first.unwrap_or_default())
    });
    Layer { weight, bias }
}
