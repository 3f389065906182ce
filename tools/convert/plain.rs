//! The other side of `--verify`: logits of a Hugging Face folder, written against the definition of each family in
//! `transformers` (`models/*/modeling_*.py`) and nothing of ours: no multipliers but Granite's own, no axes, no folding.
//! Plain loops in f64, one tensor in memory at a time. Golden logits of `transformers` itself hold it to its word.
//! A file of llm.c is a GPT-2 whose matrices lie the other way round (`train_gpt2.c`).

use crate::{config::HfConfig, layout::floats, llmc::LlmcFile, tensors::TensorFiles};
use mupscale::{DType, Error, Result};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::{f64::consts::PI, ops::Range, path::Path};

/// Rows of a matrix that a task reads at a time.
const ROWS: usize = 256;

/// Tensors of a model by name.
pub trait Stored: Sync {
    /// The folder or file that holds them.
    fn place(&self) -> &Path;
    /// Their names.
    fn names(&self) -> Vec<&str>;
    /// Whether there is one of this name.
    fn has(&self, name: &str) -> bool;
    /// Type and shape.
    fn meta(&self, name: &str) -> Result<(DType, &[usize])>;
    /// Elements, in flat order.
    fn read(&self, name: &str, elements: Range<usize>) -> Result<Vec<u8>>;
}

/// A model from elsewhere.
pub struct Plain {
    files: Box<dyn Stored>,
    config: Map<String, Value>,
    family: &'static str,
    /// GPT-2's matrices are `[inputs, outputs]`.
    conv1d: bool,
    /// Classes of the readout; rows of its matrix beyond them are padding.
    vocab: Option<usize>,
}

/// T vectors side by side.
type Rows = Vec<Vec<f64>>;

