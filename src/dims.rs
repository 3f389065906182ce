//! Axes by name. A parameter's axis is a list of *blocks*, outermost first; a block is a width that can grow or a
//! fixed size. Everything that depends on shape (multipliers, widening, layout, checkpoints) is derived from these.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// The name of a width: a size that widening can multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// Model width, the residual stream.
    Residual,
    /// Hidden width of a transformer's MLP.
    Ffn,
    /// Groups of heads that share one key/value head.
    KvHeads,
    /// Query heads per key/value head.
    Group,
    /// Size of one head.
    HeadDim,
    /// Width of an mlp's hidden layer, counted from 1.
    Hidden(u16),
}

impl fmt::Display for Width {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Residual => f.write_str("residual"),
            Self::Ffn => f.write_str("ffn"),
            Self::KvHeads => f.write_str("kv_heads"),
            Self::Group => f.write_str("group"),
            Self::HeadDim => f.write_str("head_dim"),
            Self::Hidden(i) => write!(f, "hidden_{i}"),
        }
    }
}

impl FromStr for Width {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "residual" => Self::Residual,
            "ffn" => Self::Ffn,
            "kv_heads" => Self::KvHeads,
            "group" => Self::Group,
            "head_dim" => Self::HeadDim,
            _ => match name.strip_prefix("hidden_").and_then(|i| i.parse().ok()) {
                Some(i) if i > 0 => Self::Hidden(i),
                _ => {
                    let known = "residual, ffn, kv_heads, group, head_dim or hidden_1, hidden_2, …";
                    return Err(Error::config("width", name, format!("no width has this name; there are {known}")));
                }
            },
        })
    }
}

impl Serialize for Width {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Width {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A size for each width of a model: its shape, a base shape, or the multiplicities of a widening.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Dims(BTreeMap<Width, usize>);

impl Dims {
    /// The size of a width; 1 where the model lacks it, so that products over axes need no special case.
    pub fn get(&self, width: Width) -> usize {
        self.0.get(&width).copied().unwrap_or(1)
    }

    /// Whether the model has this width.
    pub fn has(&self, width: Width) -> bool {
        self.0.contains_key(&width)
    }

    /// Sets the size of a width.
    pub fn set(&mut self, width: Width, size: usize) {
        self.0.insert(width, size);
    }

    /// The widths with their sizes, in the order of [`Width`].
    pub fn iter(&self) -> impl Iterator<Item = (Width, usize)> + '_ {
        self.0.iter().map(|(&width, &size)| (width, size))
    }

    /// Query heads: `kv_heads × group`.
    pub fn heads(&self) -> usize {
        self.get(Width::KvHeads) * self.get(Width::Group)
    }

    /// This shape with each width multiplied. An error names a width that this shape lacks, or a multiplicity of 0.
    pub fn times(&self, multiplicities: &Dims) -> Result<Dims> {
        let mut wide = self.clone();
        for (width, k) in multiplicities.iter() {
            let Some(size) = self.0.get(&width) else {
                let has = self.0.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                return Err(Error::config(
                    width.to_string(),
                    k,
                    format!("this architecture has no such width; it has {has}"),
                ));
            };
            if k == 0 {
                return Err(Error::config(width.to_string(), k, "a multiplicity must be 1 or more"));
            }
            let grown = size.checked_mul(k).filter(|&n| n <= MAX_SIZE);
            let Some(grown) = grown else {
                return Err(Error::config(width.to_string(), k, format!("{size} × {k} is over {MAX_SIZE}")));
            };
            wide.set(width, grown);
        }
        Ok(wide)
    }

