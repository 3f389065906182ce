//! Rules that the field disputes, as named options. The defaults are those under which a widened model trains exactly as
//! the narrow one would; each of the others changes the wide model's hyperparameters, never its weights or moments.

use super::Factors;
use crate::model::param::Kind;
use serde::{Deserialize, Serialize};
use std::fmt;

/// One choice for each disputed rule: `[parametrization.rules]`, stored in checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    /// Weight decay of hidden matrices against width.
    pub weight_decay: DecayRule,
    /// Learning rate of embeddings against width.
    pub embedding_lr: EmbeddingRule,
    /// Epsilon against width.
    pub eps: EpsRule,
    /// The factor on attention scores against the size of a head.
    pub attention: AttentionRule,
    /// What changes with the number of blocks.
    pub depth: DepthRule,
    /// Blocks of the base shape, for `depth`; the model's own if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_layers: Option<usize>,
}

/// Weight decay λ, as it multiplies the weight beside the learning rate, η λ W.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecayRule {
    /// η λ is the same at every width: λ grows as η falls. Exact under widening.
    #[default]
    Product,
    /// λ of hidden matrices grows as √k_in (arXiv 2510.15262, for AdamW).
    SqrtWidth,
    /// λ is what the configuration says, at every width; η λ falls with η (the mup package's default).
    Independent,
}

/// Learning rate of embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmbeddingRule {
    /// The same at every width (μP). Exact under widening.
    #[default]
    Constant,
    /// ∝ 1/√width (arXiv 2506.15025: the best ratio to the hidden rate grows as √width).
    InverseSqrtWidth,
}

/// Epsilon of Adam, AdamW and Muon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EpsRule {
    /// Scaled as the gradients are. Exact under widening.
    #[default]
    Exact,
    /// The same number for every tensor.
    Unscaled,
}

/// The factor on attention scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionRule {
    /// √e_base / e (μP): exact when the size of a head grows.
    #[default]
    Inverse,
    /// 1/√e, as without μP. A head of another size then has another function: only its number may grow.
    InverseSqrt,
}

/// Depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DepthRule {
    /// Nothing.
    #[default]
    None,
    /// CompleteP (arXiv 2505.01618, α = 1): what a block adds is multiplied by base_layers / layers, and so is the
    /// epsilon of its tensors.
    #[serde(rename = "completep")]
    CompleteP,
}

impl Rules {
    /// The optimizer's factors of a tensor under these rules, from the exact ones. `k_in` is the growth of its inputs
    /// (of its width, for an embedding, `k_out`) over the base.
    pub fn apply(&self, exact: Factors, kind: Kind, k_in: f64, k_out: f64) -> Factors {
        let mut factors = exact;
        factors.decay = match self.weight_decay {
            DecayRule::Product => exact.decay,
            DecayRule::SqrtWidth if kind == Kind::Hidden => k_in.sqrt(),
            DecayRule::SqrtWidth | DecayRule::Independent => 1.0,
        };
        if self.embedding_lr == EmbeddingRule::InverseSqrtWidth && kind == Kind::Embedding {
            let root = k_out.sqrt();
            factors.lr /= root;
            if self.weight_decay == DecayRule::Product {
                factors.decay *= root;
            }
        }
        if self.eps == EpsRule::Unscaled {
            factors.eps = 1.0;
        }
        factors
    }

    /// base_layers / layers where the depth counts, else 1.
    pub fn depth_factor(&self, layers: usize) -> f64 {
        match self.depth {
            DepthRule::None => 1.0,
            DepthRule::CompleteP => self.base_layers.unwrap_or(layers) as f64 / layers as f64,
        }
    }

    /// Whether a widened model trains as the narrow one would.
    pub fn exact(&self) -> bool {
        let Self { weight_decay, embedding_lr, eps, .. } = *self;
        (weight_decay, embedding_lr, eps) == Default::default()
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "weight decay {}, embedding lr {}, eps {}, attention {}, depth {}",
            name(&self.weight_decay),
            name(&self.embedding_lr),
            name(&self.eps),
            name(&self.attention),
            name(&self.depth)
        )?;
        match (self.depth, self.base_layers) {
            (DepthRule::CompleteP, Some(layers)) => write!(f, " (base {layers} layers)"),
            _ => Ok(()),
        }
    }
}

/// A rule as a configuration names it.
fn name(rule: &impl Serialize) -> String {
    serde_json::to_value(rule).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXACT: Factors = Factors { lr: 0.25, eps: 0.125, decay: 4.0, first: 0.5, second: 0.25 };

    #[test]
    fn each_rule_changes_what_it_names() {
        let rules = |text: &str| toml::from_str::<Rules>(text).unwrap();
        let factors = |text: &str, kind| rules(text).apply(EXACT, kind, 4.0, 9.0);
        assert_eq!(factors("", Kind::Hidden), EXACT);
        assert_eq!(factors("weight_decay = 'sqrt-width'", Kind::Hidden), Factors { decay: 2.0, ..EXACT });
        assert_eq!(factors("weight_decay = 'sqrt-width'", Kind::Embedding), Factors { decay: 1.0, ..EXACT });
        assert_eq!(factors("weight_decay = 'independent'", Kind::Hidden), Factors { decay: 1.0, ..EXACT });
        assert_eq!(factors("eps = 'unscaled'", Kind::Vector), Factors { eps: 1.0, ..EXACT });
        assert_eq!(factors("embedding_lr = 'inverse-sqrt-width'", Kind::Hidden), EXACT);
        // The product of rate and decay stays where that is the rule.
        let embedding = factors("embedding_lr = 'inverse-sqrt-width'", Kind::Embedding);
        assert_eq!((embedding.lr, embedding.decay), (0.25 / 3.0, 12.0));
        assert_eq!(rules("depth = 'completep'\nbase_layers = 2").depth_factor(8), 0.25);
        assert_eq!(rules("depth = 'completep'").depth_factor(8), 1.0);
        assert_eq!(rules("base_layers = 2").depth_factor(8), 1.0);
    }

    #[test]
    fn an_unknown_rule_is_refused_and_the_known_are_named() {
        let error = toml::from_str::<Rules>("weight_decay = 'root'").unwrap_err().to_string();
        assert!(error.contains("sqrt-width") && error.contains("independent"), "{error}");
    }
}
