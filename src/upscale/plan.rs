//! Growth operators: what each of them makes of every tensor, as index maps and factors for the one expansion
//! ([`crate::ops::expand`]).
//!
//! Along an axis, every index of the grown model copies one of the source's. The *original* is the first copy; where all
//! copies of a unit are alike, a layer that reads c of them divides by c, and their gradients are 1/c of the unit's. A
//! padded unit counts as one copy, its original, and nothing else. With K the growth of the axis, relative to the
//! factors of a plain repetition ([`crate::mup::Ratios`]), which divide by K everywhere:
//!
//! | | along inputs | along outputs |
//! |---|---|---|
//! | weight | K / c (padding: K or 0) | 1 (padding: 1 or 0) |
//! | first moment | 1 (padding: 1 or 0) | K / c (padding: K or 0) |
//! | second moment | the square | the square |

use crate::{
    Error, Result,
    config::{GrowthMethod, Moments, NoiseKind, UpscaleConfig},
    dims::{Axis, BlockName, Dims, Width, repeat},
    model::{
        param::{Init, Kind, Row, Table},
        spec::Spec,
    },
    mup::DepthRule,
    rng,
    state::Meaning,
};
use std::ops::Range;

/// A growth, checked against its source.
#[derive(Clone, Debug)]
pub struct Growth {
    /// Multiplicity of each width.
    pub times: Dims,
    /// Multiplicity of the blocks.
    pub layers: usize,
    /// Method and noise.
    pub config: UpscaleConfig,
}

impl Growth {
    /// The growth of what stays as it is.
    pub fn none() -> Self {
        Self { times: Dims::default(), layers: 1, config: UpscaleConfig::default() }
    }

    /// Checks a growth of a model. Errors name the width, or what the method cannot do.
    pub fn new(meaning: &Meaning, config: &UpscaleConfig) -> Result<Self> {
        let times = config.multiplicities(meaning.spec.dims())?;
        if meaning.scaling.fixes_head_dim() && times.get(Width::HeadDim) > 1 {
            let why = "attention is scaled by 1/√head_dim (standard parametrisation, or rules.attention = \
                       \"inverse-sqrt\"), so a wider head changes the function; grow kv_heads or group instead, or \
                       train the base with parametrization.kind = \"mup\"";
            return Err(Error::config("head_dim", times.get(Width::HeadDim), why));
        }
        let growth = Self { times, layers: config.layers.unwrap_or(1), config: config.clone() };
        growth.check_depth(meaning)?;
        growth.check_method(meaning)?;
        Ok(growth)
    }

    fn check_depth(&self, meaning: &Meaning) -> Result<()> {
        let method = self.config.method;
        let refuse = |why: &str| Err(Error::config("layers", self.layers, why));
        match (&meaning.spec, self.config.layers) {
            (_, None) if !method.deepens() => Ok(()),
            (_, Some(_)) if !method.deepens() => {
                refuse("only the methods stack and llama-pro make more blocks: choose one of them, or leave layers out")
            }
            (Spec::Mlp(_), _) => refuse("an mlp has no blocks that could be repeated"),
            _ if self.layers < 2 => refuse("this method makes more blocks: give 2 or more"),
            _ if meaning.scaling.rules.depth == DepthRule::CompleteP => {
                refuse("under rules.depth = \"completep\" each block's share falls with their number: not implemented")
            }
            _ => Ok(()),
        }
    }

    fn check_method(&self, meaning: &Meaning) -> Result<()> {
        use GrowthMethod::{Aki, Hypercloning, Net2net, Zero};
        let (method, noise) = (self.config.method, self.config.noise_kind);
        let refuse = |why: &str| Err(Error::config("method", method.name(), why));
        match (method, noise) {
            (Aki, _) if matches!(meaning.spec, Spec::Mlp(_)) => {
                refuse("takes weights from the block above, and an mlp has no blocks")
            }
            (Zero, _) if self.times.get(Width::HeadDim) > 1 => {
                refuse("a padded head would have smaller scores: grow kv_heads or group instead of head_dim")
            }
            (Net2net | Zero, NoiseKind::Paired) => {
                refuse("has no equal number of copies of each input, which noise_kind = \"paired\" needs")
            }
            (Hypercloning, NoiseKind::Relative | NoiseKind::Paper) => refuse("has paired noise: leave noise_kind out"),
            _ => Ok(()),
        }
    }

    /// The noise that the method has.
    pub fn noise_kind(&self) -> NoiseKind {
        match self.config.method {
            GrowthMethod::Hypercloning => NoiseKind::Paired,
            _ => self.config.noise_kind,
        }
    }