    /// This shape : `base`, for one width. Both have the width, or neither.
    pub fn ratio(&self, base: &Dims, width: Width) -> f64 {
        self.get(width) as f64 / base.get(width) as f64
    }
}

/// Most layers of a model: far more than any has, and few enough that a table of them is quick to make.
pub const MAX_LAYERS: usize = 1 << 10;

/// Largest size of one width: index arithmetic on products of two of them stays far inside 64 bits.
pub const MAX_SIZE: usize = 1 << 24;

impl FromIterator<(Width, usize)> for Dims {
    fn from_iter<I: IntoIterator<Item = (Width, usize)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (width, size)) in self.iter().enumerate() {
            write!(f, "{}{width} {size}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// What a block of an axis is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockName {
    /// A width, which can grow.
    Width(Width),
    /// A fixed size: `vocab`, `context`, `input`, `classes`.
    Fixed(&'static str),
}

/// One block of an axis: a name and a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// What it counts.
    pub name: BlockName,
    /// How many.
    pub size: usize,
}

/// One axis of a tensor: blocks, outermost first. W_q's output axis is `[kv_heads, group, head_dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis(pub Vec<Block>);

impl Axis {
    /// An axis of widths, with their sizes from `dims`.
    pub fn widths(widths: &[Width], dims: &Dims) -> Self {
        Self(widths.iter().map(|&w| Block { name: BlockName::Width(w), size: dims.get(w) }).collect())
    }

    /// An axis of one fixed block.
    pub fn fixed(name: &'static str, size: usize) -> Self {
        Self(vec![Block { name: BlockName::Fixed(name), size }])
    }

    /// Number of indices: the product of the blocks.
    pub fn size(&self) -> usize {
        self.0.iter().map(|b| b.size).product()
    }

    /// How many times larger this axis is at `dims` than at `base`: the product over its widths.
    pub fn ratio(&self, dims: &Dims, base: &Dims) -> f64 {
        let ratio = |b: &Block| match b.name {
            BlockName::Width(w) => dims.ratio(base, w),
            BlockName::Fixed(_) => 1.0,
        };
        self.0.iter().map(ratio).product()
    }

    /// For each index of the wide axis, the index of this narrow one that it copies: `repeat_interleave` on every
    /// block by its multiplicity (upscaling.md, "Axes").
    pub fn repeat(&self, multiplicities: &Dims) -> Vec<u32> {
        self.map(|width, size| repeat(size, multiplicities.get(width)))
    }

    /// For each index of the wide axis, the index of this narrow one that it copies, where `widths` says the same of the
    /// indices of one width of a given size.
    pub fn map(&self, widths: impl Fn(Width, usize) -> Vec<u32>) -> Vec<u32> {
        let mut map = vec![0u32];
        for block in &self.0 {
            let inner = match block.name {
                BlockName::Width(w) => widths(w, block.size),
                BlockName::Fixed(_) => repeat(block.size, 1),
            };
            let inner = &inner;
            map = map.iter().flat_map(|&outer| inner.iter().map(move |i| outer * block.size as u32 + i)).collect();
        }
        map
    }
}

/// `times` copies of each of `size` indices, side by side.
pub fn repeat(size: usize, times: usize) -> Vec<u32> {
    (0..size * times).map(|i| (i / times) as u32).collect()
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, block) in self.0.iter().enumerate() {
            let times = if i == 0 { "" } else { " × " };
            match block.name {
                BlockName::Width(w) => write!(f, "{times}{w} {}", block.size)?,
                BlockName::Fixed(name) => write!(f, "{times}{name} {}", block.size)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeat_keeps_groups_inside_their_kv_head() {
        let dims = Dims::from_iter([(Width::KvHeads, 2), (Width::Group, 1), (Width::HeadDim, 2)]);
        let axis = Axis::widths(&[Width::KvHeads, Width::Group, Width::HeadDim], &dims);
        let grown = axis.repeat(&Dims::from_iter([(Width::Group, 2)]));
        assert_eq!(grown, [0, 1, 0, 1, 2, 3, 2, 3]);
        let heads = axis.repeat(&Dims::from_iter([(Width::KvHeads, 2), (Width::HeadDim, 2)]));
        assert_eq!(heads, [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]);
    }

    #[test]
    fn times_refuses_what_the_shape_lacks() {
        let dims = Dims::from_iter([(Width::Residual, 8)]);
        let error = |w, k| dims.times(&Dims::from_iter([(w, k)])).unwrap_err().to_string();
        assert!(error(Width::Ffn, 2).contains("it has residual"));
        assert!(error(Width::Residual, 0).contains("1 or more"));
        assert!(error(Width::Residual, usize::MAX / 4).contains("over"));
        assert_eq!(dims.times(&Dims::from_iter([(Width::Residual, 3)])).unwrap().get(Width::Residual), 24);
    }

    #[test]
    fn names_round_trip() {
        for w in [Width::Residual, Width::Ffn, Width::KvHeads, Width::Group, Width::HeadDim, Width::Hidden(3)] {
            assert_eq!(w.to_string().parse::<Width>().unwrap(), w);
        }
        assert!("hidden_0".parse::<Width>().is_err());
    }
}
