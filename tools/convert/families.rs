//! The tensors of each family as `transformers` names and shapes them.

use crate::layout::{Foreign, Part, Source};
use mupscale::{
    Error, Result,
    dims::Width,
    model::spec::{DecoderSpec, FeedForward, Positions, Scaling},
    ops::norm::NormKind,
};

/// Which linear layers have biases on their side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Q, K and V.
    pub qkv: bool,
    /// Attention's output.
    pub output: bool,
    /// The MLP.
    pub mlp: bool,
}

/// Factors that a model without multipliers carries in its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fold {
    /// On the token embedding.
    pub embedding: f64,
    /// On queries: W_q and its bias, or the gain of the query norm.
    pub query: f64,
    /// On what attention and MLP add to the residual stream.
    pub branch: f64,
    /// On the norm at the end, gain and bias.
    pub end: f64,
}

impl Fold {
    /// Nothing is folded.
    pub const NONE: Self = Self { embedding: 1.0, query: 1.0, branch: 1.0, end: 1.0 };

    /// The factors by which a model of this kind computes what ours does: theirs scales scores by 1/√head_dim, and
    /// nothing else.
    pub fn new(spec: &DecoderSpec, scaling: &Scaling) -> Self {
        let head_dim = spec.dims.get(Width::HeadDim) as f64;
        let base = scaling.reference(&spec.dims).get(Width::HeadDim) as f64;
        let embedding = spec.alphas.embedding;
        // A tied readout would multiply the logits by the embedding's factor.
        let tied = if spec.tied { embedding } else { 1.0 };
        Self {
            embedding,
            query: spec.alphas.attention * (base / head_dim).sqrt(),
            branch: spec.alphas.residual,
            end: spec.readout_scale(scaling) / tied,
        }
    }
}

/// Whether a model's parts are those of GPT-2, whatever it is called.
pub fn is_gpt2(spec: &DecoderSpec) -> Result<bool> {
    match (spec.norm, spec.positions, spec.feed_forward) {
        (NormKind::Layer, Positions::Learned, FeedForward::Plain { .. }) if !spec.qk_norm => Ok(true),
        (NormKind::Rms, Positions::Rope { .. }, FeedForward::Gated) if !spec.norm_bias => Ok(false),
        _ => {
            let why = "its parts are neither those of a GPT-2 nor those of a Llama, so no stock model computes it";
            Err(Error::config("model", &spec.arch, why))
        }
    }
}

/// The tensors of a Llama or one of its kin, which differ in biases and Q/K norm.
pub fn llama(spec: &DecoderSpec, biases: Biases, fold: Fold) -> Vec<Foreign> {
    let sizes = Sizes::of(spec);
    let Sizes { residual, ffn, queries, keys, head_dim } = sizes;
    let matrix = |name: String, ours: String, outputs, inputs, scale| {
        Foreign::new(name + ".weight", Some(inputs), false, vec![Part::scaled(ours + ".weight", outputs, scale)])
    };
    let vector = |name: String, ours: String, size, scale| {
        Foreign::new(name, None, false, vec![Part::scaled(ours, size, scale)])
    };
    let bias = |name: String, ours: String, size, scale, have: bool| {
        let part = if have { Part::scaled(ours + ".bias", size, scale) } else { Part::zeros(size) };
        Foreign::new(name + ".bias", None, false, vec![part])
    };
    let mut all = vec![matrix("model.embed_tokens".into(), "embedding".into(), spec.vocab, residual, fold.embedding)];
    let query = if spec.qk_norm { 1.0 } else { fold.query };
    for i in 0..spec.layers {
        let here = |part: &str| format!("model.layers.{i}.{part}");
        let ours = |part: &str| format!("blocks.{i}.{part}");
        all.push(vector(here("input_layernorm.weight"), ours("norm1.weight"), residual, 1.0));
        for (part, outputs, scale) in [("q", queries, query), ("k", keys, 1.0), ("v", keys, 1.0)] {
            let names = (here(&format!("self_attn.{part}_proj")), ours(&format!("attention.{part}")));
            all.push(matrix(names.0.clone(), names.1.clone(), outputs, residual, scale));
            if biases.qkv {
                all.push(bias(names.0, names.1, outputs, scale, spec.qkv_bias));
            }
        }
        if spec.qk_norm {
            for (part, scale) in [("q", fold.query), ("k", 1.0)] {
                let name = here(&format!("self_attn.{part}_norm.weight"));
                all.push(vector(name, ours(&format!("attention.{part}_norm.weight")), head_dim, scale));
            }
        }
        let output = (here("self_attn.o_proj"), ours("attention.o"));
        all.push(matrix(output.0.clone(), output.1.clone(), residual, queries, fold.branch));
        if biases.output {
            all.push(bias(output.0, output.1, residual, fold.branch, spec.bias));
        }
        all.push(vector(here("post_attention_layernorm.weight"), ours("norm2.weight"), residual, 1.0));
        let parts = [("gate", ffn, residual, 1.0), ("up", ffn, residual, 1.0), ("down", residual, ffn, fold.branch)];
        for (part, outputs, inputs, scale) in parts {
            let names = (here(&format!("mlp.{part}_proj")), ours(&format!("mlp.{part}")));
            all.push(matrix(names.0.clone(), names.1.clone(), outputs, inputs, scale));
            if biases.mlp {
                all.push(bias(names.0, names.1, outputs, scale, spec.bias));
            }
        }
    }
    all.push(vector("model.norm.weight".into(), "norm_f.weight".into(), residual, fold.end));
    if !spec.tied {
        all.push(matrix("lm_head".into(), "readout".into(), spec.vocab, residual, 1.0));
    }
    all
}

