//! RoPE.

use super::agreement::{Agreement, get, put, put_real, round};
use crate::{
    DType, Result,
    ops::{
        attention::HeadShape,
        rotary::{Rotary, Rotation},
    },
};

/// Sizes: rows, sequence, first position.
type Places = (usize, usize, usize);

fn run<B: Rotary>(
    backend: &B,
    qkv: &[f64],
    table: &[f64],
    shape: HeadShape,
    (_, sequence, start): Places,
    backward: bool,
) -> Result<Vec<f64>> {
    let (mut qkv, table) = (put_real(backend, qkv)?, put(backend, backend.statistics(), table)?);
    backend.rotate(qkv.view_mut(), Rotation { table: table.view(), sequence, start }, shape, backward);
    get(backend, &qkv)
}

pub(super) fn check(agreement: &mut Agreement) -> Result<()> {
    let shapes = [(1, 1, 2), (2, 3, 6), (2, 2, 64), (1, 6, 192), (3, 1, 34)];
    let places = [(1, 1, 0), (7, 3, 5), (10, 5, 0), (3, 2, 1), (6, 6, 0)];
    for ((kv_heads, group, head_dim), place) in shapes.into_iter().zip(places) {
        let shape = HeadShape { kv_heads, group, head_dim };
        let qkv = agreement.normal(1, place.0 * shape.row(), 1.0);
        let half = head_dim / 2;
        // Both sides start from the same angles, which f32 holds.
        let table: Vec<f64> = (0..(place.1 + place.2) * half)
            .map(|at| (at / half) as f64 * 10_000f64.powf(-((at % half) as f64) / half as f64))
            .flat_map(|angle| [angle.cos(), angle.sin()])
            .map(|x| round(x, DType::F32))
            .collect();
        for backward in [false, true] {
            let got = run(agreement.cuda(), &qkv, &table, shape, place, backward)?;
            let wanted = run(agreement.cpu(), &qkv, &table, shape, place, backward)?;
            // Two products of numbers under 6 and 1, and their sum: three roundings.
            let type_rounding = agreement.rounding() * 1.01;
            let bound = |i: usize| type_rounding * wanted[i].abs() + 2f64.powi(-24) * 3.0 * 12.0;
            let name = format!("rotary {} {head_dim} x {}", if backward { "backward" } else { "forward" }, place.0);
            agreement.compare(name, &got, &wanted, bound);
        }
    }
    Ok(())
}