    /// The grown model.
    pub fn spec(&self, narrow: &Spec) -> Result<Spec> {
        let mut wide = narrow.with_dims(narrow.dims().times(&self.times)?);
        if let Spec::Decoder(decoder) = &mut wide {
            decoder.layers = decoder.layers.saturating_mul(self.layers);
        }
        wide.check()?;
        Ok(wide)
    }

    /// Refuses to keep moments where they are not those of the grown model's gradients.
    pub fn check_moments(&self, moments: Moments) -> Result<()> {
        let method = self.config.method;
        if moments == Moments::Keep && matches!(method, GrowthMethod::Aki | GrowthMethod::Stack) {
            let why =
                format!("{} makes another function, with other gradients: use reset, or asymmetric", method.name());
            return Err(Error::config("init.moments", "keep", why));
        }
        Ok(())
    }

    /// For each index of a grown axis, the source's that it copies.
    fn map(&self, axis: &Axis) -> Vec<u32> {
        axis.map(|width, size| match self.config.method {
            // A score sums over a head's elements, and RoPE knows them by their place: those are repeated.
            GrowthMethod::Net2net if width != Width::HeadDim => self.random(width, size),
            _ => repeat(size, self.times.get(width)),
        })
    }

    /// Each unit itself, then copies of units drawn at random. A norm looks at all of the residual stream, so there
    /// each unit is drawn equally often.
    fn random(&self, width: Width, size: usize) -> Vec<u32> {
        let mut draws = rng::Stream::new(self.config.seed, &format!("net2net {width}")).rng();
        let mut below = |n: usize| draws.below(n as u64) as usize;
        let mut map = repeat(size, 1);
        for _ in 1..self.times.get(width) {
            let mut copies = repeat(size, 1);
            match width {
                Width::Residual => (1..size).rev().for_each(|i| copies.swap(i, below(i + 1))),
                _ => copies.iter_mut().for_each(|unit| *unit = below(size) as u32),
            }
            map.extend(copies);
        }
        map
    }
}

/// What a tensor of the grown model is made of.
pub struct RowPlan<'a> {
    growth: &'a Growth,
    row: &'a Row,
    /// For each row of the grown tensor, the source's.
    pub rows: Vec<u32>,
    /// For each of its columns.
    pub columns: Vec<u32>,
    /// Its rows in ranges, and the index of the source's tensor that each comes from.
    pub parts: Vec<(Range<usize>, usize)>,
    /// In a block that was not there.
    new_block: bool,
    /// Writes to the residual stream, in a block that shall add nothing.
    silent: bool,
}

/// Whose values are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// The weights.
    Weights,
    /// A first moment; the flag: of original units alone.
    First(bool),
    /// A second moment; the flag: of original units alone.
    Second(bool),
}

/// Factors beside those of a plain repetition.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// On all values.
    pub whole: f64,
    /// On each row, if it is not 1 everywhere.
    pub rows: Option<Vec<f64>>,
    /// On each column, if it is not 1 everywhere.
    pub columns: Option<Vec<f64>>,
}

impl<'a> RowPlan<'a> {
    /// The plan of row `index` of the grown table.
    pub fn new(growth: &'a Growth, narrow: &Table, wide: &'a Table, index: usize) -> Self {
        let row = &wide.rows[index];
        let (block, source) = source_of(growth, narrow, wide, index);
        let map = |axis: usize| narrow.rows[source].axes.get(axis).map_or(vec![0], |axis| growth.map(axis));
        let (rows, columns) = (map(0), map(1));
        let above = above(growth, narrow, source);
        let from = |original: &bool| if *original { source } else { above };
        let mut parts: Vec<(Range<usize>, usize)> = Vec::new();
        for (at, source) in originals(&rows).iter().map(from).enumerate() {
            match parts.last_mut() {
                Some((range, last)) if *last == source => range.end = at + 1,
                _ => parts.push((at..at + 1, source)),
            }
        }
        let silent = block == Block::Identity && writes_residual(wide, index);
        Self { growth, row, rows, columns, parts, new_block: block != Block::Own, silent }
    }

