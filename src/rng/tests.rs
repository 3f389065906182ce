use super::*;

/// The known answers of Random123's `kat_vectors` for philox4x32 with 10 rounds: counter, key, result.
const KNOWN: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
    ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
    ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
    (
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
    ),
];

fn normals(seed: u64, name: &str, start: u64, len: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; len];
    Stream::new(seed, name).normal_fill(start, &mut out);
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn philox_gives_the_known_answers() {
    for (counter, key, result) in KNOWN {
        // High halves hold anything.
        let words = philox(counter.map(|c| [u64::from(c) | 0xabcd << 32; LANES]), key);
        assert_eq!(words, result.map(|r| [r; LANES]));
    }
}

#[test]
fn a_block_is_made_of_seed_name_and_number_as_stated() {
    let stream = Stream { seed: 0x299f_31d0_a409_3822, name: 0x0370_7344_1319_8a2e };
    let words = stream.words(0x85a3_08d3_243f_6a88 / 16);
    assert_eq!(words.map(|w| w[8]), KNOWN[2].2);
    let name = u64::from_le_bytes(blake3::hash(b"layers.0.up").as_bytes()[..8].try_into().unwrap());
    assert_eq!(Stream::new(7, "layers.0.up"), Stream { seed: 7, name });
}

#[test]
fn an_element_does_not_depend_on_the_cut() {
    let all = normals(1, "w", 0, 1000);
    for (start, len) in [(0, 1), (0, 64), (1, 63), (1, 64), (63, 2), (64, 64), (65, 500), (100, 20), (999, 1), (5, 0)] {
        assert_eq!(bits(&normals(1, "w", start, len)), bits(&all[start as usize..][..len]), "{start} {len}");
    }
    assert_eq!(bits(&normals(1, "w", u64::MAX - 9, 10))[9], bits(&normals(1, "w", u64::MAX, 1))[0]);
}

/// Neighbours share blocks, four to each; a single draw is the first two words of one.
#[test]
fn neighbours_have_the_words_of_blocks() {
    let stream = Stream::new(5, "neighbours");
    let mut draws = stream.rng();
    for group in 0..3 {
        for words in stream.neighbours(group).chunks(4) {
            assert_eq!(u64::from(words[0]) | u64::from(words[1]) << 32, draws.next_u64());
        }
    }
    // Element 4 b + w has word w.
    let of_block = KNOWN[2].2;
    let stream = Stream { seed: 0x299f_31d0_a409_3822, name: 0x0370_7344_1319_8a2e };
    let block: u64 = 0x85a3_08d3_243f_6a88;
    let words = stream.neighbours(block / 16);
    let at = (block % 16 * 4) as usize;
    assert_eq!(words[at..at + 4], of_block);
}

#[test]
fn seeds_and_names_give_other_numbers() {
    let base = normals(1, "w", 0, 64);
    for other in [normals(2, "w", 0, 64), normals(1 << 32, "w", 0, 64), normals(1, "v", 0, 64), normals(1, "w", 64, 64)]
    {
        assert!(base.iter().zip(&other).all(|(a, b)| a != b));
    }
}

/// The scalar functions, compiled for the baseline with a software fma, are the definition.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    let stream = Stream::new(3, "x");
    for (i, z) in normals(3, "x", 0, 4096).into_iter().enumerate() {
        let (group, word, lane) = (i / GROUP, i / LANES % 4, i % LANES);
        let words = stream.words(group as u64);
        let (cos, sin) = direction(words[word | 1][lane]);
        let expected = radius(words[word & 2][lane]) * if word & 1 == 0 { cos } else { sin };
        assert_eq!(z.to_bits(), expected.to_bits(), "{i}");
    }
}

/// The first numbers of a stream, for the port to another backend, and so that they never change.
#[test]
fn golden_bits() {
    let hash = blake3::hash(bytemuck::cast_slice(&bits(&normals(42, "golden", 0, 1 << 16))));
    assert_eq!(hash.to_hex().as_str(), "6e5ed7e8dafe5925612d722f5ea501ed9a009a4a0bdc5fa8993019dcf273edf4");
}

