//! Whether a device computes what the CPU does: `mupscale selftest`.
//!
//! Every op runs on the device and, in f64, on the CPU, with the same inputs (rounded to the device's compute type), and
//! each element's difference must be within a bound that follows from the type's rounding and from what is summed.

mod agreement;
mod linear;

pub use agreement::{Agreement, Row};

use crate::{Result, backend::cuda::Cuda};

/// Compares every op.
pub fn ops(cuda: &Cuda) -> Result<Vec<Row>> {
    let mut agreement = Agreement::new(cuda)?;
    linear::check(&mut agreement)?;
    Ok(agreement.into_rows())
}