impl Plain {
    /// Opens a folder.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = HfConfig::open(dir)?;
        let (files, family) = (Box::new(TensorFiles::open(dir)?), config.family()?);
        Ok(Self { files, family, config: config.values, conv1d: true, vocab: None })
    }

    /// Opens a file of llm.c.
    pub fn of_llmc(path: &Path) -> Result<Self> {
        let file = LlmcFile::open(path)?;
        let (layers, heads, vocab) = (file.spec.layers, file.spec.dims.heads(), Some(file.spec.vocab));
        let config = json!({ "n_layer": layers, "n_head": heads }).as_object().cloned().unwrap_or_default();
        Ok(Self { files: Box::new(file), config, family: "gpt2", conv1d: false, vocab })
    }

    /// Whether some weights are of 16 bits.
    pub fn is_short(&self) -> Result<bool> {
        let types = self.files.names().into_iter().map(|name| Ok(self.files.meta(name)?.0.size() == 2));
        Ok(types.collect::<Result<Vec<_>>>()?.contains(&true))
    }

    /// Logits of every position.
    pub fn logits(&self, tokens: &[i32]) -> Result<Rows> {
        let mut logits = if self.family == "gpt2" { self.gpt2(tokens) } else { self.llama(tokens) }?;
        if let Some(vocab) = self.vocab {
            logits.iter_mut().for_each(|row| row.truncate(vocab));
        }
        Ok(logits)
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.config.get(key).and_then(Value::as_f64)
    }

    fn size(&self, key: &str) -> Result<usize> {
        let size = self.number(key).filter(|n| *n >= 1.0);
        size.map(|n| n as usize).ok_or_else(|| Error::file(self.files.place(), format!("config.json has no {key}")))
    }

    fn vector(&self, name: &str) -> Result<Vec<f64>> {
        let (dtype, shape) = self.files.meta(name)?;
        Ok(floats(&self.files.read(name, 0..shape.iter().product())?, dtype))
    }

    /// Rows of an embedding.
    fn rows(&self, name: &str, indices: impl Iterator<Item = usize>) -> Result<Rows> {
        let (dtype, shape) = self.files.meta(name)?;
        let width = shape[1];
        indices.map(|i| Ok(floats(&self.files.read(name, i * width..(i + 1) * width)?, dtype))).collect()
    }

    /// y = x Wᵀ + b, W `[outputs, inputs]`: `torch.nn.Linear`.
    fn linear(&self, name: &str, x: &Rows) -> Result<Rows> {
        let weight = format!("{name}.weight");
        let (dtype, shape) = self.files.meta(&weight)?;
        let (outputs, inputs) = (shape[0], shape[1]);
        let columns: Vec<Rows> = (0..outputs.div_ceil(ROWS))
            .into_par_iter()
            .map(|part| {
                let rows = part * ROWS..outputs.min((part + 1) * ROWS);
                let values = floats(&self.files.read(&weight, rows.start * inputs..rows.end * inputs)?, dtype);
                Ok(x.iter().map(|x| values.chunks_exact(inputs).map(|w| dot(w, x)).collect()).collect())
            })
            .collect::<Result<_>>()?;
        let mut y: Rows =
            (0..x.len()).map(|t| columns.iter().flat_map(|part| part[t].iter().copied()).collect()).collect();
        self.add_bias(name, &mut y)?;
        Ok(y)
    }

    /// y = x W + b, W `[inputs, outputs]`: `transformers`' Conv1D.
    fn conv1d(&self, name: &str, x: &Rows) -> Result<Rows> {
        let weight = format!("{name}.weight");
        let (dtype, shape) = self.files.meta(&weight)?;
        let (inputs, outputs) = (shape[0], shape[1]);
        let mut y = vec![vec![0.0; outputs]; x.len()];
        for start in (0..inputs).step_by(ROWS) {
            let end = inputs.min(start + ROWS);
            let values = floats(&self.files.read(&weight, start * outputs..end * outputs)?, dtype);
            y.par_iter_mut().zip(x).for_each(|(y, x)| {
                for (w, &x) in values.chunks_exact(outputs).zip(&x[start..end]) {
                    y.iter_mut().zip(w).for_each(|(y, w)| *y += x * w);
                }
            });
        }
        self.add_bias(name, &mut y)?;
        Ok(y)
    }

    /// A layer of GPT-2.
    fn projection(&self, name: &str, x: &Rows) -> Result<Rows> {
        if self.conv1d { self.conv1d(name, x) } else { self.linear(name, x) }
    }

    fn add_bias(&self, name: &str, y: &mut Rows) -> Result<()> {
        let bias = format!("{name}.bias");
        if self.files.has(&bias) {
            let bias = self.vector(&bias)?;
            y.iter_mut().for_each(|y| y.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        }
        Ok(())
    }

    fn rms_norm(&self, name: &str, x: &Rows, eps: f64) -> Result<Rows> {
        let gain = self.vector(name)?;
        Ok(x.iter().map(|x| rms(x, &gain, eps)).collect())
    }

    fn layer_norm(&self, name: &str, x: &Rows, eps: f64) -> Result<Rows> {
        let (gain, bias) = (self.vector(&format!("{name}.weight"))?, self.vector(&format!("{name}.bias"))?);
        let norm = |x: &Vec<f64>| {
            let n = x.len() as f64;
            let mean = x.iter().sum::<f64>() / n;
            let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            let scale = (variance + eps).sqrt().recip();
            x.iter().zip(gain.iter().zip(&bias)).map(|(v, (g, b))| (v - mean) * scale * g + b).collect()
        };
        Ok(x.iter().map(norm).collect())
    }

    /// `GPT2LMHeadModel`.
    fn gpt2(&self, tokens: &[i32]) -> Result<Rows> {
        let (layers, heads) = (self.size("n_layer")?, self.size("n_head")?);
        let eps = self.number("layer_norm_epsilon").unwrap_or(1e-5);
        let prefix = if self.files.has("wte.weight") { "" } else { "transformer." };
        let mut x = self.rows(&format!("{prefix}wte.weight"), tokens.iter().map(|&t| t as usize))?;
        add(&mut x, &self.rows(&format!("{prefix}wpe.weight"), 0..tokens.len())?, 1.0);
        let size = x[0].len() / heads;
        let exact = self.config.get("activation_function").and_then(Value::as_str) == Some("gelu");
        let relu = self.config.get("activation_function").and_then(Value::as_str) == Some("relu");
        for i in 0..layers {
            let at = |part: &str| format!("{prefix}h.{i}.{part}");
            let qkv = self.projection(&at("attn.c_attn"), &self.layer_norm(&at("ln_1"), &x, eps)?)?;
            let third = |part: usize| -> Rows {
                qkv.iter().map(|row| row[part * row.len() / 3..(part + 1) * row.len() / 3].to_vec()).collect()
            };
            let scale = (size as f64).sqrt().recip();
            let attended = attention(&third(0), &third(1), &third(2), heads, heads, scale);
            add(&mut x, &self.projection(&at("attn.c_proj"), &attended)?, 1.0);
            let mut hidden = self.projection(&at("mlp.c_fc"), &self.layer_norm(&at("ln_2"), &x, eps)?)?;
            hidden.iter_mut().flatten().for_each(|h| {
                *h = match (exact, relu) {
                    (true, _) => 0.5 * *h * (1.0 + libm::erf(*h / 2f64.sqrt())),
                    (_, true) => h.max(0.0),
                    _ => 0.5 * *h * (1.0 + ((2.0 / PI).sqrt() * (*h + 0.044715 * h.powi(3))).tanh()),
                }
            });
            add(&mut x, &self.projection(&at("mlp.c_proj"), &hidden)?, 1.0);
        }
        let x = self.layer_norm(&format!("{prefix}ln_f"), &x, eps)?;
        let head = if self.files.has("lm_head.weight") { "lm_head" } else { &format!("{prefix}wte") };
        self.linear(head, &x)
    }

    /// `LlamaForCausalLM` and those that are written like it.
    fn llama(&self, tokens: &[i32]) -> Result<Rows> {
        let (layers, heads) = (self.size("num_hidden_layers")?, self.size("num_attention_heads")?);
        let kv_heads = self.number("num_key_value_heads").map_or(heads, |n| n as usize);
        let eps = self.number("rms_norm_eps").unwrap_or(1e-6);
        let granite = |key: &str, otherwise: f64| {
            if self.family == "granite" { self.number(key).unwrap_or(1.0) } else { otherwise }
        };
        let mut x = self.rows("model.embed_tokens.weight", tokens.iter().map(|&t| t as usize))?;
        let embedding = granite("embedding_multiplier", 1.0);
        x.iter_mut().flatten().for_each(|x| *x *= embedding);
        let default = if self.family == "qwen3" { 128 } else { x[0].len() / heads };
        let size = self.number("head_dim").map_or(default, |n| n as usize);
        let frequencies = self.frequencies(size)?;
        let scale = granite("attention_multiplier", (size as f64).sqrt().recip());
        let branch = granite("residual_multiplier", 1.0);
        for i in 0..layers {
            let at = |part: &str| format!("model.layers.{i}.{part}");
            let input = self.rms_norm(&at("input_layernorm.weight"), &x, eps)?;
            let mut q = self.linear(&at("self_attn.q_proj"), &input)?;
            let mut k = self.linear(&at("self_attn.k_proj"), &input)?;
            let v = self.linear(&at("self_attn.v_proj"), &input)?;
            if self.family == "qwen3" {
                for (rows, name) in [(&mut q, "self_attn.q_norm.weight"), (&mut k, "self_attn.k_norm.weight")] {
                    let gain = self.vector(&at(name))?;
                    rows.iter_mut()
                        .flat_map(|r| r.chunks_exact_mut(size))
                        .for_each(|h| h.copy_from_slice(&rms(h, &gain, eps)));
                }
            }
            rotate(&mut q, &frequencies);
            rotate(&mut k, &frequencies);
            let attended = attention(&q, &k, &v, heads, kv_heads, scale);
            add(&mut x, &self.linear(&at("self_attn.o_proj"), &attended)?, branch);
            let input = self.rms_norm(&at("post_attention_layernorm.weight"), &x, eps)?;
            let mut hidden = self.linear(&at("mlp.gate_proj"), &input)?;
            let up = self.linear(&at("mlp.up_proj"), &input)?;
            hidden.iter_mut().flatten().zip(up.iter().flatten()).for_each(|(g, u)| *g *= u / (1.0 + (-*g).exp()));
            add(&mut x, &self.linear(&at("mlp.down_proj"), &hidden)?, branch);
        }
        let x = self.rms_norm("model.norm.weight", &x, eps)?;
        let head = if self.files.has("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
        let mut logits = self.linear(head, &x)?;
        let divisor = granite("logits_scaling", 1.0);
        logits.iter_mut().flatten().for_each(|l| *l /= divisor);
        Ok(logits)
    }

    /// `inv_freq`, as `modeling_rope_utils.py` computes it.
    fn frequencies(&self, size: usize) -> Result<Vec<f64>> {
        let values = &self.config;
        let scaling = ["rope_parameters", "rope_scaling"].iter().find_map(|k| values.get(*k)?.as_object());
        let get = |key: &str| scaling.and_then(|s| s.get(key)).and_then(Value::as_f64);
        let base = get("rope_theta").or(self.number("rope_theta")).unwrap_or(10_000.0);
        let mut frequencies: Vec<f64> = (0..size / 2).map(|i| base.powf(-2.0 * i as f64 / size as f64)).collect();
        let kind = ["rope_type", "type"].iter().find_map(|k| scaling?.get(*k)?.as_str()).unwrap_or("default");
        let need =
            |key: &str| get(key).ok_or_else(|| Error::file(self.files.place(), format!("rope scaling has no {key}")));
        match kind {
            "linear" => {
                let factor = need("factor")?;
                frequencies.iter_mut().for_each(|f| *f /= factor);
            }
            "llama3" => {
                let (factor, low, high) = (need("factor")?, need("low_freq_factor")?, need("high_freq_factor")?);
                let context = need("original_max_position_embeddings")?;
                for f in &mut frequencies {
                    let wave = 2.0 * PI / *f;
                    if wave > context / low {
                        *f /= factor;
                    } else if wave >= context / high {
                        let smooth = (context / wave - low) / (high - low);
                        *f = (1.0 - smooth) * *f / factor + smooth * *f;
                    }
                }
            }
            "longrope" => {
                let list = scaling.and_then(|s| s.get("short_factor")).and_then(Value::as_array);
                let factors = list.into_iter().flatten().filter_map(Value::as_f64);
                frequencies.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
            }
            _ => {}
        }
        Ok(frequencies)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a8.0.iter().zip(b8.0) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f64>() + a8.1.iter().zip(b8.1).map(|(a, b)| a * b).sum::<f64>()
}

fn add(x: &mut Rows, y: &Rows, scale: f64) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += scale * y);
}

