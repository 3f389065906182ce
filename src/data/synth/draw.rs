//! Discrete distributions with explicit probabilities, and the generator that draws from them.
//!
//! Weights and draws use only + − × ÷ on f64 and integer arithmetic, so a seed gives the same text on every platform (−ln p is
//! the platform's logarithm, which differs in the last bit at most).

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
#[derive(Clone)]
pub(super) struct Random(u64);

/// SplitMix64's output function: a bijection that scatters neighbouring inputs.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of `(seed, index)`; streams of different pairs are unrelated.
    pub(super) fn new(seed: u64, index: u64) -> Self {
        Self(mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ index))
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³.
    pub(super) fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }
}

/// A distribution over 0..n.
pub(super) struct Dist {
    /// Cumulative probability at the upper end of each option; the last is 1.
    upper: Box<[f64]>,
    /// −ln p of each option.
    nats: Box<[f64]>,
}

impl Dist {
    /// Probabilities proportional to `weights`, which must be positive.
    pub(super) fn new(weights: &[f64]) -> Self {
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let mut upper: Box<[f64]> = weights
            .iter()
            .map(|w| {
                sum += w / total;
                sum
            })
            .collect();
        if let Some(last) = upper.last_mut() {
            *last = 1.0;
        }
        Self { upper, nats: weights.iter().map(|w| -(w / total).ln()).collect() }
    }

    /// Zipf–Mandelbrot over 0..n: weight 1 / (rank + flat), ranks from 1.
    pub(super) fn zipf(n: usize, flat: f64) -> Self {
        Self::new(&zipf_weights(n, flat))
    }

    /// A taste: `share` of the probability falls on `count` favourites picked by `random` from `base` and ranked by
    /// Zipf's law, the rest follows `base`.
    pub(super) fn taste(base: &Dist, count: usize, share: f64, random: &mut Random) -> Self {
        let below = std::iter::once(0.0).chain(base.upper.iter().copied());
        let mut weights: Vec<f64> = base.upper.iter().zip(below).map(|(up, low)| (1.0 - share) * (up - low)).collect();
        let ranks = zipf_weights(count, 1.0);
        let total: f64 = ranks.iter().sum();
        for rank in ranks {
            weights[base.draw(random)] += share * rank / total;
        }
        Self::new(&weights)
    }

    /// One draw.
    pub(super) fn draw(&self, random: &mut Random) -> usize {
        let u = random.uniform();
        self.upper.partition_point(|&upper| upper <= u)
    }

    /// Number of options.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nats.len()
    }

    /// −ln p of option `i`; None outside the range.
    pub(super) fn nats(&self, i: usize) -> Option<f64> {
        self.nats.get(i).copied()
    }
}

fn zipf_weights(n: usize, flat: f64) -> Vec<f64> {
    (1..=n).map(|rank| 1.0 / (rank as f64 + flat)).collect()
}