    /// The factors on these values.
    pub fn scales(&self, values: Values) -> Scales {
        let (input, output) = match self.row.kind {
            Kind::Embedding => (&self.rows, &self.columns),
            _ => (&self.columns, &self.rows),
        };
        let (mut inputs, mut outputs, power) = match values {
            Values::Weights if self.row.init == Init::Ones => (vec![1.0; input.len()], vec![1.0; output.len()], 1),
            Values::Weights => (self.share(input), self.presence(output), 1),
            Values::First(_) => (self.presence(input), self.share(output), 1),
            Values::Second(_) => (self.presence(input), self.share(output), 2),
        };
        if let Values::First(true) | Values::Second(true) = values {
            for (factors, map) in [(&mut inputs, input), (&mut outputs, output)] {
                factors.iter_mut().zip(originals(map)).for_each(|(factor, original)| *factor *= f64::from(original));
            }
        }
        let whole = match values {
            Values::Weights => !self.silent,
            Values::First(_) | Values::Second(_) => !self.new_block,
        };
        let worth = |factors: Vec<f64>| {
            let factors: Vec<f64> = factors.into_iter().map(|factor| factor.powi(power)).collect();
            factors.iter().any(|&factor| factor != 1.0).then_some(factors)
        };
        let (inputs, outputs) = (worth(inputs), worth(outputs));
        let whole = f64::from(whole);
        match self.row.kind {
            Kind::Embedding => Scales { whole, rows: inputs, columns: outputs },
            _ => Scales { whole, rows: outputs, columns: inputs },
        }
    }

    /// K / c for each index of an axis.
    fn share(&self, map: &[u32]) -> Vec<f64> {
        let sources = map.iter().max().map_or(0, |&last| last as usize + 1);
        let growth = map.len() as f64 / sources as f64;
        if self.growth.config.method == GrowthMethod::Zero {
            return originals(map).into_iter().map(|original| growth * f64::from(original)).collect();
        }
        let mut copies = vec![0u32; sources];
        map.iter().for_each(|&source| copies[source as usize] += 1);
        map.iter().map(|&source| growth / f64::from(copies[source as usize])).collect()
    }

    /// 1 for each index of an axis that is a unit, 0 for padding.
    fn presence(&self, map: &[u32]) -> Vec<f64> {
        match self.growth.config.method {
            GrowthMethod::Zero => originals(map).into_iter().map(f64::from).collect(),
            _ => vec![1.0; map.len()],
        }
    }
}

/// Whether each index is the first that copies its source.
fn originals(map: &[u32]) -> Vec<bool> {
    let mut seen = vec![false; map.iter().max().map_or(0, |&last| last as usize + 1)];
    map.iter().map(|&source| !std::mem::replace(&mut seen[source as usize], true)).collect()
}

/// What a block of the grown model is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    /// One of the source's own (or no block at all).
    Own,
    /// A further copy.
    Copy,
    /// A further copy that adds nothing to the residual stream.
    Identity,
}

/// The source's tensor from which a tensor of the grown model is made, and what block that makes.
///
/// Groups of a decoder are the embeddings, the blocks, the end; all blocks have the same rows.
fn source_of(growth: &Growth, narrow: &Table, wide: &Table, index: usize) -> (Block, usize) {
    let group = wide.rows[index].group;
    if growth.layers == 1 || group == 0 {
        return (Block::Own, index);
    }
    let first = |table: &Table, group| table.rows.iter().position(|row| row.group == group).unwrap_or(0);
    let (blocks, at) = (narrow.groups() - 2, group - 1);
    let (kind, source) = match growth.config.method {
        _ if at == blocks * growth.layers => (Block::Own, blocks),
        GrowthMethod::Stack => (if at < blocks { Block::Own } else { Block::Copy }, at % blocks),
        _ => (if at % growth.layers == 0 { Block::Own } else { Block::Identity }, at / growth.layers),
    };
    (kind, first(narrow, source + 1) + index - first(wide, group))
}

/// The tensor from which new rows come: under AKI the same one of the block above, for all but the last block.
fn above(growth: &Growth, narrow: &Table, source: usize) -> usize {
    let group = narrow.rows[source].group;
    let is_below_a_block = (1..narrow.groups().saturating_sub(2)).contains(&group);
    if growth.config.method != GrowthMethod::Aki || !is_below_a_block {
        return source;
    }
    source + narrow.rows.iter().filter(|row| row.group == group).count()
}

/// Whether a row is the weight, or the bias, of a layer whose outputs are added to the residual stream.
fn writes_residual(table: &Table, index: usize) -> bool {
    let row = &table.rows[index];
    let residual = row.axes[0].0.iter().all(|block| block.name == BlockName::Width(Width::Residual));
    match row.kind {
        Kind::Hidden => residual,
        // A bias comes right behind its weight.
        Kind::Vector if row.init == Init::Zeros && index > 0 => {
            table.rows[index - 1].kind == Kind::Hidden && writes_residual(table, index - 1)
        }
        _ => false,
    }
}
