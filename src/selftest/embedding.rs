//! Embeddings.

use super::agreement::{Agreement, get, put, put_integers, put_real, repeated, unwritten};
use crate::{
    Result,
    ops::embedding::{Embedding, EmbeddingShape},
};

struct Case {
    weight: Vec<f64>,
    positions: Vec<f64>,
    tokens: Vec<i32>,
    dx: Vec<f64>,
    /// What dweight holds already.
    held: Option<Vec<f64>>,
    shape: EmbeddingShape,
}

/// x without and with positions, dweight, dpositions.
fn run<B: Embedding>(backend: &B, case: &Case) -> Result<[Vec<f64>; 4]> {
    let shape = case.shape;
    let [weight, positions, dx] = [&case.weight, &case.positions, &case.dx].map(|values| put_real(backend, values));
    let (weight, positions, dx, tokens) = (weight?, positions?, dx?, put_integers(backend, &case.tokens)?);
    let mut plain = unwritten(backend, backend.compute(), dx.len())?;
    let mut placed = unwritten(backend, backend.compute(), dx.len())?;
    let mut dweight = match &case.held {
        Some(held) => put(backend, backend.gradient(), held)?,
        None => unwritten(backend, backend.gradient(), weight.len())?,
    };
    let mut dpositions = unwritten(backend, backend.gradient(), positions.len())?;
    backend.embed(plain.view_mut(), tokens.view(), weight.view(), None, shape);
    // One position on, as when generating.
    let on = EmbeddingShape { start: 1, ..shape };
    backend.embed(placed.view_mut(), tokens.view(), weight.view(), Some(positions.view()), on);
    let (dweight_view, dpositions_view) = (dweight.view_mut(), Some(dpositions.view_mut()));
    backend.embed_backward(dweight_view, dpositions_view, dx.view(), tokens.view(), shape, case.held.is_some());
    Ok([get(backend, &plain)?, get(backend, &placed)?, get(backend, &dweight)?, get(backend, &dpositions)?])
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    // Rows, width, vocabulary, sequence, and which token stands at row r of a vocabulary of v: spread out, every token
    // the last one, a few frequent ones, one that fills more than a window of sorted rows between others.
    type Token = fn(usize, usize) -> usize;
    let cases: [(usize, usize, usize, usize, Token); 7] = [
        (1, 1, 1, 1, |_, _| 0),
        (12, 5, 9, 4, |r, v| (r * r + 3) % v),
        (387, 33, 217, 129, |r, v| (r * r + r / 3) % v),
        (900, 8, 600, 900, |_, v| v - 1),
        (700, 64, 1200, 7, |r, v| (r * 7919 % 1009 * (r % 5) * (r % 3)) % v),
        (600, 776, 1500, 60, |r, v| if r % 3 == 0 { r * 31 % v } else { 512 }),
        (20_000, 3, 700, 100, |r, v| if r % 2 == 0 { 5 } else { r * 17 % v }),
    ];
    for (i, (rows, width, vocabulary, sequence, token)) in cases.into_iter().enumerate() {
        let shape = EmbeddingShape { rows, width, sequence, start: 0, scale: 0.75 };
        let case = Case {
            weight: agreement.normal(1, vocabulary * width, 1.0),
            positions: agreement.normal(2, (sequence + 2) * width, 1.0),
            tokens: (0..rows).map(|r| token(r, vocabulary) as i32).collect(),
            dx: agreement.normal(3, rows * width, 1.0),
            held: (i % 2 == 1).then(|| agreement.normal(4, vocabulary * width, 1.0)),
            shape,
        };
        let got = run(agreement.cuda(), &case)?;
        let wanted = run(agreement.cpu(), &case)?;
        let name = |what: &str| format!("embedding {what} {rows} x {width} of {vocabulary}");
        let (type_rounding, f32_rounding) = (agreement.rounding() * 1.01, 2f64.powi(-24));
        for (what, k) in [("x", 0), ("x with positions", 1)] {
            // A product and a sum, of numbers under 6.
            let bound = |i: usize| type_rounding * wanted[k][i].abs() + 2.0 * f32_rounding * 12.0;
            agreement.compare(name(what), &got[k], &wanted[k], bound);
        }
        // A sum of n gradients, under 1 in the mean and under 6: a rounding for each, and the scale, and what is held.
        let sum = |n: usize| (n + 3) as f64 * f32_rounding * (n + 12) as f64;
        let mut counts = vec![0; vocabulary];
        case.tokens.iter().for_each(|&token| counts[token as usize] += 1);
        let once = agreement.gradient_rounding();
        let bound = |i: usize| sum(counts[i / width]) + once * wanted[2][i].abs();
        agreement.compare(name("dweight"), &got[2], &wanted[2], bound);
        let bound = |i: usize| sum(rows.div_ceil(sequence)) + once * wanted[3][i].abs();
        agreement.compare(name("dpositions"), &got[3], &wanted[3], bound);
    }
    copies(agreement)
}

/// Copies of a unit get the same bits.
fn copies(agreement: &mut Agreement) -> Result<()> {
    const COPIES: usize = 3;
    let (rows, narrow, vocabulary, sequence) = (200, 29, 50, 40);
    let values = |seed, len| repeated(&agreement.normal(seed, len, 1.0), COPIES);
    let case = Case {
        weight: values(1, vocabulary * narrow),
        positions: values(2, (sequence + 2) * narrow),
        tokens: (0..rows).map(|r| if r % 2 == 0 { 5 } else { (r * r % vocabulary) as i32 }).collect(),
        dx: values(3, rows * narrow),
        held: Some(values(4, vocabulary * narrow)),
        shape: EmbeddingShape { rows, width: COPIES * narrow, sequence, start: 0, scale: 0.75 },
    };
    let [_, x, dweight, dpositions] = run(agreement.cuda(), &case)?;
    for (what, got) in [("x", x), ("dweight", dweight), ("dpositions", dpositions)] {
        agreement.compare_copies(format!("embedding copies {what}"), &got, COPIES);
    }
    Ok(())
}
