//! A checkpoint of ours as a model for `transformers`.

use crate::{
    config::CONFIG,
    families::{self, Biases, Fold},
    layout::{Foreign, Rows},
    tensors::{Declared, TensorWriter, write_json},
};
use mupscale::{
    DType, Error, Result,
    checkpoint::Reader,
    dims::Width,
    model::spec::{DecoderSpec, FeedForward, Positions, RopeScaling, Scaling, Spec},
    ops::activation::Activation,
    upscale::Origin,
};
use serde_json::{Map, Value, json};
use std::{fs, path::Path};

/// How multipliers leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Style {
    /// Multiplied into weights: GPT-2, Llama, Qwen2 or Qwen3, whichever the parts are
    Fold,
    /// As Granite's multipliers, weights untouched
    Granite,
}

impl Rows for Reader {
    fn dtype(&self, name: &str) -> Result<DType> {
        Ok(self.tensor(name)?.dtype)
    }

    fn with(&self, name: &str, work: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.verify_tensor(name)?;
        let bytes = self.read(name, 0..self.tensor(name)?.shape.iter().product())?;
        work(&bytes);
        drop(bytes);
        self.release(name)
    }
}

/// What a checkpoint becomes.
pub struct Export {
    /// `model_type`.
    pub family: &'static str,
    /// Its tensors.
    pub tensors: Vec<Foreign>,
    /// Its configuration, but for the type of the elements.
    pub config: Map<String, Value>,
}

/// The decoder of a checkpoint; an mlp has no form elsewhere.
pub fn decoder(origin: &Origin) -> Result<&DecoderSpec> {
    match &origin.meaning.spec {
        Spec::Decoder(spec) => Ok(spec),
        Spec::Mlp(_) => Err(Error::file(origin.reader.dir(), "holds an mlp; only decoders (gpt2, llama) convert")),
    }
}

impl Export {
    /// Chooses family, tensors and configuration.
    pub fn new(spec: &DecoderSpec, scaling: &Scaling, style: Style) -> Result<Self> {
        match (families::is_gpt2(spec)?, style) {
            (true, Style::Fold) => Self::gpt2(spec, Fold::new(spec, scaling)),
            (true, Style::Granite) => {
                let why = "Granite is a Llama with multipliers, this is a GPT-2: use --style fold";
                Err(Error::config("--style", "granite", why))
            }
            (false, Style::Fold) => Self::llama(spec, Fold::new(spec, scaling)),
            (false, Style::Granite) => Self::granite(spec, scaling),
        }
    }

    fn gpt2(spec: &DecoderSpec, fold: Fold) -> Result<Self> {
        let FeedForward::Plain { activation } = spec.feed_forward else { unreachable!("a GPT-2, as was checked") };
        let residual = spec.dims.get(Width::Residual);
        let function = match activation {
            Activation::GeluTanh => "gelu_new",
            Activation::GeluExact => "gelu",
            Activation::Relu => "relu",
        };
        let config = json!({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": spec.vocab,
            "n_positions": spec.context, "n_ctx": spec.context, "n_embd": residual, "n_layer": spec.layers,
            "n_head": spec.dims.heads(), "n_inner": spec.dims.get(Width::Ffn), "activation_function": function,
            "layer_norm_epsilon": spec.norm_eps, "tie_word_embeddings": spec.tied,
            "initializer_range": spec.init_std, "bos_token_id": null, "eos_token_id": null,
        });
        let tensors = families::gpt2(spec, fold, "transformer.", true)?;
        Ok(Self { family: "gpt2", tensors, config: object(config) })
    }

    fn llama(spec: &DecoderSpec, fold: Fold) -> Result<Self> {
        let (family, class, biases) = match (spec.qk_norm, spec.qkv_bias, spec.bias) {
            (true, _, true) => {
                let why = "with Q/K norm makes this a Qwen3, whose MLP has no biases: no stock model computes it";
                return Err(Error::config("model.bias", true, why));
            }
            (true, qkv, false) => ("qwen3", "Qwen3ForCausalLM", Biases { qkv, output: qkv, mlp: false }),
            (false, true, false) => ("qwen2", "Qwen2ForCausalLM", Biases { qkv: true, output: false, mlp: false }),
            (false, _, bias) => ("llama", "LlamaForCausalLM", Biases { qkv: bias, output: bias, mlp: bias }),
        };
        let mut config = common(spec, family, class);
        if family != "qwen2" {
            config.insert("attention_bias".into(), biases.qkv.into());
        }
        if family == "llama" {
            config.insert("mlp_bias".into(), biases.mlp.into());
        }
        Ok(Self { family, tensors: families::llama(spec, biases, fold), config })
    }

