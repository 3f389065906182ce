//! Random numbers as a pure function of (seed, name, index), the same on every machine, backend and cut into ranges.
//!
//! # The generator
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the 64-bit seed,
//! low word first. The counter's low 64 bits are the number of the block, its high 64 bits the first eight bytes,
//! little-endian, of the BLAKE3 hash of the stream's name; words are in order of rising significance.
//!
//! Blocks come in groups of 16, and element i of a stream is made by group g = i / 64, word q = (i / 16) mod 4 of block
//! b = 16·g + i mod 16. So neighbours in memory are neighbours in lanes or threads.
//!
//! # Normal numbers
//! Words 0 and 1 of a block make its normals 0 and 1, words 2 and 3 its normals 2 and 3, by Box and Muller's transform
//! of (w, v), in f32, each operation rounded to nearest, no contraction, denormals kept; `fma` is one rounding:
//!
//! 1. u = fma(float(w >> 1), 2⁻³¹, 2⁻³²), where float rounds to nearest: 2⁻³² ≤ u ≤ 1.
//! 2. e = (bits(u) − 0x3f2aaaab) >> 23 (arithmetic), f = float_from_bits(bits(u) − (e << 23)) − 1: −⅓ ≤ f < ⅓.
//! 3. p = [`LOG`] in f by Horner's rule with fma, highest first; l = fma(f·f, fma(f, p, −0.5), f) ≈ ln(1 + f).
//! 4. r = √(fma(float(e), −2 ln 2, −2·l)), where a negative radicand (a rounding error at u = 1) counts as 0.
//! 5. k = (v + 2²⁹) >> 30 modulo 2³² (the quadrant), t = float(int(v − (k << 30))) · (2π·2⁻³²): |t| ≤ π/4; s = t·t.
//! 6. [`SIN`] and [`COS`] in s by Horner's rule with fma: sin = fma(t·s, P, t), cos = fma(s·s, Q, fma(s, −0.5, 1)).
//! 7. If k is odd, (cos, sin) ← (−sin, cos); if k ≥ 2, both change sign.
//! 8. The normals are r·cos, then r·sin.

/// Blocks computed together, and their lanes.
const LANES: usize = 16;
/// Elements of a group of blocks.
const GROUP: usize = 4 * LANES;

/// Coefficients of ln(1 + f) = f − f²/2 + f³·P(f) on [−⅓, ⅓], lowest first.
const LOG: [f32; 8] = [
    0.333_332_15,
    -0.249_997_97,
    0.200_104_06,
    -0.166_804_87,
    0.140_058_62,
    -0.121_842_78,
    0.139_844_67,
    -0.128_916_01,
];
/// Coefficients of sin t = t + t³·P(t²) on [−π/4, π/4], lowest first.
const SIN: [f32; 3] = [-0.166_666_55, 0.008_332_178, -0.000_195_172_34];
/// Coefficients of cos t = 1 − t²/2 + t⁴·Q(t²) on [−π/4, π/4], lowest first.
const COS: [f32; 3] = [0.041_666_646, -0.001_388_736_7, 0.000_024_438_378];

/// An endless sequence of random numbers that belongs to a seed and a name; any part of it can be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    name: u64,
}

impl Stream {
    /// The stream of a seed and a name, for example a tensor's.
    pub fn new(seed: u64, name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let (first, _) = hash.as_bytes().as_chunks::<8>();
        Self { seed, name: u64::from_le_bytes(first[0]) }
    }

    /// The seed and the number that stands for the name: what other backends draw the same numbers from.
    pub(crate) fn key(&self) -> [u64; 2] {
        [self.seed, self.name]
    }

    /// Elements `start`, `start + 1`, … of the stream as standard normal numbers.
    pub fn normal_fill(&self, start: u64, out: &mut [f32]) {
        self.fill(
            start,
            out,
            #[inline(always)]
            |words| {
                let ((x, y), (z, w)) = (normal_pairs(&words[0], &words[1]), normal_pairs(&words[2], &words[3]));
                [x, y, z, w]
            },
        );
    }

    /// Elements `start`, `start + 1`, … of the stream, uniform in [0, 1) with 24 bits.
    pub fn uniform_fill(&self, start: u64, out: &mut [f32]) {
        self.fill(
            start,
            out,
            #[inline(always)]
            |words| {
                words.map(
                    #[inline(always)]
                    |w| {
                        w.map(
                            #[inline(always)]
                            |w| (w >> 8) as i32 as f32 * (1.0 / 16_777_216.0),
                        )
                    },
                )
            },
        );
    }

    /// Uniform words of 64 neighbours, four of them to a block: element i of them, 64·`group` ≤ i, has word i mod 4 of
    /// block i / 4. (What is drawn for few neighbours at a time takes few blocks; normal numbers are laid out otherwise.)
    #[inline(always)]
    pub(crate) fn neighbours(&self, group: u64) -> [u32; GROUP] {
        let words = self.words(group);
        std::array::from_fn(
            #[inline(always)]
            |i| words[i % 4][i / 4],
        )
    }

    /// A generator of single draws that starts at element 0 of this stream.
    pub fn rng(&self) -> Rng {
        Rng { stream: *self, next: 0 }
    }