/// The tensors of a GPT-2. `transposed`: matrices are stored `[inputs, outputs]`, as `transformers` does.
pub fn gpt2(spec: &DecoderSpec, fold: Fold, prefix: &str, transposed: bool) -> Result<Vec<Foreign>> {
    let sizes = Sizes::of(spec);
    let Sizes { residual, ffn, queries, head_dim, .. } = sizes;
    if queries != residual {
        let why = format!(
            "GPT-2 needs residual = heads × head_dim, which is {} × {head_dim} = {queries}: it has no size of a head of \
             its own",
            spec.dims.heads()
        );
        return Err(Error::config("model.residual", residual, why));
    }
    let group = spec.dims.get(Width::Group);
    let keys = |name: String| {
        let source = Source::Row { name, scale: 1.0, times: group, run: if group > 1 { head_dim } else { 1 } };
        Part { outputs: queries, source }
    };
    let vector = |name: String, ours: String, size, scale, have: bool| {
        let part = if have { Part::scaled(ours, size, scale) } else { Part::zeros(size) };
        Foreign::new(name, None, false, vec![part])
    };
    let layer = |name: String, ours: String, outputs, inputs, scale| {
        let matrix = vec![Part::scaled(format!("{ours}.weight"), outputs, scale)];
        [
            Foreign::new(format!("{name}.weight"), Some(inputs), transposed, matrix),
            vector(format!("{name}.bias"), format!("{ours}.bias"), outputs, scale, spec.bias),
        ]
    };
    let norm = |name: String, ours: &str, scale| {
        [
            vector(format!("{name}.weight"), format!("{ours}.weight"), residual, scale, true),
            vector(format!("{name}.bias"), format!("{ours}.bias"), residual, scale, spec.norm_bias),
        ]
    };
    let table = |name: &str, ours: &str, outputs, scale| {
        let parts = vec![Part::scaled(format!("{ours}.weight"), outputs, scale)];
        Foreign::new(format!("{name}.weight"), Some(residual), false, parts)
    };
    let mut all = vec![
        table(&format!("{prefix}wte"), "embedding", spec.vocab, fold.embedding),
        table(&format!("{prefix}wpe"), "positions", spec.context, 1.0),
    ];
    for i in 0..spec.layers {
        let here = |part: &str| format!("{prefix}h.{i}.{part}");
        let ours = |part: &str| format!("blocks.{i}.{part}");
        all.extend(norm(here("ln_1"), &ours("norm1"), 1.0));
        let weights = vec![
            Part::scaled(ours("attention.q.weight"), queries, fold.query),
            keys(ours("attention.k.weight")),
            keys(ours("attention.v.weight")),
        ];
        all.push(Foreign::new(here("attn.c_attn.weight"), Some(residual), transposed, weights));
        let biases = match spec.qkv_bias {
            true => vec![
                Part::scaled(ours("attention.q.bias"), queries, fold.query),
                keys(ours("attention.k.bias")),
                keys(ours("attention.v.bias")),
            ],
            false => vec![Part::zeros(3 * queries)],
        };
        all.push(Foreign::new(here("attn.c_attn.bias"), None, false, biases));
        all.extend(layer(here("attn.c_proj"), ours("attention.o"), residual, queries, fold.branch));
        all.extend(norm(here("ln_2"), &ours("norm2"), 1.0));
        all.extend(layer(here("mlp.c_fc"), ours("mlp.up"), ffn, residual, 1.0));
        all.extend(layer(here("mlp.c_proj"), ours("mlp.down"), residual, ffn, fold.branch));
    }
    all.extend(norm(format!("{prefix}ln_f"), "norm_f", fold.end));
    if !spec.tied {
        all.push(table("lm_head", "readout", spec.vocab, 1.0));
    }
    Ok(all)
}

/// Sizes that tensors have.
struct Sizes {
    residual: usize,
    ffn: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
}

impl Sizes {
    fn of(spec: &DecoderSpec) -> Self {
        let get = |width| spec.dims.get(width);
        let head_dim = get(Width::HeadDim);
        Self {
            residual: get(Width::Residual),
            ffn: get(Width::Ffn),
            queries: spec.dims.heads() * head_dim,
            keys: get(Width::KvHeads) * head_dim,
            head_dim,
        }
    }
}

/// Tensors that stock checkpoints carry beside the weights: constants, and a readout that is the embedding.
pub fn is_constant(name: &str) -> bool {
    name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || name.ends_with("rotary_emb.inv_freq")
}
