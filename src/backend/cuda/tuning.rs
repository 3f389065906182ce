//! Which algorithm each matrix product takes, where that was measured (`autotune`): kept with a run and given back when it
//! is resumed, as another algorithm adds in another order.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Algorithms by product, on one kind of device with one version of the library.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Tuning {
    /// The GPU's name.
    pub device: String,
    /// cuBLASLt's version.
    pub library: usize,
    /// The library's description of the algorithm, by the product's.
    pub algorithms: BTreeMap<String, [u64; 8]>,
}

impl Tuning {
    /// Nothing measured yet.
    pub fn new(device: &str, library: usize) -> Self {
        Self { device: device.into(), library, algorithms: BTreeMap::new() }
    }

    /// Takes over what was measured before, if it was on such a device with this version of the library. False if not.
    pub fn take_over(&mut self, text: &str) -> bool {
        let before = serde_json::from_str::<Self>(text).ok();
        let fits = before.filter(|before| (&before.device, before.library) == (&self.device, self.library));
        fits.map(|before| self.algorithms.extend(before.algorithms)).is_some()
    }
}
