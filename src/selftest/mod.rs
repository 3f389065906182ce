//! Whether a device computes what the CPU does: `mupscale selftest`.
//!
//! Every op runs on the device and, in f64, on the CPU, with the same inputs (rounded to the device's compute type), and
//! each element's difference must be within a bound that follows from the type's rounding and from what is summed. Then
//! small models are trained on the device, as they are, saved and loaded, and widened.

mod activation;
mod agreement;
mod attention;
mod embedding;
mod expand;
mod gradient;
mod head;
mod head_norm;
mod linear;
mod linear_activation;
mod muon;
mod norm;
mod optimizer;
mod rotary;
mod training;

pub use agreement::{Agreement, Row};

use crate::{Result, backend::cuda::Cuda};

/// A group of checks, by its name.
type Check = fn(&mut Agreement) -> Result<()>;

const CHECKS: [(&str, Check); 14] = [
    ("activation", activation::check),
    ("attention", attention::check),
    ("embedding", embedding::check),
    ("expand", expand::check),
    ("gradient", gradient::check),
    ("head", head::check),
    ("head_norm", head_norm::check),
    ("linear", linear::check),
    ("linear_activation", linear_activation::check),
    ("muon", muon::check),
    ("norm", norm::check),
    ("optimizer", optimizer::check),
    ("rotary", rotary::check),
    ("training", training::check),
];

/// Makes the checks whose name contains `only`.
pub fn run(cuda: &Cuda, only: &str) -> Result<Vec<Row>> {
    let mut agreement = Agreement::new(cuda)?;
    for (_, check) in CHECKS.iter().filter(|(name, _)| name.contains(only)) {
        check(&mut agreement)?;
    }
    Ok(agreement.into_rows())
}
