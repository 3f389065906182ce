//! A linear layer and the activation beside it, in one: a GPU's matrix product may apply GELU to its sums before it
//! writes them, or multiply them by its slope, so that memory is passed over once less.

mod cuda;

use super::{
    activation::{Activate, Activation},
    linear::{Linear, LinearShape},
};
use crate::backend::{
    Mut, Ref,
    cpu::{Cpu, Real},
};

/// Linear layers with an activation.
pub trait LinearActivation: Linear + Activate {
    /// before = x · weightᵀ + bias, as [`Linear::linear`] has it, and after = f(before).
    fn linear_activate(
        &self,
        after: Mut<'_, Self>,
        mut before: Mut<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        bias: Option<Ref<'_, Self>>,
        shape: LinearShape,
        kind: Activation,
    ) {
        self.linear(before.reborrow(), x, weight, bias, shape);
        self.activate(after, before.as_ref(), kind);
    }

    /// Back through a linear layer of this shape and the activation before it: dbefore = (dy · weight) · f′(before), where
    /// dbefore and before are rows × inputs.
    fn linear_activate_backward(
        &self,
        mut dbefore: Mut<'_, Self>,
        dy: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        before: Ref<'_, Self>,
        shape: LinearShape,
        kind: Activation,
    ) {
        self.linear_backward_input(dbefore.reborrow(), dy, weight, shape);
        self.activate_backward(dbefore, before, kind);
    }
}

impl<F: Real> LinearActivation for Cpu<F> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_gradient, cpu, dot, floats, random, unwritten, values};

    const SHAPE: LinearShape = LinearShape { rows: 5, inputs: 7, outputs: 3 };

    /// after · weightᵀ, for after = f(before).
    fn forward(before: &[f64], weight: &[f64], kind: Activation) -> Vec<f64> {
        let cpu = cpu::<f64>(2);
        let (mut after, mut y) = (unwritten(&cpu, before.len()), unwritten(&cpu, SHAPE.rows * SHAPE.outputs));
        cpu.activate(after.view_mut(), floats(&cpu, before).view(), kind);
        cpu.linear(y.view_mut(), after.view(), floats(&cpu, weight).view(), None, SHAPE);
        values(&y)
    }

    #[test]
    fn gradient() {
        let (before, weight) = (random(1, SHAPE.rows * SHAPE.inputs), random(2, SHAPE.inputs * SHAPE.outputs));
        let dy = random(3, SHAPE.rows * SHAPE.outputs);
        for kind in [Activation::GeluTanh, Activation::GeluExact] {
            let cpu = cpu::<f64>(2);
            let (dy_there, weight_there) = (floats(&cpu, &dy), floats(&cpu, &weight));
            let mut d = unwritten(&cpu, before.len());
            let inputs = floats(&cpu, &before);
            let (dy_view, weight_view) = (dy_there.view(), weight_there.view());
            cpu.linear_activate_backward(d.view_mut(), dy_view, weight_view, inputs.view(), SHAPE, kind);
            assert_gradient(&format!("{kind:?}"), &before, &values(&d), |x| dot(&dy, &forward(x, &weight, kind)));
        }
    }

    #[test]
    fn the_argument_is_kept() {
        let cpu = cpu::<f64>(1);
        let (x, weight, bias) = (random(1, 35), random(2, 21), random(3, 3));
        let [x, weight, bias] = [x, weight, bias].map(|values| floats(&cpu, &values));
        let (mut after, mut before) = (unwritten(&cpu, 15), unwritten(&cpu, 15));
        let (to, argument, kind) = (after.view_mut(), before.view_mut(), Activation::Relu);
        cpu.linear_activate(to, argument, x.view(), weight.view(), Some(bias.view()), SHAPE, kind);
        let mut alone = unwritten(&cpu, 15);
        cpu.linear(alone.view_mut(), x.view(), weight.view(), Some(bias.view()), SHAPE);
        assert_eq!(values(&before), values(&alone));
        let relu: Vec<f64> = values(&before).iter().map(|x| x.max(0.0)).collect();
        assert!(relu.contains(&0.0) && values(&after) == relu);
    }
}
