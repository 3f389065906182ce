//! The order of samples, as a pure function of (seed, global sample index): nothing to save, nothing to restore, and
//! any rank can ask for any sample.

/// Which of `samples` samples comes at which global index, epoch after epoch.
///
/// Sequential, or shuffled by a bijection of `0..samples` that is keyed by (seed, epoch). The bijection is a Feistel
/// network over a rectangle of about √n × √n whose few surplus cells are skipped by walking the cycle (Black and
/// Rogaway, "Ciphers with arbitrary finite domains", 2002, methods "generalized Feistel" and "cycle walking").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    samples: u64,
    shuffle: Option<u64>,
}

impl Order {
    /// Epochs of `samples` samples, each in file order. `samples` must not be 0.
    pub fn sequential(samples: u64) -> Self {
        assert!(samples > 0, "an order needs at least one sample");
        Self { samples, shuffle: None }
    }

    /// Epochs of `samples` samples, each in an order of its own that `seed` determines. `samples` must not be 0.
    pub fn shuffled(samples: u64, seed: u64) -> Self {
        Self { shuffle: Some(seed), ..Self::sequential(samples) }
    }

    /// Samples in an epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The sample, below `samples`, that comes at the global index `at` (counted from the start of the run, over
    /// epochs).
    pub fn sample(&self, at: u64) -> u64 {
        let (epoch, index) = (at / self.samples, at % self.samples);
        match self.shuffle {
            None => index,
            Some(seed) => permute(index, self.samples, mix(seed ^ mix(epoch))),
        }
    }
}

/// Rounds of the Feistel network; each changes both halves.
const ROUNDS: u64 = 4;

/// A bijection of `0..n`, another one for every key.
fn permute(index: u64, n: u64, key: u64) -> u64 {
    // A rectangle of rows × columns cells: n <= rows·columns < n + rows, so walking the cycle rarely takes a second
    // step.
    let rows = n.isqrt().max(1);
    let columns = n.div_ceil(rows);
    let mut cell = index;
    loop {
        let (mut column, mut row) = (cell / rows, cell % rows);
        for round in 0..ROUNDS {
            column = (column + scaled(mix(key ^ mix(row << 3 | round)), columns)) % columns;
            row = (row + scaled(mix(key ^ !mix(column << 3 | round)), rows)) % rows;
        }
        cell = column * rows + row;
        // Cells from n on lie on the same cycles as those below, so the walk comes back below n.
        if cell < n {
            return cell;
        }
    }
}

/// A hash spread over `0..n`.
fn scaled(hash: u64, n: u64) -> u64 {
    ((u128::from(hash) * u128::from(n)) >> 64) as u64
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Documents or rows in one block of the validation split: one of them is held out. None when nothing is held out.
/// `fraction` is at most 0.5, so a block has at least two.
pub fn held_out_block(fraction: f64) -> Option<u64> {
    (fraction > 0.0).then(|| (1.0 / fraction).round().max(2.0) as u64)
}

/// Whether document or row `index` is held out for validation: exactly one of every 1 / `fraction` consecutive ones, at
/// a place in its block that a hash of the block picks. A pure function, so that every tool agrees on the split.
pub fn is_held_out(index: u64, fraction: f64) -> bool {
    held_out_block(fraction).is_some_and(|block| scaled(mix(index / block), block) == index % block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_epoch_is_a_bijection() {
        for n in 1..2000 {
            for seed in 0..4 {
                let order = Order::shuffled(n, seed);
                for epoch in 0..2 {
                    let mut seen = vec![false; n as usize];
                    (0..n).for_each(|i| seen[order.sample(epoch * n + i) as usize] = true);
                    assert!(seen.iter().all(|&seen| seen), "n {n}, seed {seed}, epoch {epoch}");
                }
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let epoch = |seed, epoch: u64| {
            let order = Order::shuffled(100, seed);
            (0..100u64).map(|i| order.sample(epoch * 100 + i)).collect::<Vec<_>>()
        };
        let all: HashSet<_> = (0..10).flat_map(|seed| (0..10).map(move |e| epoch(seed, e))).collect();
        assert_eq!(all.len(), 100);
    }

    #[test]
    fn small_permutations_all_occur_about_equally_often() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..24_000 {
            let order = Order::shuffled(4, seed);
            *counts.entry([0, 1, 2, 3].map(|i| order.sample(i))).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 24);
        // A fair draw gives 1,000 each with a standard deviation of 31.
        assert!(counts.values().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    #[test]
    fn places_are_spread_evenly_and_neighbours_part() {
        let n = 1009;
        let (mut sum_of_places, mut adjacent) = (0, 0);
        for seed in 0..500 {
            let order = Order::shuffled(n, seed);
            sum_of_places += order.sample(0);
            adjacent += (0..n - 1).filter(|&i| order.sample(i) + 1 == order.sample(i + 1)).count();
        }
        let mean_place = sum_of_places as f64 / 500.0;
        // Mean 504 with a standard deviation of 291 / √500 = 13; one adjacent pair expected per shuffle.
        assert!((mean_place - 504.0).abs() < 65.0, "{mean_place}");
        assert!((300..800).contains(&adjacent), "{adjacent}");
    }

    #[test]
    fn sequential_repeats_the_file_order_and_huge_counts_stay_in_range() {
        let order = Order::sequential(3);
        assert_eq!((0..7).map(|i| order.sample(i)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 0]);
        let huge = Order::shuffled(u64::MAX >> 8, 7);
        assert!((0..1000).all(|i| huge.sample(i) < huge.samples()));
        let places: HashSet<_> = (0..1000).map(|i| huge.sample(i)).collect();
        assert_eq!(places.len(), 1000);
    }

    #[test]
    fn one_of_every_block_is_held_out() {
        for (fraction, block) in [(0.05, 20), (0.5, 2), (0.1, 10)] {
            let held: Vec<u64> = (0..block * 50).filter(|&i| is_held_out(i, fraction)).collect();
            assert_eq!(held.len(), 50);
            assert!(held.iter().enumerate().all(|(at, i)| i / block == at as u64));
            assert!(
                held.iter().map(|i| i % block).collect::<HashSet<_>>().len() > 1,
                "{fraction}: always the same place"
            );
        }
        assert!((0..1000).all(|i| !is_held_out(i, 0.0)));
    }
}
