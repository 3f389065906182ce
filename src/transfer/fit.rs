//! The optimum of a swept axis: a parabola through the losses near the best point, in the axis's logarithm, and how
//! sure it is, by a bootstrap over seeds.

use crate::rng;
use serde::Serialize;
use std::collections::BTreeMap;

/// A run on the axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Its value on the axis.
    pub x: f64,
    /// Its seed.
    pub seed: i64,
    /// Its loss; none if it diverged.
    pub loss: Option<f64>,
}

/// Where the loss is least.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Optimum {
    /// The value on the axis.
    pub x: f64,
    /// The loss there, by the fit.
    pub loss: f64,
    /// 5 % and 95 % of the optima of [`DRAWS`] draws of seeds; none with one seed.
    pub interval: Option<[f64; 2]>,
    /// The best value that was run.
    pub best: f64,
    /// The best value lies at the end of what was run: where to look next.
    pub edge: Option<Edge>,
}

/// An end of the axis at which the optimum lies.
#[derive(Clone, Copy, Debug, Serialize, PartialEq)]
pub struct Edge {
    /// The range to try next.
    pub try_next: [f64; 2],
}

/// Draws of seeds.
pub const DRAWS: usize = 1000;
/// Points on either side of the best that the parabola goes through.
const REACH: usize = 2;

/// Losses by x for some choice of seeds: (x, mean loss), rising in x; a value at which any run diverged is left out.
type Curve = Vec<(f64, f64)>;

/// Finds the optimum; None if every run diverged.
///
/// Zero has no logarithm: it takes no part in the parabola, but may be the best value (no noise is a choice).
pub fn optimum(runs: &[Measured]) -> Option<Optimum> {
    let mut seeds: Vec<i64> = runs.iter().map(|run| run.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let curve = curve(runs, &seeds);
    let (x, loss) = vertex(&curve)?;
    let best = curve.iter().min_by(|a, b| a.1.total_cmp(&b.1))?.0;
    let interval = (seeds.len() > 1).then(|| {
        let stream = rng::Stream::new(0, "bootstrap");
        let mut draws: Vec<f64> = (0..DRAWS)
            .filter_map(|draw| {
                let mut parts = vec![0.0; seeds.len()];
                stream.uniform_fill((draw * seeds.len()) as u64, &mut parts);
                let pick = |part: &f32| seeds[((*part as f64) * seeds.len() as f64) as usize % seeds.len()];
                let drawn: Vec<i64> = parts.iter().map(pick).collect();
                vertex(&self::curve(runs, &drawn)).map(|(x, _)| x)
            })
            .collect();
        draws.sort_by(f64::total_cmp);
        let at = |part: f64| draws[((draws.len() - 1) as f64 * part).round() as usize];
        if draws.is_empty() { [x, x] } else { [at(0.05), at(0.95)] }
    });
    Some(Optimum { x, loss, interval, best, edge: edge(runs, best) })
}

fn curve(runs: &[Measured], seeds: &[i64]) -> Curve {
    let mut by_x: BTreeMap<u64, (f64, Vec<Option<f64>>)> = BTreeMap::new();
    for &seed in seeds {
        for run in runs.iter().filter(|run| run.seed == seed) {
            // The order of positive floats is that of their bits.
            by_x.entry(run.x.to_bits()).or_insert((run.x, Vec::new())).1.push(run.loss);
        }
    }
    let mean = |losses: Vec<Option<f64>>| {
        let n = losses.len() as f64;
        losses.into_iter().sum::<Option<f64>>().map(|sum| sum / n)
    };
    by_x.into_values().filter_map(|(x, losses)| Some((x, mean(losses)?))).collect()
}

/// The least point of the parabola near the best point, or that point itself where there is no such parabola.
fn vertex(curve: &Curve) -> Option<(f64, f64)> {
    let best = (0..curve.len()).min_by(|&a, &b| curve[a].1.total_cmp(&curve[b].1))?;
    let (low, high) = (best.saturating_sub(REACH), (best + REACH + 1).min(curve.len()));
    let near: Vec<(f64, f64)> =
        curve[low..high].iter().filter(|(x, _)| *x > 0.0).map(|(x, y)| (x.log2(), *y)).collect();
    let inside = best > 0 && best + 1 < curve.len() && curve[best - 1].0 > 0.0;
    if !inside || near.len() < 3 {
        return Some(curve[best]);
    }
    let (a, b, c) = parabola(&near)?;
    let x = -b / (2.0 * a);
    let between = (curve[best - 1].0.log2()..=curve[best + 1].0.log2()).contains(&x);
    if a > 0.0 && between { Some((x.exp2(), a * x * x + b * x + c)) } else { Some(curve[best]) }
}

/// y = a x² + b x + c by least squares.
fn parabola(points: &[(f64, f64)]) -> Option<(f64, f64, f64)> {
    // About the middle, so that powers stay small.
    let n = points.len() as f64;
    let middle = points.iter().map(|p| p.0).sum::<f64>() / n;
    let moment = |p: i32| points.iter().map(|(x, _)| (x - middle).powi(p)).sum::<f64>();
    let product = |p: i32| points.iter().map(|(x, y)| (x - middle).powi(p) * y).sum::<f64>();
    let (s1, s2, s3, s4) = (moment(1), moment(2), moment(3), moment(4));
    let (t0, t1, t2) = (product(0), product(1), product(2));
    let det = |m: [[f64; 3]; 3]| {
        m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1]) - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
            + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
    };
    let all = det([[s4, s3, s2], [s3, s2, s1], [s2, s1, n]]);
    if all.abs() < 1e-12 {
        return None;
    }
    let a = det([[t2, s3, s2], [t1, s2, s1], [t0, s1, n]]) / all;
    let b = det([[s4, t2, s2], [s3, t1, s1], [s2, t0, n]]) / all;
    let c = det([[s4, s3, t2], [s3, s2, t1], [s2, s1, t0]]) / all;
    Some((a, b - 2.0 * a * middle, c - b * middle + a * middle * middle))
}

