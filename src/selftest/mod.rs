//! Whether a device computes what the CPU does: `mupscale selftest`.
//!
//! Every op runs on the device and, in f64, on the CPU, with the same inputs (rounded to the device's compute type), and
//! each element's difference must be within a bound that follows from the type's rounding and from what is summed.

mod agreement;
mod expand;
mod gradient;
mod head;
mod linear;
mod muon;
mod optimizer;

pub use agreement::{Agreement, Row};

use crate::{Result, backend::cuda::Cuda};

/// A group of checks, by the op's name.
type Check = fn(&mut Agreement) -> Result<()>;

const CHECKS: [(&str, Check); 6] = [
    ("linear", linear::check),
    ("expand", expand::check),
    ("gradient", gradient::check),
    ("head", head::check),
    ("muon", muon::check),
    ("optimizer", optimizer::check),
];

/// Compares the ops whose name contains `only`.
pub fn ops(cuda: &Cuda, only: &str) -> Result<Vec<Row>> {
    let mut agreement = Agreement::new(cuda)?;
    for (_, check) in CHECKS.iter().filter(|(name, _)| name.contains(only)) {
        check(&mut agreement)?;
    }
    Ok(agreement.into_rows())
}
