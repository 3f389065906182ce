//! Random numbers (provisional; the numerical floor replaces this file).
/// A stream of random numbers.
#[derive(Clone, Copy, Debug)]
pub struct Stream(u64);
impl Stream {
    /// provisional
    pub fn new(seed: u64, name: &str) -> Self {
        let h = blake3::hash(name.as_bytes());
        Self(seed ^ u64::from_le_bytes(h.as_bytes()[..8].try_into().unwrap()))
    }
    /// provisional
    pub fn normal_fill(&self, start: u64, out: &mut [f32]) {
        for (i, x) in out.iter_mut().enumerate() {
            let mut s = 0.0f32;
            for k in 0..12u64 {
                let mut z = self.0 ^ ((start + i as u64) * 12 + k).wrapping_mul(0x9e3779b97f4a7c15);
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
                s += ((z ^ (z >> 31)) >> 40) as f32 / 16777216.0;
            }
            *x = s - 6.0;
        }
    }
}
