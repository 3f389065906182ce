//! How the documents and tokens of a corpus are spread.

use super::tokenizer::Tokenizer;
use crate::error::Result;
use serde::Serialize;
use std::collections::BTreeMap;

/// Tokens below this are counted in a list, those above one by one: a file of 32-bit numbers may hold any.
const LISTED: usize = 1 << 20;
/// So many of the most frequent tokens are told.
const MOST_FREQUENT: usize = 10;

/// Lengths, each with the number of documents that have it.
#[derive(Debug, Default)]
pub(super) struct Lengths(BTreeMap<u64, u64>);

/// How long documents are. Of q % of them none is longer than the quantile of q.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// The shortest.
    pub least: u64,
    /// 10 %.
    pub p10: u64,
    /// 50 %.
    pub median: u64,
    /// 90 %.
    pub p90: u64,
    /// 99 %.
    pub p99: u64,
    /// The longest.
    pub most: u64,
    /// The mean.
    pub mean: f64,
}

impl Lengths {
    pub(super) fn add(&mut self, length: u64) {
        *self.0.entry(length).or_default() += 1;
    }

    pub(super) fn documents(&self) -> u64 {
        self.0.values().sum()
    }

    /// None of no documents.
    pub(super) fn quantiles(&self) -> Option<Quantiles> {
        let documents = self.documents();
        let at = |share: f64| {
            let mut left = ((documents as f64 * share).ceil() as u64).max(1);
            let reaches = |(_, count): &(&u64, &u64)| {
                let reaches = **count >= left;
                left = left.saturating_sub(**count);
                reaches
            };
            self.0.iter().find(reaches).map(|(length, _)| *length)
        };
        let sum: f64 = self.0.iter().map(|(&length, &count)| length as f64 * count as f64).sum();
        Some(Quantiles {
            least: at(0.0)?,
            p10: at(0.1)?,
            median: at(0.5)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
            most: at(1.0)?,
            mean: sum / documents as f64,
        })
    }
}

/// What the tokens of a dataset are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statistics {
    /// How many of the vocabulary occur.
    pub distinct_tokens: u64,
    /// Bytes of text for each of its tokens, where the size of the text is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_token: Option<f64>,
    /// Documents, where a token ends them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub documents: Option<u64>,
    /// Tokens of a document, its end left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_document: Option<Quantiles>,
    /// The most frequent tokens, the first of which occurs most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub most_frequent: Vec<Frequent>,
}

/// A token that occurs often.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Frequent {
    /// The token.
    pub token: u32,
    /// What it stands for, where the tokenizer is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// How often it occurs.
    pub count: u64,
    /// The part of all tokens that it is.
    pub share: f64,
}

impl Statistics {
    /// Counts tokens. After each document stands `end`, if there is such a token; `text_bytes` became all the others.
    pub(super) fn new(
        tokens: impl Iterator<Item = u32>,
        end: Option<u32>,
        text_bytes: Option<u64>,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        let (mut listed, mut others): (Vec<u64>, BTreeMap<u32, u64>) = (Vec::new(), BTreeMap::new());
        let (mut lengths, mut length) = (Lengths::default(), 0);
        for token in tokens {
            match token as usize {
                place if place < LISTED => {
                    if place >= listed.len() {
                        listed.resize(place + 1, 0);
                    }
                    listed[place] += 1;
                }
                _ => *others.entry(token).or_default() += 1,
            }
            if Some(token) == end {
                lengths.add(length);
                length = 0;
            } else {
                length += 1;
            }
        }
        let mut counts: Vec<(u32, u64)> = (0..).zip(listed).chain(others).filter(|(_, count)| *count > 0).collect();
        let total: u64 = counts.iter().map(|(_, count)| count).sum();
        let ends = lengths.documents();
        counts.sort_by_key(|&(token, count)| (std::cmp::Reverse(count), token));
        let frequent = counts.iter().take(MOST_FREQUENT).map(|&(token, count)| {
            let text = tokenizer.map(|tokenizer| tokenizer.decode(&[token])).transpose()?;
            Ok(Frequent { token, text, count, share: count as f64 / total as f64 })
        });
        Ok(Self {
            distinct_tokens: counts.len() as u64,
            bytes_per_token: text_bytes.filter(|_| total > ends).map(|bytes| bytes as f64 / (total - ends) as f64),
            documents: end.map(|_| ends),
            tokens_per_document: lengths.quantiles(),
            most_frequent: frequent.collect::<Result<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_lengths_that_occur() {
        let mut lengths = Lengths::default();
        assert_eq!(lengths.quantiles(), None);
        (1..=100).for_each(|length| lengths.add(length * 10));
        let found = lengths.quantiles().unwrap();
        let expected = Quantiles { least: 10, p10: 100, median: 500, p90: 900, p99: 990, most: 1000, mean: 505.0 };
        assert_eq!(found, expected);
        let mut one = Lengths::default();
        one.add(7);
        let all = Quantiles { least: 7, p10: 7, median: 7, p90: 7, p99: 7, most: 7, mean: 7.0 };
        assert_eq!(one.quantiles(), Some(all));
    }

    #[test]
    fn tokens_are_counted_between_their_ends() {
        // Documents of 3, 0 and 2 tokens, and one that has not ended.
        let tokens = [5, 9, 5, 0, 0, u32::MAX, 5, 0, 9];
        let found = Statistics::new(tokens.into_iter(), Some(0), Some(12), None).unwrap();
        assert_eq!((found.documents, found.distinct_tokens, found.bytes_per_token), (Some(3), 4, Some(2.0)));
        let lengths = found.tokens_per_document.unwrap();
        assert_eq!((lengths.least, lengths.median, lengths.most), (0, 2, 3));
        let frequent: Vec<_> = found.most_frequent.iter().map(|f| (f.token, f.count)).collect();
        assert_eq!(frequent, [(0, 3), (5, 3), (9, 2), (u32::MAX, 1)]);
        assert_eq!(found.most_frequent[2].share, 2.0 / 9.0);
        let bare = Statistics::new([1, 2].into_iter(), None, None, Some(&Tokenizer::bytes())).unwrap();
        assert_eq!((bare.documents, bare.tokens_per_document, bare.bytes_per_token), (None, None, None));
        assert_eq!(bare.most_frequent[0].text.as_deref(), Some("\u{1}"));
    }
}
