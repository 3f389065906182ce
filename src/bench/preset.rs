//! Models whose training step is measured.

use crate::{
    Result,
    config::{Config, ConfigText, DataShape, resolve_model},
    model::spec::Scaling,
    mup::Parametrization,
    state::Meaning,
};
use std::path::Path;

/// A model to measure, trained with AdamW and clipping on random tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// A proxy: GPT-2 of width 64, 4 layers, 4 heads, vocabulary 8,192, batch 8, context 256; 0.7 million parameters.
    #[value(alias = "cpu-w64")]
    W64,
    /// The same of width 128; 1.9 million.
    #[value(alias = "cpu-w128")]
    W128,
    /// The same of width 256; 5.3 million.
    #[value(alias = "cpu-w256")]
    W256,
    /// The same of width 512; 17 million.
    W512,
    /// GPT-2 small, context 1,024.
    #[value(name = "gpt2-124m")]
    Gpt2Small,
    /// GPT-2 medium.
    #[value(name = "gpt2-355m")]
    Gpt2Medium,
    /// GPT-2 large.
    #[value(name = "gpt2-774m")]
    Gpt2Large,
    /// GPT-2 XL.
    #[value(name = "gpt2-1.5b")]
    Gpt2Xl,
    /// Qwen2.5 0.5B, context 1,024.
    #[value(name = "qwen2.5-0.5b")]
    QwenHalf,
    /// Qwen2.5 1.5B.
    #[value(name = "qwen2.5-1.5b")]
    Qwen,
}

/// Sizes of a preset.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Residual width.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Key/value heads and hidden width of a llama; a GPT-2's heads are their own, its MLP is 4 times as wide.
    pub(super) llama: Option<(usize, usize)>,
}

impl Preset {
    /// The sizes.
    pub fn sizes(self) -> Sizes {
        let proxy = |width| Sizes { width, layers: 4, heads: 4, vocab: 8192, batch: 8, context: 256, llama: None };
        let gpt2 = |width, layers, batch| Sizes {
            width,
            layers,
            heads: width / 64,
            vocab: 50257,
            batch,
            context: 1024,
            llama: None,
        };
        let qwen = |width, layers, heads, ffn, batch| Sizes {
            width,
            layers,
            heads,
            vocab: 151_936,
            batch,
            context: 1024,
            llama: Some((2, ffn)),
        };
        match self {
            Self::W64 => proxy(64),
            Self::W128 => proxy(128),
            Self::W256 => proxy(256),
            Self::W512 => proxy(512),
            Self::Gpt2Small => gpt2(768, 12, 32),
            Self::Gpt2Medium => gpt2(1024, 24, 32),
            Self::Gpt2Large => gpt2(1280, 36, 24),
            Self::Gpt2Xl => Sizes { heads: 25, ..gpt2(1600, 48, 16) },
            Self::QwenHalf => qwen(896, 24, 14, 4864, 24),
            Self::Qwen => qwen(1536, 28, 12, 8960, 16),
        }
    }
}

impl Sizes {
    /// A configuration and a new model, with this many sequences in a micro-batch (0: the preset's own).
    pub fn model(self, batch: usize) -> Result<(Config, Meaning)> {
        let Self { width, layers, heads, context, .. } = self;
        let batch = if batch == 0 { self.batch } else { batch };
        let model = match self.llama {
            None => format!("arch = 'gpt2'\nkv_heads = {heads}\n"),
            Some((kv_heads, ffn)) => format!(
                "arch = 'llama'\nkv_heads = {kv_heads}\ngroup = {}\nffn = {ffn}\nqkv_bias = true\ntied = true\n\
                 rope_base = 1e6\nnorm_eps = 1e-6\n",
                heads / kv_heads
            ),
        };
        let text = format!(
            "run = 'bench'\nsteps = 1000000\n[data]\npath = 'bench'\n[batch]\nsize = {batch}\n\
             [optimizer]\nlr = 3e-4\nbetas = [0.9, 0.95]\nweight_decay = 0.1\nclip = 1.0\nclip_norm = 'plain'\n\
             [model]\n{model}layers = {layers}\nresidual = {width}\ncontext = {context}\n"
        );
        meaning(&text, self.vocab, Parametrization::Standard)
    }
}

/// A configuration, and a new model as it says.
pub(super) fn meaning(text: &str, vocab: usize, kind: Parametrization) -> Result<(Config, Meaning)> {
    let config = ConfigText::parse(text, &[], Path::new("bench"))?.resolve()?;
    let model = config.model.as_ref().expect("the text has a model");
    let spec = resolve_model(model, DataShape::Tokens { vocab })?;
    let scaling = Scaling::new(kind, spec.dims());
    let meaning = Meaning { spec, scaling, optimizer: config.optimizer.clone(), tokenizer: None };
    Ok((config, meaning))
}
