use super::*;
use crate::{
    backend::Tensor,
    ops::{
        pieces::{PIECE, Piece},
        scalars::SCALARS,
        tests::{cpu, elements, floats, random, tensor, values},
    },
};

const SGD: Method = Method::Sgd { momentum: 0.0, dampening: 0.0, nesterov: false };
const ADAM: Method = Method::Adam { beta1: 0.9, beta2: 0.95, coupled: true, amsgrad: false };
const ADAMW: Method = Method::Adam { beta1: 0.9, beta2: 0.95, coupled: false, amsgrad: false };
const LION: Method = Method::Lion { beta1: 0.9, beta2: 0.99 };
const METHODS: [Method; 9] = [
    SGD,
    Method::Sgd { momentum: 0.9, dampening: 0.0, nesterov: false },
    Method::Sgd { momentum: 0.9, dampening: 0.3, nesterov: false },
    Method::Sgd { momentum: 0.9, dampening: 0.0, nesterov: true },
    ADAM,
    ADAMW,
    Method::Adam { beta1: 0.9, beta2: 0.95, coupled: true, amsgrad: true },
    Method::Adam { beta1: 0.9, beta2: 0.95, coupled: false, amsgrad: true },
    LION,
];

/// A weight with its moments, updated as the papers say, one number at a time.
#[derive(Clone, Copy, Default)]
struct Number {
    w: f64,
    m: f64,
    v: f64,
    max: f64,
}

impl Number {
    fn update(&mut self, method: Method, g: f64, lr: f64, wd: f64, eps: f64, t: i32) {
        match method {
            Method::Sgd { momentum, dampening, nesterov } => {
                let g = g + wd * self.w;
                self.m = if t == 1 { g } else { momentum * self.m + (1.0 - dampening) * g };
                let by = match (momentum > 0.0, nesterov) {
                    (false, _) => g,
                    (true, false) => self.m,
                    (true, true) => g + momentum * self.m,
                };
                self.w -= lr * by;
            }
            Method::Adam { beta1, beta2, coupled, amsgrad } => {
                let g = if coupled { g + wd * self.w } else { g };
                if !coupled {
                    self.w *= 1.0 - lr * wd;
                }
                self.m = beta1 * self.m + (1.0 - beta1) * g;
                self.v = beta2 * self.v + (1.0 - beta2) * g * g;
                self.max = self.max.max(self.v);
                let v = if amsgrad { self.max } else { self.v };
                let (m, v) = (self.m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
                self.w -= lr * m / (v.sqrt() + eps);
            }
            Method::Lion { beta1, beta2 } => {
                let u = beta1 * self.m + (1.0 - beta1) * g;
                let sign = if u == 0.0 { 0.0 } else { u.signum() };
                self.w -= lr * wd * self.w + lr * sign;
                self.m = beta2 * self.m + (1.0 - beta2) * g;
            }
        }
    }
}

/// The weights after four steps of torch.optim 2.15 in float64: lr 0.1, weight_decay 0.01, eps 1e-4, weights from
/// [0.5, −1.25, 2.0], gradients [0.3 t − 0.8, −0.2, 1e-3 / t].
const PYTORCH: [[f64; 3]; 8] = [
    [0.5178231679505001, -1.16512741502125, 1.9918040916521],
    [0.6621152166005001, -1.05800249514625, 1.9813630389821],
    [0.6645630914250216, -1.0936567346172887, 1.9847854976322703],
    [0.6631912210457611, -0.9926664122255571, 1.9750637480628874],
    [0.7479420083461107, -0.8502464258536413, 1.603251508903171],
    [0.7490264251713022, -0.8458066955009998, 1.6692423656931357],
    [0.747723792850438, -0.8502464258536413, 1.603251508903171],
    [0.7486222251800557, -0.8458066955009998, 1.669243728245703],
];

#[test]
fn the_reference_of_these_tests_is_pytorchs() {
    for (method, expected) in METHODS.into_iter().zip(PYTORCH) {
        let mut numbers = [0.5, -1.25, 2.0].map(|w| Number { w, ..Number::default() });
        for t in 1..5 {
            let gradients = [0.3 * f64::from(t) - 0.8, -0.2, 1e-3 / f64::from(t)];
            for (number, g) in numbers.iter_mut().zip(gradients) {
                number.update(method, g, 0.1, 0.01, 1e-4, t);
            }
        }
        // A few roundings in each of four steps of numbers under 2.
        assert!(numbers.iter().zip(expected).all(|(n, e)| (n.w - e).abs() < 1e-14), "{method:?}");
    }
}

/// Three rows: one of two pieces, one that belongs to Muon, one of odd size; padding lies between them.
struct Model<F: Real> {
    cpu: Cpu<F>,
    pieces: Pieces<Cpu<F>>,
    scalars: Tensor<Cpu<F>>,
    weights: Tensor<Cpu<F>>,
    moments: [Tensor<Cpu<F>>; 3],
    partials: Vec<f64>,
}

const ARENA: usize = PIECE + 300;
const SETTINGS: [RowSettings; 3] = [
    RowSettings { lr: 0.5, decay: 0.02, eps: 1e-3, clip: 1.0, muon: 0 },
    RowSettings { lr: 1.0, decay: 0.1, eps: 1e-8, clip: 1.0, muon: 1 },
    RowSettings { lr: 2.0, decay: 0.0, eps: 1e-6, clip: 1.0, muon: 0 },
];

fn list() -> Vec<Piece> {
    let piece = |offset: usize, len: u32, row| Piece { offset: offset as u64, len, row };
    vec![piece(0, PIECE as u32, 0), piece(PIECE, 19, 0), piece(PIECE + 64, 50, 1), piece(PIECE + 128, 161, 2)]
}

impl<F: Real> Model<F> {
    fn new(threads: usize) -> Self {
        let cpu = cpu::<F>(threads);
        Self {
            pieces: Pieces::new(&cpu, list(), SETTINGS.to_vec()).unwrap(),
            scalars: tensor(&cpu, &[0.0; SCALARS]),
            weights: floats(&cpu, &random(1, ARENA)),
            moments: std::array::from_fn(|_| floats(&cpu, &vec![0.0; ARENA])),
            partials: vec![f64::NAN; 4],
            cpu,
        }
    }

