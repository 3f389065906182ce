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

use crate::{
    DType, Result,
    backend::{Backend, cuda::Cuda},
};

/// A group of checks, by its name.
type Check = fn(&mut Agreement) -> Result<()>;

/// Groups, and whether they have to do with gradients of parameters or with moments.
const CHECKS: [(&str, Check, bool); 14] = [
    ("activation", activation::check, false),
    ("attention", attention::check, false),
    ("embedding", embedding::check, true),
    ("expand", expand::check, false),
    ("gradient", gradient::check, true),
    ("head", head::check, true),
    ("head_norm", head_norm::check, true),
    ("linear", linear::check, true),
    ("linear_activation", linear_activation::check, false),
    ("muon", muon::check, true),
    ("norm", norm::check, true),
    ("optimizer", optimizer::check, true),
    ("rotary", rotary::check, false),
    ("training", training::check, true),
];

/// Makes the checks whose name contains `only`; where gradients or moments are bf16, those that have to do with them.
pub fn run(cuda: &Cuda, only: &str) -> Result<Vec<Row>> {
    let mut agreement = Agreement::new(cuda)?;
    let narrow = cuda.gradient() == DType::BF16 || cuda.moment() == DType::BF16;
    for (_, check, _) in CHECKS.iter().filter(|(name, _, kept)| name.contains(only) && (*kept || !narrow)) {
        check(&mut agreement)?;
    }
    Ok(agreement.into_rows())
}
