//! One configuration at many widths: what `--set` changes of it. Heads keep their size and grow in number, the hidden
//! width of MLPs keeps its ratio, all layers of an mlp grow alike.

use crate::{
    Error, Result,
    config::{Arch, Config, ModelConfig},
};

/// Sizes of a model by the name of their width, as `parametrization.base` names them.
pub struct Sizes {
    arch: Arch,
    sizes: Vec<(String, usize)>,
}

/// The width by which a configuration's model is known: the residual stream's, or the first hidden layer's.
///
/// # Errors
/// A configuration without a model, or a model without that size.
pub fn of(config: &Config) -> Result<usize> {
    let model = model(config)?;
    let (key, size) = match model.arch {
        Arch::Mlp => ("model.hidden", model.hidden.as_ref().and_then(|hidden| hidden.first().copied())),
        Arch::Gpt2 | Arch::Llama => ("model.residual", model.residual),
    };
    size.filter(|&size| size > 0).ok_or_else(|| Error::config(key, "(absent)", "is needed: the width to start from"))
}

fn model(config: &Config) -> Result<&ModelConfig> {
    let model = config.model.as_ref();
    model.ok_or_else(|| Error::config("model", "(absent)", "is needed: a [model] section, whose widths are changed"))
}

impl Sizes {
    /// The sizes of a configuration's model when it is `width` wide.
    ///
    /// # Errors
    /// A width at which one of them would not be a whole number.
    pub fn at(config: &Config, width: usize) -> Result<Self> {
        let (model, from) = (model(config)?, of(config)?);
        let scaled = |name: &str, size: usize| match size.checked_mul(width) {
            Some(product) if width > 0 && product.is_multiple_of(from) => Ok((name.to_string(), product / from)),
            _ => {
                let why =
                    format!("{name} = {size} at width {from} would be {size} × {width} / {from}: no whole number");
                Err(Error::config("width", width, why))
            }
        };
        let sizes = match model.arch {
            Arch::Mlp => {
                let hidden = model.hidden.iter().flatten().enumerate();
                hidden.map(|(i, &size)| scaled(&format!("hidden_{}", i + 1), size)).collect::<Result<_>>()?
            }
            Arch::Gpt2 | Arch::Llama => {
                let heads = model.kv_heads.unwrap_or(1);
                vec![scaled("residual", from)?, scaled("ffn", model.hidden_width(from))?, scaled("kv_heads", heads)?]
            }
        };
        Ok(Self { arch: model.arch, sizes })
    }

    /// Assignments that give the model these sizes.
    pub fn model_sets(&self) -> Vec<String> {
        match self.arch {
            Arch::Mlp => {
                let sizes: Vec<_> = self.sizes.iter().map(|(_, size)| size.to_string()).collect();
                vec![format!("model.hidden=[{}]", sizes.join(", "))]
            }
            Arch::Gpt2 | Arch::Llama => self.sizes.iter().map(|(name, size)| format!("model.{name}={size}")).collect(),
        }
    }

    /// Assignments that make these sizes the base shape.
    pub fn base_sets(&self) -> Vec<String> {
        self.sizes.iter().map(|(name, size)| format!("parametrization.base.{name}={size}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigText;

    fn config(model: &str) -> Config {
        let text = format!("run='r'\nsteps=1\n[data]\npath='d'\n[model]\n{model}");
        ConfigText::parse(&text, &[], "test.toml".as_ref()).unwrap().resolve().unwrap()
    }

    #[test]
    fn every_width_grows_alike() {
        let gpt2 = config("arch='gpt2'\nlayers=1\nresidual=32\nkv_heads=2\ncontext=8");
        let sizes = Sizes::at(&gpt2, 48).unwrap();
        assert_eq!(sizes.model_sets(), ["model.residual=48", "model.ffn=192", "model.kv_heads=3"]);
        assert_eq!(sizes.base_sets()[1], "parametrization.base.ffn=192");
        let mlp = config("arch='mlp'\nhidden=[8, 24]");
        assert_eq!(Sizes::at(&mlp, 16).unwrap().model_sets(), ["model.hidden=[16, 48]"]);
        assert_eq!(Sizes::at(&mlp, 4).unwrap().base_sets()[1], "parametrization.base.hidden_2=12");
    }

    #[test]
    fn a_width_that_does_not_divide_is_named() {
        let gpt2 = config("arch='gpt2'\nlayers=1\nresidual=32\nkv_heads=2\ncontext=8");
        let error = Sizes::at(&gpt2, 40).err().unwrap().to_string();
        assert!(error.contains("40") && error.contains("kv_heads = 2 at width 32"), "{error}");
        assert!(Sizes::at(&gpt2, 0).is_err());
    }
}