    fn granite(spec: &DecoderSpec, scaling: &Scaling) -> Result<Self> {
        if spec.qk_norm {
            return Err(Error::config(
                "--style",
                "granite",
                "Granite has no Q/K norm, this model has: use --style fold",
            ));
        }
        let attention = spec.qkv_bias || spec.bias;
        let biases = Biases { qkv: attention, output: attention, mlp: spec.bias };
        let mut config = common(spec, "granite", "GraniteForCausalLM");
        config.extend(object(json!({
            "attention_bias": biases.qkv, "mlp_bias": biases.mlp,
            "embedding_multiplier": spec.alphas.embedding, "residual_multiplier": spec.alphas.residual,
            "attention_multiplier": digits(spec.attention_scale(scaling)),
            "logits_scaling": digits(1.0 / spec.readout_scale(scaling)),
        })));
        Ok(Self { family: "granite", tensors: families::llama(spec, biases, Fold::NONE), config })
    }

    /// Writes weights, configuration and model card into a folder.
    pub fn write(mut self, origin: &Origin, dir: &Path, dtype: Option<DType>, shard: usize) -> Result<()> {
        let stored = dtype.map_or_else(|| origin.dtype(), Ok)?;
        let rows = &origin.reader;
        let declare = |t: &Foreign| {
            let dtype = dtype.map_or_else(|| t.dtype(rows, stored), Ok)?;
            Ok(Declared { name: t.name.clone(), dtype, shape: t.shape.clone() })
        };
        let declared = self.tensors.iter().map(declare).collect::<Result<Vec<_>>>()?;
        let types: std::collections::HashMap<_, _> = declared.iter().map(|d| (d.name.clone(), d.dtype)).collect();
        let by_name: std::collections::HashMap<_, _> = self.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        let mut writer = TensorWriter::new(dir, declared, shard);
        for name in writer.order() {
            let bytes = by_name[name.as_str()].assemble(rows, types[&name], rows.dir())?;
            writer.write(&name, &bytes)?;
        }
        writer.finish()?;
        self.config.insert("torch_dtype".into(), torch_name(stored).into());
        write_json(&dir.join(CONFIG), &self.config)?;
        let card = dir.join("README.md");
        if !card.exists() {
            fs::write(&card, self.card(origin)).map_err(Error::io("write", &card))?;
        }
        Ok(())
    }

    fn card(&self, origin: &Origin) -> String {
        let spec = &origin.meaning.spec;
        let parameters = mupscale::model::table(spec, &origin.meaning.scaling).parameters();
        format!(
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\nA {} of {parameters} parameters \
             ({}), trained with mupscale and written by mupscale-convert {}.\n\nTrained for {} steps on {} tokens in its \
             last run; {:?} parametrisation, base shape {}.\n",
            self.family,
            spec.dims(),
            env!("CARGO_PKG_VERSION"),
            origin.progress.position.step,
            origin.progress.position.tokens,
            origin.meaning.scaling.kind,
            origin.meaning.scaling.base,
        )
    }
}

/// What Llama and its kin have in common.
fn common(spec: &DecoderSpec, family: &str, class: &str) -> Map<String, Value> {
    let get = |width| spec.dims.get(width);
    let mut config = object(json!({
        "architectures": [class], "model_type": family, "vocab_size": spec.vocab,
        "hidden_size": get(Width::Residual), "intermediate_size": get(Width::Ffn),
        "num_hidden_layers": spec.layers, "num_attention_heads": spec.dims.heads(),
        "num_key_value_heads": get(Width::KvHeads), "head_dim": get(Width::HeadDim), "hidden_act": "silu",
        "max_position_embeddings": spec.context, "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied, "initializer_range": spec.init_std,
        "bos_token_id": null, "eos_token_id": null, "pad_token_id": null,
    }));
    // The form of before transformers 5, which it reads too.
    if let Positions::Rope { base, .. } = spec.positions {
        config.insert("rope_theta".into(), base.into());
        config.insert("rope_scaling".into(), rope_scaling(spec));
    }
    config
}

/// `rope_scaling`. Heads that grew keep the frequencies of the smaller head, each several times, which only a list of
/// factors can say: standard / wanted frequency, as `longrope` has it.
fn rope_scaling(spec: &DecoderSpec) -> Value {
    let Positions::Rope { base, dim, scaling } = spec.positions else { return Value::Null };
    let head_dim = spec.dims.get(Width::HeadDim);
    if dim != head_dim {
        let standard = Positions::Rope { base, dim: head_dim, scaling: None }.frequencies(head_dim).unwrap_or_default();
        let wanted = spec.positions.frequencies(head_dim).unwrap_or_default();
        let factors: Vec<f64> = standard.iter().zip(&wanted).map(|(s, w)| s / w).collect();
        return json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": spec.context,
        });
    }
    match scaling {
        None => Value::Null,
        Some(RopeScaling::Linear { factor }) => json!({ "rope_type": "linear", "factor": factor }),
        Some(RopeScaling::Llama3 { factor, low, high, original_context }) => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original_context,
        }),
    }
}

/// Without the last digit, in which products and quotients of the same numbers differ.
fn digits(x: f64) -> f64 {
    format!("{x:.14e}").parse().unwrap_or(x)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "float64",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}
