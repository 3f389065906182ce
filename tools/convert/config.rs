//! `config.json` of a Hugging Face model, read: what it describes in our terms, or why we cannot compute it.

use crate::families::Biases;
use mupscale::{
    Error, Result,
    dims::{Dims, Width},
    model::{
        gpt2::{self, Gpt2},
        llama::{self, Llama},
        spec::{Alphas, DecoderSpec, Positions, RopeScaling, Spec},
    },
    ops::activation::Activation,
};
use serde_json::{Map, Value};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The name of the document.
pub const CONFIG: &str = "config.json";

/// Families that are read.
pub const FAMILIES: [&str; 6] = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "granite"];

/// A configuration under its path.
pub struct HfConfig {
    path: PathBuf,
    /// All keys.
    pub values: Map<String, Value>,
}

/// What a configuration describes.
pub struct Described {
    /// The model.
    pub spec: DecoderSpec,
    /// Which biases its tensors have; of a GPT-2 all.
    pub biases: Biases,
}

impl HfConfig {
    /// Reads a folder's configuration.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        if !dir.is_dir() {
            return Err(Error::file(
                dir,
                "there is no such folder; give that of a Hugging Face model, with config.json",
            ));
        }
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        match serde_json::from_slice(&text) {
            Ok(Value::Object(values)) => Ok(Self { path, values }),
            Ok(_) => Err(Error::file(path, "is no JSON object, so no configuration of a model")),
            Err(e) => Err(Error::file(path, format!("is not JSON: {e}"))),
        }
    }

    fn refuse(&self, key: &str, value: impl ToString, why: &str) -> Error {
        Error::file(&self.path, format!("{key} = {}: {why}", value.to_string()))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<usize> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| self.refuse(key, "(absent)", "is needed"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        size.map(Some).ok_or_else(|| self.refuse(key, value, "must be a positive whole number"))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| self.refuse(key, value, "must be a number"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.refuse(key, value, "must be true or false"))
    }

    fn text(&self, key: &str, default: &str) -> String {
        self.get(key).map_or(default.into(), |v| v.as_str().map_or(v.to_string(), String::from))
    }

    /// The family, by `model_type`.
    pub fn family(&self) -> Result<&'static str> {
        let named = self.text("model_type", "(absent)");
        let classes = self.get("architectures").and_then(Value::as_array).cloned().unwrap_or_default();
        let classes: Vec<&str> = classes.iter().filter_map(Value::as_str).collect();
        let Some(family) = FAMILIES.into_iter().find(|f| *f == named) else {
            let experts = ["num_experts", "num_local_experts", "n_routed_experts"];
            let what =
                if experts.iter().any(|key| self.get(key).is_some()) { "a mixture of experts" } else { "unknown" };
            let why = format!("{what} ({}); known are {}", classes.join(", "), FAMILIES.join(", "));
            return Err(self.refuse("model_type", named, &why));
        };
        let is_language_model = |c: &&str| c.ends_with("ForCausalLM") || c.ends_with("LMHeadModel");
        if !classes.is_empty() && !classes.iter().any(is_language_model) {
            let why = "is no language model with a readout (…ForCausalLM, …LMHeadModel)";
            return Err(self.refuse("architectures", classes.join(", "), why));
        }
        if let Some(value) = self.get("quantization_config") {
            return Err(self.refuse("quantization_config", value, "quantised weights are not read: use the original"));
        }
        Ok(family)
    }

    /// The model in our terms. `context` shortens it.
    pub fn describe(&self, context: Option<usize>) -> Result<Described> {
        let described = match self.family()? {
            "gpt2" => self.gpt2(context)?,
            family => self.llama(family, context)?,
        };
        Spec::Decoder(described.spec.clone()).check().map_err(|e| Error::file(&self.path, e.to_string()))?;
        Ok(described)
    }

    fn gpt2(&self, context: Option<usize>) -> Result<Described> {
        let (residual, heads) = (self.size("n_embd")?, self.size("n_head")?);
        if !residual.is_multiple_of(heads) {
            return Err(self.refuse("n_embd", residual, &format!("does not divide into {heads} heads")));
        }
        for (key, usual) in
            [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)]
        {
            if self.flag(key, usual)? != usual {
                return Err(self.refuse(key, !usual, "mupscale's GPT-2 does not compute this variant"));
            }
        }
        let activation = match self.text("activation_function", "gelu_new").as_str() {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "gelu" => Activation::GeluExact,
            "relu" => Activation::Relu,
            other => {
                return Err(self.refuse(
                    "activation_function",
                    other,
                    "known are gelu_new, gelu_pytorch_tanh, gelu, relu",
                ));
            }
        };
        let dims = Dims::from_iter([
            (Width::Residual, residual),
            (Width::Ffn, self.optional_size("n_inner")?.unwrap_or(4 * residual)),
            (Width::KvHeads, heads),
            (Width::Group, 1),
            (Width::HeadDim, residual / heads),
        ]);
        let positions = self.optional_size("n_positions")?.map_or_else(|| self.size("n_ctx"), Ok)?;
        if let Some(wanted) = context.filter(|&c| c != positions) {
            return Err(Error::config(
                "--context",
                wanted,
                format!("GPT-2's positions are learned: it has {positions}"),
            ));
        }
        let parts = Gpt2 { bias: true, activation, tied: self.flag("tie_word_embeddings", true)? };
        let mut spec = gpt2::spec(dims, self.size("n_layer")?, self.size("vocab_size")?, positions, parts);
        spec.norm_eps = self.number("layer_norm_epsilon", 1e-5)?;
        spec.init_std = self.init_std()?;
        Ok(Described { spec, biases: Biases { qkv: true, output: true, mlp: true } })
    }

    fn llama(&self, family: &str, context: Option<usize>) -> Result<Described> {
        let activation = self.text("hidden_act", "silu");
        if !["silu", "swish"].contains(&activation.as_str()) {
            return Err(self.refuse("hidden_act", activation, "mupscale's gated MLP is SwiGLU: silu"));
        }
        let (residual, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        // What transformers takes where the key is absent.
        let kv_heads = match (self.optional_size("num_key_value_heads")?, family) {
            (Some(n), _) => n,
            (None, "llama" | "granite") => heads,
            (None, _) => return Err(self.refuse("num_key_value_heads", "(absent)", "is needed")),
        };
        if !heads.is_multiple_of(kv_heads) {
            let why = format!("does not divide into {kv_heads} key/value heads");
            return Err(self.refuse("num_attention_heads", heads, &why));
        }
        let head_dim = match self.optional_size("head_dim")? {
            Some(size) => size,
            None if family == "qwen3" => 128,
            None if residual.is_multiple_of(heads) => residual / heads,
            None => return Err(self.refuse("hidden_size", residual, &format!("does not divide into {heads} heads"))),
        };
        let dims = Dims::from_iter([
            (Width::Residual, residual),
            (Width::Ffn, self.size("intermediate_size")?),
            (Width::KvHeads, kv_heads),
            (Width::Group, heads / kv_heads),
            (Width::HeadDim, head_dim),
        ]);
        let context = self.context(family, context)?;
        let biases = match family {
            "mistral" => Biases { qkv: false, output: false, mlp: false },
            "qwen2" => Biases { qkv: true, output: false, mlp: false },
            _ => {
                let attention = self.flag("attention_bias", false)?;
                let mlp = family != "qwen3" && self.flag("mlp_bias", false)?;
                Biases { qkv: attention, output: attention, mlp }
            }
        };
        let parts = Llama {
            qkv_bias: biases.qkv,
            qk_norm: family == "qwen3",
            tied: self.flag("tie_word_embeddings", false)?,
            rope_base: 1e4,
            rope_dim: None,
        };
        let mut spec = llama::spec(dims, self.size("num_hidden_layers")?, self.size("vocab_size")?, context, parts);
        spec.bias = biases.mlp || biases.output;
        spec.positions = self.rope(head_dim)?;
        spec.norm_eps = self.number("rms_norm_eps", 1e-6)?;
        spec.init_std = self.init_std()?;
        if family == "granite" {
            spec.alphas = Alphas {
                embedding: self.number("embedding_multiplier", 1.0)?,
                residual: self.number("residual_multiplier", 1.0)?,
                attention: self.number("attention_multiplier", 1.0)? * (head_dim as f64).sqrt(),
                logits: 1.0 / self.number("logits_scaling", 1.0)?,
            };
        }
        Ok(Described { spec, biases })
    }

    /// The context, within which no sliding window may cut.
    fn context(&self, family: &str, wanted: Option<usize>) -> Result<usize> {
        let largest = self.size("max_position_embeddings")?;
        let context = wanted.unwrap_or(largest);
        if context > largest || context == 0 {
            return Err(Error::config("--context", context, format!("the model's is {largest}: give less")));
        }
        let slides = match family {
            // Absent means 4096 to transformers, null means none.
            "mistral" => self.values.get("sliding_window").is_none_or(|v| !v.is_null()),
            "qwen2" | "qwen3" => self.flag("use_sliding_window", false)?,
            _ => false,
        };
        let window = self.optional_size("sliding_window")?.unwrap_or(4096);
        if slides && window < context {
            let why = format!(
                "{family} with a sliding window is not supported. Within {window} tokens it has no effect: add \
                 --context {window}"
            );
            return Err(self.refuse("sliding_window", window, &why));
        }
        Ok(context)
    }

    /// RoPE, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.
    fn rope(&self, head_dim: usize) -> Result<Positions> {
        let (key, empty) =
            (if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" }, Map::new());
        let parameters = match self.get(key) {
            None => &empty,
            Some(Value::Object(parameters)) => parameters,
            Some(other) => return Err(self.refuse(key, other, "must be an object")),
        };
        let number = |name: &str| {
            let value = parameters.get(name).and_then(Value::as_f64);
            value.ok_or_else(|| self.refuse(&format!("{key}.{name}"), "(absent)", "must be a number"))
        };
        let base = match parameters.get("rope_theta") {
            Some(_) => number("rope_theta")?,
            None => self.number("rope_theta", 1e4)?,
        };
        let partial = parameters.get("partial_rotary_factor").and_then(Value::as_f64);
        let partial = partial.unwrap_or(self.number("partial_rotary_factor", 1.0)?);
        if partial != 1.0 {
            return Err(self.refuse("partial_rotary_factor", partial, "mupscale turns whole heads: must be 1"));
        }
        let kind = ["rope_type", "type"].iter().find_map(|k| parameters.get(*k)).and_then(Value::as_str);
        let scaling = match kind.unwrap_or("default") {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => Some(RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original_context: number("original_max_position_embeddings")? as usize,
            }),
            "longrope" => return self.longrope(base, head_dim, parameters),
            other => {
                let why = "this scaling is not supported; known are default, linear, llama3";
                return Err(self.refuse(&format!("{key}.rope_type"), other, why));
            }
        };
        Ok(Positions::Rope { base, dim: head_dim, scaling })
    }

    /// What we wrote ourselves for heads that grew: factors that give the frequencies of a smaller head.
    fn longrope(&self, base: f64, head_dim: usize, parameters: &Map<String, Value>) -> Result<Positions> {
        let factors = |name: &str| -> Vec<f64> {
            let list = parameters.get(name).and_then(Value::as_array);
            list.map_or(Vec::new(), |l| l.iter().filter_map(Value::as_f64).collect())
        };
        let (short, long) = (factors("short_factor"), factors("long_factor"));
        let unscaled = parameters.get("attention_factor").and_then(Value::as_f64) == Some(1.0);
        let standard = Positions::Rope { base, dim: head_dim, scaling: None }.frequencies(head_dim).unwrap_or_default();
        if short == long && unscaled && short.len() == standard.len() {
            for dim in (2..=head_dim).step_by(2).filter(|&dim| head_dim.is_multiple_of(dim)) {
                let positions = Positions::Rope { base, dim, scaling: None };
                let wanted = positions.frequencies(head_dim).unwrap_or_default();
                let near = |((s, f), w): ((&f64, &f64), &f64)| (s / f / w - 1.0).abs() < 1e-9;
                if standard.iter().zip(&short).zip(&wanted).all(near) {
                    return Ok(positions);
                }
            }
        }
        let why = "only as mupscale writes it for heads that grew; other uses are not supported";
        Err(self.refuse("rope_type", "longrope", why))
    }

    /// Deviation for matrices that are made anew.
    fn init_std(&self) -> Result<f64> {
        Ok(Some(self.number("initializer_range", 0.02)?).filter(|&std| std > 0.0).unwrap_or(0.02))
    }
}