    fn step(&mut self, method: Method, gradients: &Tensor<Cpu<F>>, t: i32, skip: f64) {
        let set =
            [(Scalar::LearningRate, 0.01), (Scalar::Time, f64::from(t)), (Scalar::Factor, 0.25), (Scalar::Skip, skip)];
        for (scalar, value) in set {
            *scalar.in_mut(self.scalars.view_mut().into_slice()) = value;
        }
        let [first, second, maximum] = self.moments.each_mut().map(|m| Some(m.view_mut()));
        let weights = self.weights.view_mut();
        let arenas = Arenas { weights, master: None, first, second, maximum, gradients: gradients.view() };
        let mut partials = tensor(&self.cpu, &[f64::NAN; 4]);
        self.cpu.update(arenas, partials.view_mut(), self.scalars.view(), &self.pieces, method);
        self.partials = elements(&partials);
    }

    fn state(&self) -> [Vec<f64>; 4] {
        let [first, second, maximum] = self.moments.each_ref().map(values);
        [values(&self.weights), first, second, maximum]
    }
}

/// Gradients of step t; element 0 has none, ever.
fn gradients(t: i32) -> Vec<f64> {
    let mut gradients = random(100 + t as u64, ARENA);
    gradients[0] = 0.0;
    gradients
}

/// The numbers after each of five steps, and Σ of squared changes in each piece of the last step.
fn reference(method: Method) -> (Vec<Number>, [f64; 4]) {
    let mut numbers: Vec<Number> = random(1, ARENA).into_iter().map(|w| Number { w, ..Number::default() }).collect();
    let mut changes = [0.0; 4];
    for t in 1..6 {
        let gradients = gradients(t);
        changes = [0.0; 4];
        for (piece, change) in list().iter().zip(&mut changes) {
            let row = SETTINGS[piece.row as usize];
            for i in piece.range().filter(|_| row.muon == 0) {
                let before = numbers[i].w;
                numbers[i].update(method, 0.25 * gradients[i], 0.01 * row.lr, row.decay, row.eps, t);
                *change += (numbers[i].w - before).powi(2);
            }
        }
    }
    (numbers, changes)
}

/// Which moments a method keeps.
fn kept(method: Method) -> [bool; 3] {
    match method {
        Method::Sgd { momentum, .. } => [momentum > 0.0, false, false],
        Method::Adam { amsgrad, .. } => [true, true, amsgrad],
        Method::Lion { .. } => [true, false, false],
    }
}

fn follows_the_reference<F: Real>(tolerance: f64) {
    for method in METHODS {
        let (numbers, changes) = reference(method);
        let mut model = Model::<F>::new(2);
        for t in 1..6 {
            let gradients = floats(&model.cpu, &gradients(t));
            model.step(method, &gradients, t, 0.0);
        }
        let [weights, first, second, maximum] = model.state();
        let [has_first, has_second, has_maximum] = kept(method);
        for (i, n) in numbers.iter().enumerate() {
            let near = |x: f64, y: f64| (x - y).abs() <= tolerance;
            assert!(near(weights[i], n.w), "{method:?}: weight {i}: {} {}", weights[i], n.w);
            assert!(near(first[i], if has_first { n.m } else { 0.0 }), "{method:?}: first moment {i}");
            assert!(near(second[i], if has_second { n.v } else { 0.0 }), "{method:?}: second moment {i}");
            assert!(near(maximum[i], if has_maximum { n.max } else { 0.0 }), "{method:?}: maximum {i}");
        }
        for (partial, change) in model.partials.iter().zip(changes) {
            // n changes of at most 0.03, each known to 2 · tolerance.
            assert!((partial - change).abs() <= PIECE as f64 * 2.0 * 0.03 * 2.0 * tolerance, "{method:?}: {change}");
        }
    }
}

#[test]
fn f64_follows_the_papers() {
    follows_the_reference::<f64>(1e-14);
}

#[test]
fn f32_follows_f64_to_its_rounding() {
    // Five steps of at most 8 roundings of numbers under 2. Adam's quotient m / √v is at most 1 / √(1 − β₂) ≈ 4.5 and
    // its rounding is scaled by lr = 0.02. Under Lion a sign differs only where u rounds to the other side of zero.
    follows_the_reference::<f32>(5.0 * 8.0 * 2f64.powi(-23));
}

#[test]
fn bits_do_not_depend_on_threads_and_f64_gradients_may_sum_for_f32_weights() {
    for method in METHODS {
        let mut states = Vec::new();
        for threads in [1, 2, 3] {
            for wide in [false, true] {
                let mut model = Model::<f32>::new(threads);
                for t in 1..4 {
                    let gradients = gradients(t);
                    let tensor = if wide { tensor(&model.cpu, &gradients) } else { floats(&model.cpu, &gradients) };
                    model.step(method, &tensor, t, 0.0);
                }
                states.push((model.state(), model.partials));
            }
        }
        assert!(states.iter().all(|s| *s == states[0]), "{method:?}");
    }
}

#[test]
fn a_skipped_step_changes_nothing() {
    let mut model = Model::<f32>::new(2);
    let gradients = floats(&model.cpu, &vec![f64::NAN; ARENA]);
    let before = model.state();
    model.step(ADAMW, &gradients, 1, 1.0);
    assert_eq!(model.state(), before);
    assert_eq!(model.partials, [0.0; 4]);
}

impl<F: Real> Model<F> {
    /// The same with moments in bf16.
    fn narrow(threads: usize) -> Self {
        let mut model = Self::new(threads);
        model.moments = std::array::from_fn(|_| Tensor::new(&model.cpu, DType::BF16, ARENA).unwrap());
        model
    }
}

/// The values of a tensor of bf16.
fn halves<F: Real>(tensor: &Tensor<Cpu<F>>) -> Vec<f64> {
    elements::<F, bf16>(tensor).into_iter().map(|x| f64::from(x.to_f32())).collect()
}

/// The first step computes in f32 what moments in f32 give; what is kept is a neighbour of it, and not always the nearest.
#[test]
fn moments_in_bf16_are_neighbours_of_those_in_f32() {
    for method in METHODS.into_iter().filter(|&method| kept(method)[0]) {
        let (mut wide, mut narrow) = (Model::<f32>::new(2), Model::<f32>::narrow(2));
        let gradients = floats(&wide.cpu, &gradients(1));
        wide.step(method, &gradients, 1, 0.0);
        narrow.step(method, &gradients, 1, 0.0);
        assert_eq!(values(&narrow.weights), values(&wide.weights), "{method:?}");
        assert_eq!(narrow.partials, wide.partials, "{method:?}");
        for k in 0..3 {
            let (exact, kept) = (values(&wide.moments[k]), halves(&narrow.moments[k]));
            let mut farther = 0;
            for (i, (exact, kept)) in exact.iter().zip(&kept).enumerate() {
                let bits = (*exact as f32).to_bits() >> 16;
                let both = [bits, bits + 1].map(|bits| f64::from(f32::from_bits(bits << 16)));
                assert!(both.contains(kept), "{method:?}: moment {k} of {i}: {exact} became {kept}");
                farther += usize::from((exact - kept).abs() > (both[1] - both[0]).abs() / 2.0);
            }
            // A fourth of the elements are rounded to the neighbour that is farther off.
            let some = exact.iter().filter(|&&m| m != 0.0).count();
            assert!(
                some == 0 || (some / 5..some / 3).contains(&farther),
                "{method:?}: moment {k}: {farther} of {some}"
            );
        }
        if self::kept(method)[2] {
            assert_eq!(halves(&narrow.moments[2]), halves(&narrow.moments[1]), "a maximum of one is that one");
        }
    }
}

/// Moments that move by less than half the distance of neighbours at each step arrive, in the mean, where those in f32 do;
/// rounded to nearest they would stand still.
#[test]
fn moments_in_bf16_follow_in_the_mean() {
    let method = Method::Adam { beta1: 0.99, beta2: 0.999, coupled: false, amsgrad: false };
    let (mut wide, mut narrow) = (Model::<f32>::new(2), Model::<f32>::narrow(2));
    let gradients = floats(&wide.cpu, &vec![1.0; ARENA]);
    for t in 1..=300 {
        wide.step(method, &gradients, t, 0.0);
        narrow.step(method, &gradients, t, 0.0);
    }
    for k in 0..2 {
        // All elements of the first row are alike.
        let exact = values(&wide.moments[k])[0];
        let kept = &halves(&narrow.moments[k])[..PIECE];
        let mean = kept.iter().sum::<f64>() / PIECE as f64;
        let deviation = (kept.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / PIECE as f64).sqrt();
        assert!(deviation > 0.0, "moment {k} is not random");
        assert!(
            (mean - exact).abs() < 5.0 * deviation / (PIECE as f64).sqrt(),
            "moment {k}: {mean} instead of {exact}"
        );
    }
}

#[test]
fn threads_and_pieces_change_no_bit_of_moments_in_bf16() {
    for method in METHODS {
        let mut states = Vec::new();
        for threads in [1, 2, 3] {
            let mut model = Model::<f32>::narrow(threads);
            if threads == 3 {
                // The row of two pieces cut elsewhere.
                let [first, second, rest @ ..] = &list()[..] else { unreachable!("four pieces") };
                let cut = |offset: u64, end: u64| Piece { offset, len: (end - offset) as u32, row: 0 };
                let end = second.offset + u64::from(second.len);
                let list = [&[cut(first.offset, 1001), cut(1001, end)], rest].concat();
                model.pieces = Pieces::new(&model.cpu, list, SETTINGS.to_vec()).unwrap();
            }
            for t in 1..4 {
                let gradients = floats(&model.cpu, &gradients(t));
                model.step(method, &gradients, t, 0.0);
            }
            states.push((values(&model.weights), model.moments.each_ref().map(halves)));
        }
        assert!(states.iter().all(|s| *s == states[0]), "{method:?}");
    }
}