    /// Writes what `draw` makes of each group's words.
    fn fill(&self, start: u64, out: &mut [f32], draw: impl Fn(&Words) -> [[f32; LANES]; 4]) {
        let (first, offset) = (start / GROUP as u64, (start % GROUP as u64) as usize);
        let (head, rest) = out.split_at_mut(((GROUP - offset) % GROUP).min(out.len()));
        let (groups, tail) = rest.as_chunks_mut::<GROUP>();
        let second = first.wrapping_add(u64::from(offset > 0));
        let last = second.wrapping_add(groups.len() as u64);
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (group, out) in (second..).zip(groups) {
                    for (out, drawn) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(draw(&self.words(group))) {
                        *out = drawn;
                    }
                }
            },
        );
        for (group, offset, out) in [(first, offset, head), (last, 0, tail)] {
            if !out.is_empty() {
                out.copy_from_slice(&draw(&self.words(group)).as_flattened()[offset..][..out.len()]);
            }
        }
    }

    /// The words of the 16 blocks of a group: `[q][lane]` is word q of block 16·group + lane.
    #[inline(always)]
    fn words(&self, group: u64) -> Words {
        let blocks: [u64; LANES] = std::array::from_fn(|lane| group.wrapping_mul(LANES as u64) + lane as u64);
        let counter = [blocks, blocks.map(|b| b >> 32), [self.name; LANES], [self.name >> 32; LANES]];
        philox(counter, [self.seed as u32, (self.seed >> 32) as u32])
    }
}

type Words = [[u32; LANES]; 4];

/// Philox4x32-10 in 16 lanes. Of each 64-bit counter word only the low half counts; the high half may hold anything,
/// which spares the masks: a vector instruction multiplies low halves.
#[inline(always)]
fn philox(mut counter: [[u64; LANES]; 4], mut key: [u32; 2]) -> Words {
    const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        for lane in 0..LANES {
            let low = MULTIPLIERS[0] * (c0[lane] & 0xffff_ffff);
            let high = MULTIPLIERS[1] * (c2[lane] & 0xffff_ffff);
            counter[0][lane] = (high >> 32) ^ c1[lane] ^ u64::from(key[0]);
            counter[1][lane] = high;
            counter[2][lane] = (low >> 32) ^ c3[lane] ^ u64::from(key[1]);
            counter[3][lane] = low;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter.map(
        #[inline(always)]
        |lanes| lanes.map(|word| word as u32),
    )
}

/// Steps 1 to 8 of the module's text.
#[inline(always)]
fn normal_pairs(w: &[u32; LANES], v: &[u32; LANES]) -> ([f32; LANES], [f32; LANES]) {
    let (mut first, mut second) = ([0.0; LANES], [0.0; LANES]);
    for lane in 0..LANES {
        let radius = radius(w[lane]);
        let (cos, sin) = direction(v[lane]);
        (first[lane], second[lane]) = (radius * cos, radius * sin);
    }
    (first, second)
}

/// √(−2 ln u), steps 1 to 4.
#[inline(always)]
fn radius(w: u32) -> f32 {
    let u = ((w >> 1) as i32 as f32).mul_add(TWO_TO_MINUS_31, 0.5 * TWO_TO_MINUS_31);
    let e = u.to_bits().wrapping_sub(0x3f2a_aaab) as i32 >> 23;
    let f = f32::from_bits(u.to_bits().wrapping_sub((e << 23) as u32)) - 1.0;
    let p = horner(f, LOG);
    let log = (f * f).mul_add(f.mul_add(p, -0.5), f);
    let square = (e as f32).mul_add(-2.0 * std::f32::consts::LN_2, -2.0 * log);
    (if square > 0.0 { square } else { 0.0 }).sqrt()
}

/// The cosine and sine of 2π·v / 2³², steps 5 to 7.
#[inline(always)]
fn direction(v: u32) -> (f32, f32) {
    let quadrant = v.wrapping_add(1 << 29) >> 30;
    let t = v.wrapping_sub(quadrant << 30) as i32 as f32 * (std::f32::consts::PI * TWO_TO_MINUS_31);
    let s = t * t;
    let sin = (t * s).mul_add(horner(s, SIN), t);
    let cos = (s * s).mul_add(horner(s, COS), s.mul_add(-0.5, 1.0));
    let swapped = quadrant & 1 != 0;
    let (x, y) = if swapped { (-sin, cos) } else { (cos, sin) };
    let sign = quadrant >> 1 << 31;
    (f32::from_bits(x.to_bits() ^ sign), f32::from_bits(y.to_bits() ^ sign))
}

const TWO_TO_MINUS_31: f32 = 1.0 / 2_147_483_648.0;

/// Horner's rule with fma, lowest coefficient first.
#[inline(always)]
fn horner<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        sum = sum.mul_add(x, coefficients[i]);
    }
    sum
}

/// Single draws on the host, for sampling and shuffling: element after element of a [`Stream`].
#[derive(Clone, Debug)]
pub struct Rng {
    stream: Stream,
    next: u64,
}

impl Rng {
    /// How many 64-bit draws have been made; with the stream it is the whole state.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Goes to a position that [`position`](Self::position) gave.
    pub fn set_position(&mut self, position: u64) {
        self.next = position;
    }

    /// 64 random bits: words 0 (low) and 1 of the block with the position's number.
    pub fn next_u64(&mut self) -> u64 {
        let words = self.stream.words(self.next / LANES as u64);
        let lane = (self.next % LANES as u64) as usize;
        self.next = self.next.wrapping_add(1);
        u64::from(words[0][lane]) | u64::from(words[1][lane]) << 32
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0 .. `n`, without bias (D. Lemire, "Fast random integer generation in an interval", 2019); 0 if n is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= n.wrapping_neg().checked_rem(n).unwrap_or(0) {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests;