/// Whether the best value is the first or last one that was run, diverged ones counted, and where to look then.
fn edge(runs: &[Measured], best: f64) -> Option<Edge> {
    let mut xs: Vec<f64> = runs.iter().map(|run| run.x).filter(|x| *x > 0.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let (first, last) = (*xs.first()?, *xs.last()?);
    if xs.len() < 2 {
        return None;
    }
    let step = xs[1] / xs[0];
    let back = xs[xs.len() - 1] / xs[xs.len() - 2];
    match best {
        // Nothing is below zero.
        0.0 => None,
        best if best == first && !runs.iter().any(|run| run.x == 0.0) => {
            Some(Edge { try_next: [first / step.powi(3), first * step] })
        }
        best if best == last => Some(Edge { try_next: [last / back, last * back.powi(3)] }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losses 1 + (log2 x − log2 at)² / 10, shifted a little by seed.
    fn bowl(at: f64, xs: &[f64], seeds: i64) -> Vec<Measured> {
        let shift = |seed: i64| [0.0, 0.2, -0.2][seed as usize % 3];
        let loss = |x: f64, seed: i64| 1.0 + (x.log2() - at.log2() - shift(seed)).powi(2) / 10.0;
        xs.iter().flat_map(|&x| (0..seeds).map(move |seed| Measured { x, seed, loss: Some(loss(x, seed)) })).collect()
    }

    const XS: [f64; 6] = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2];

    #[test]
    fn a_bowl_has_its_optimum_where_it_was_put() {
        let one = optimum(&bowl(2e-3, &XS, 1)).unwrap();
        assert!((one.x / 2e-3 - 1.0).abs() < 1e-9, "{one:?}");
        assert_eq!((one.interval, one.edge), (None, None));
        let three = optimum(&bowl(2e-3, &XS, 3)).unwrap();
        let [low, high] = three.interval.unwrap();
        assert!(low < 2e-3 && 2e-3 < high && high / low < 2f64.powf(0.41), "{three:?}");
    }

    #[test]
    fn an_optimum_at_the_edge_is_said_with_the_range_to_try() {
        let low = optimum(&bowl(1e-6, &XS, 1)).unwrap();
        assert_eq!(low.best, 1e-4);
        let [from, to] = low.edge.unwrap().try_next;
        assert!(from < 1e-4 / 20.0 && to > 1e-4, "{from} {to}");
        let high = optimum(&bowl(1.0, &XS, 1)).unwrap();
        assert!(high.edge.unwrap().try_next[1] > 3e-2);
    }

    #[test]
    fn divergence_bounds_the_axis_and_all_of_it_is_no_optimum() {
        let mut runs = bowl(1.0, &XS, 2);
        runs.iter_mut().filter(|run| run.x > 2e-2 && run.seed == 1).for_each(|run| run.loss = None);
        let found = optimum(&runs).unwrap();
        // One of two seeds diverged at 3e-2: 1e-2 is the best that holds, and it is no edge.
        assert_eq!((found.best, found.edge), (1e-2, None));
        runs.iter_mut().for_each(|run| run.loss = None);
        assert_eq!(optimum(&runs), None);
    }

    #[test]
    fn zero_may_be_the_best_noise() {
        let mut runs = bowl(1e-6, &[1e-2, 1e-1, 1.0], 1);
        runs.push(Measured { x: 0.0, seed: 0, loss: Some(0.5) });
        let found = optimum(&runs).unwrap();
        assert_eq!((found.x, found.edge), (0.0, None));
    }
}
