//! [`StepScalars`]: what changes from step to step, and every result of a step, as one small f64 tensor on the device.
//! Ops read and write it, so that a step needs no argument from the host and no answer to it.

/// Places in the tensor. Inputs are written by the host before a step, results by ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Scalar {
    /// Input: the schedule's learning rate, at the base shape.
    LearningRate,
    /// Input: the optimizer's step count t, from 1.
    Time,
    /// Result: Σ of the counted tokens' losses in nats, over micro-steps and ranks.
    LossSum,
    /// Result: number of counted tokens, over micro-steps and ranks.
    Counted,
    /// Result: norm of the gradient of the mean loss, before clipping.
    GradNorm,
    /// Result: what gradients are multiplied with in the update: clipping, and (nominal tokens / counted tokens).
    Factor,
    /// Result: 1 when this step's update is not made, because something is not finite or nothing was counted.
    Skip,
    /// Result: 1 from the first step with something not finite on, if training is to stop there: no update any more.
    Halt,
    /// Result: the first table row with a gradient that is not finite; −1 if none; −2 if only the loss is not finite.
    BadRow,
    /// Result: √Σ of squared changes of all weights.
    UpdateNorm,
}

impl Scalar {
    /// This scalar among the tensor's elements.
    pub(crate) fn of(self, scalars: &[f64]) -> f64 {
        scalars[self as usize]
    }

    /// This scalar among the tensor's elements, to write.
    pub(crate) fn in_mut(self, scalars: &mut [f64]) -> &mut f64 {
        &mut scalars[self as usize]
    }
}

/// Elements of the tensor.
pub const SCALARS: usize = 16;

/// Bytes of the tensor, for host buffers.
pub const SCALAR_BYTES: usize = SCALARS * 8;

/// Reads one scalar from a downloaded copy.
pub fn get(bytes: &[u8], scalar: Scalar) -> f64 {
    let at = scalar as usize * 8;
    f64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Writes one scalar into a copy to be uploaded.
pub fn set(bytes: &mut [u8], scalar: Scalar, value: f64) {
    let at = scalar as usize * 8;
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_elements_agree() {
        let mut bytes = [0; SCALAR_BYTES];
        set(&mut bytes, Scalar::Skip, 1.5);
        let mut elements: Vec<f64> = bytemuck::pod_collect_to_vec(&bytes);
        assert_eq!(Scalar::Skip.of(&elements), 1.5);
        *Scalar::UpdateNorm.in_mut(&mut elements) = -2.0;
        assert_eq!(get(bytemuck::cast_slice(&elements), Scalar::UpdateNorm), -2.0);
        assert_eq!(elements.len(), SCALARS);
    }
}