#[test]
fn radius_and_direction_are_accurate() {
    for i in (0..u32::MAX).step_by(9973).chain([0, 1, 2, u32::MAX]) {
        let u = f64::from(((i >> 1) as i32 as f32).mul_add(TWO_TO_MINUS_31, 0.5 * TWO_TO_MINUS_31));
        let exact = (-2.0 * u.ln()).sqrt();
        assert!((f64::from(radius(i)) - exact).abs() <= 4e-7 * exact + 1e-30, "{i}: {} {exact}", radius(i));
        let (sin, cos) = (std::f64::consts::TAU * f64::from(i) / 4_294_967_296.0).sin_cos();
        let (x, y) = direction(i);
        assert!((f64::from(x) - cos).abs() < 1.2e-7 && (f64::from(y) - sin).abs() < 1.2e-7, "{i}: {x} {y} {cos} {sin}");
    }
    assert_eq!(radius(u32::MAX), 0.0);
    assert!((radius(0) - 6.66).abs() < 0.01);
}

/// Distribution function of N(0, 1).
fn below(x: f64) -> f64 {
    0.5 * libm::erfc(-x / std::f64::consts::SQRT_2)
}

/// Kolmogorov's and Smirnov's distance times √n; over 1.95 in one of a thousand samples of the right distribution.
fn distance(mut x: Vec<f32>, distribution: impl Fn(f64) -> f64) -> f64 {
    x.sort_by(f32::total_cmp);
    let n = x.len() as f64;
    let at = |(i, &x): (usize, &f32)| {
        let p = distribution(x.into());
        (p - i as f64 / n).max((i + 1) as f64 / n - p)
    };
    x.iter().enumerate().map(at).fold(0.0, f64::max) * n.sqrt()
}

#[test]
fn normals_are_normal() {
    let z = normals(11, "moments", 0, 1_000_000);
    let n = z.len() as f64;
    let moment = |k: i32| z.iter().map(|&z| f64::from(z).powi(k)).sum::<f64>() / n;
    // Mean and variance of the k-th power of a normal number: 0, 1; 1, 2; 0, 15; 3, 96. Four standard errors.
    for (k, mean, variance) in [(1, 0.0, 1f64), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
        assert!((moment(k) - mean).abs() < 4.0 * (variance / n).sqrt(), "moment {k}: {}", moment(k));
    }
    // The words of a block, neighbouring lanes and groups are uncorrelated.
    for lag in [1, 16, 32, 48, 64] {
        let product = z.iter().zip(&z[lag..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() / n;
        assert!(product.abs() < 4.0 / n.sqrt(), "lag {lag}: {product}");
    }
    let extreme = z.iter().fold(0f32, |m, z| m.max(z.abs()));
    assert!((4.3..6.2).contains(&extreme), "{extreme}");
    assert!(distance(z, below) < 1.95);
}

#[test]
fn uniforms_are_uniform() {
    let mut x = vec![0.0; 100_000];
    Stream::new(5, "u").uniform_fill(3, &mut x);
    assert!(x.iter().all(|x| (0.0..1.0).contains(x)));
    assert!(distance(x, |x| x) < 1.95);
    let mut rng = Stream::new(5, "u").rng();
    assert!(distance((0..100_000).map(|_| rng.uniform() as f32).collect(), |x| x) < 1.95);
}

#[test]
fn single_draws_resume_and_stay_in_range() {
    let mut rng = Stream::new(9, "sample").rng();
    let mut counts = [0u32; 6];
    for _ in 0..60_000 {
        counts[rng.below(6) as usize] += 1;
    }
    // Four standard deviations of a binomial count with p = 1/6.
    assert!(counts.iter().all(|&c| (f64::from(c) - 10_000.0).abs() < 4.0 * 91.3), "{counts:?}");
    assert_eq!((rng.below(1), rng.below(0)), (0, 0));
    let position = rng.position();
    let ahead: Vec<u64> = (0..40).map(|_| rng.next_u64()).collect();
    let mut again = Stream::new(9, "sample").rng();
    again.set_position(position);
    assert!(ahead.iter().all(|&x| x == again.next_u64()));
}
