//! Threads of the CPU backend (provisional; the numerical floor replaces this file).
use crate::Result;
/// Threads.
pub struct Pool(usize);
impl Pool {
    /// A pool of this many threads, 0 for all cores.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self(threads.max(1)))
    }
    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.0
    }
}