fn rms(x: &[f64], gain: &[f64], eps: f64) -> Vec<f64> {
    let scale = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt().recip();
    x.iter().zip(gain).map(|(v, g)| v * scale * g).collect()
}

/// `apply_rotary_pos_emb`: x cos + rotate_half(x) sin, in every head.
fn rotate(rows: &mut Rows, frequencies: &[f64]) {
    let half = frequencies.len();
    for (position, row) in rows.iter_mut().enumerate() {
        for head in row.chunks_exact_mut(2 * half) {
            let before = head.to_vec();
            for i in 0..2 * half {
                let angle = position as f64 * frequencies[i % half];
                let turned = if i < half { -before[i + half] } else { before[i - half] };
                head[i] = before[i] * angle.cos() + turned * angle.sin();
            }
        }
    }
}

/// Causal attention; query head h reads key/value head h / (heads / kv_heads).
fn attention(q: &Rows, k: &Rows, v: &Rows, heads: usize, kv_heads: usize, scale: f64) -> Rows {
    let size = q[0].len() / heads;
    let mut out = vec![vec![0.0; q[0].len()]; q.len()];
    for (t, out) in out.iter_mut().enumerate() {
        for h in 0..heads {
            let (own, shared) = (h * size..(h + 1) * size, h / (heads / kv_heads) * size);
            let scores: Vec<f64> =
                k[..=t].iter().map(|k| scale * dot(&q[t][own.clone()], &k[shared..shared + size])).collect();
            let largest = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (w, v) in weights.iter().zip(v) {
                out[own.clone()].iter_mut().zip(&v[shared..shared + size]).for_each(|(o, v)| *o += w / sum * v);
            }
        }
    }
    out
}
