//! The optimum of swept axes: a quadratic through the losses near the best point, in the axes' logarithms, and how sure
//! it is, by a bootstrap over seeds.

use crate::rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A run of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Its value on each axis.
    pub at: Vec<f64>,
    /// Its seed.
    pub seed: i64,
    /// Its loss; none if it diverged.
    pub loss: Option<f64>,
}

/// Where the loss is least along an axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Edge {
    /// The range to try next.
    pub try_next: [f64; 2],
}

/// Draws of seeds.
pub const DRAWS: usize = 1000;
/// Values on either side of the best that the quadratic goes through: at most so many,
const REACH: usize = 2;
/// and beyond the neighbour only within this factor: further away a loss is no quadratic, and would bend it.
const FACTOR: f64 = 4.1;

/// A point of the axes.
type Place = Vec<f64>;
/// Mean losses for some choice of seeds; a point at which any run diverged is left out.
type Curve = Vec<(Place, f64)>;

/// Finds the optimum, for each axis; None if every run diverged.
///
/// Zero has no logarithm: it takes no part in the quadratic, but may be the best value (no noise is a choice).
pub fn optima(runs: &[Measured]) -> Option<Vec<Optimum>> {
    let mut seeds: Vec<i64> = runs.iter().map(|run| run.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let curve = curve(runs, &seeds);
    let (place, loss) = least(&curve)?;
    let best = &curve.iter().min_by(|a, b| a.1.total_cmp(&b.1))?.0;
    let draws = if seeds.len() > 1 { draws(runs, &seeds) } else { Vec::new() };
    let along = |axis: usize| Optimum {
        x: place[axis],
        loss,
        interval: (seeds.len() > 1).then(|| middle_of(draws.iter().map(|place| place[axis]).collect(), place[axis])),
        best: best[axis],
        edge: edge(runs, axis, best[axis]),
    };
    Some((0..place.len()).map(along).collect())
}

/// The optima of [`DRAWS`] draws of seeds.
fn draws(runs: &[Measured], seeds: &[i64]) -> Vec<Place> {
    let stream = rng::Stream::new(0, "bootstrap");
    let drawn = |draw: usize| {
        let mut parts = vec![0.0; seeds.len()];
        stream.uniform_fill((draw * seeds.len()) as u64, &mut parts);
        let pick = |part: &f32| seeds[((*part as f64) * seeds.len() as f64) as usize % seeds.len()];
        let drawn: Vec<i64> = parts.iter().map(pick).collect();
        least(&curve(runs, &drawn)).map(|(place, _)| place)
    };
    (0..DRAWS).filter_map(drawn).collect()
}

/// 5 % and 95 % of some values.
fn middle_of(mut values: Vec<f64>, otherwise: f64) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    let at = |part: f64| values[((values.len() - 1) as f64 * part).round() as usize];
    if values.is_empty() { [otherwise; 2] } else { [at(0.05), at(0.95)] }
}

fn curve(runs: &[Measured], seeds: &[i64]) -> Curve {
    let mut by_place: BTreeMap<Vec<u64>, (Place, Vec<Option<f64>>)> = BTreeMap::new();
    for &seed in seeds {
        for run in runs.iter().filter(|run| run.seed == seed) {
            let key = run.at.iter().map(|x| x.to_bits()).collect();
            by_place.entry(key).or_insert((run.at.clone(), Vec::new())).1.push(run.loss);
        }
    }
    let mean = |losses: Vec<Option<f64>>| {
        let n = losses.len() as f64;
        losses.into_iter().sum::<Option<f64>>().map(|sum| sum / n)
    };
    by_place.into_values().filter_map(|(place, losses)| Some((place, mean(losses)?))).collect()
}

/// Where a quadratic about the best point reaches along an axis, and where its least point may lie: between the best
/// value's neighbours. None where the best value is the first or the last, or next to zero: there it stays.
struct Reach {
    near: [f64; 2],
    between: [f64; 2],
}

impl Reach {
    fn new(curve: &Curve, axis: usize, best: f64) -> Option<Self> {
        let mut xs: Vec<f64> = curve.iter().map(|(place, _)| place[axis]).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        let at = xs.iter().position(|&x| x == best)?;
        let inside = at > 0 && at + 1 < xs.len() && xs[at - 1] > 0.0;
        inside.then(|| Self {
            near: [
                *xs[at.saturating_sub(REACH)..at].iter().find(|&&x| best <= FACTOR * x).unwrap_or(&xs[at - 1]),
                *xs[at + 1..].iter().take(REACH).rev().find(|&&x| x <= FACTOR * best).unwrap_or(&xs[at + 1]),
            ],
            between: [xs[at - 1], xs[at + 1]],
        })
    }
}

/// The least point of the quadratic near the best point, or that point itself where there is no such quadratic.
fn least(curve: &Curve) -> Option<(Place, f64)> {
    let (best, loss) = curve.iter().min_by(|a, b| a.1.total_cmp(&b.1))?.clone();
    let reaches: Vec<Option<Reach>> = best.iter().enumerate().map(|(i, &x)| Reach::new(curve, i, x)).collect();
    let free: Vec<usize> = (0..best.len()).filter(|&axis| reaches[axis].is_some()).collect();
    let within = |place: &Place| {
        place.iter().zip(&reaches).zip(&best).all(|((&x, reach), &best)| match reach {
            Some(Reach { near: [low, high], .. }) => x > 0.0 && (*low..=*high).contains(&x),
            None => x == best,
        })
    };
    let logs = |place: &Place| -> Vec<f64> { free.iter().map(|&axis| (place[axis] / best[axis]).log2()).collect() };
    let near: Vec<(Vec<f64>, f64)> =
        curve.iter().filter(|(place, _)| within(place)).map(|(place, y)| (logs(place), *y)).collect();
    // Axes that were swept one at a time say nothing of how they interact.
    let fitted = [true, false].into_iter().find_map(|cross| quadratic(&near, free.len(), cross)?.least());
    let Some((logs, fitted)) = fitted else { return Some((best, loss)) };
    let mut place = best.clone();
    for (&axis, log) in free.iter().zip(logs) {
        place[axis] *= log.exp2();
        let [low, high] = reaches[axis].as_ref()?.between;
        if !(low..=high).contains(&place[axis]) {
            return Some((best, loss));
        }
    }
    Some((place, fitted))
}

/// c + b·u + u·A·u
struct Quadratic {
    a: Vec<Vec<f64>>,
    b: Vec<f64>,
    c: f64,
}

/// The quadratic nearest to points (u, y), by least squares; without `cross` A is diagonal. None where the points do not
/// determine it.
fn quadratic(points: &[(Vec<f64>, f64)], n: usize, cross: bool) -> Option<Quadratic> {
    let pairs: Vec<(usize, usize)> =
        (0..n).flat_map(|i| (i..n).map(move |j| (i, j))).filter(|(i, j)| cross || i == j).collect();
    let size = 1 + n + pairs.len();
    if n == 0 || points.len() < size {
        return None;
    }
    let (mut normal, mut right) = (vec![vec![0.0; size]; size], vec![0.0; size]);
    for (u, y) in points {
        let products = pairs.iter().map(|&(i, j)| u[i] * u[j]);
        let features: Vec<f64> = [1.0].into_iter().chain(u.iter().copied()).chain(products).collect();
        for (i, f) in features.iter().enumerate() {
            right[i] += f * y;
            features.iter().enumerate().for_each(|(j, g)| normal[i][j] += f * g);
        }
    }
    let found = solve(normal, right)?;
    let mut a = vec![vec![0.0; n]; n];
    for (&(i, j), &value) in pairs.iter().zip(&found[1 + n..]) {
        a[i][j] += value / 2.0;
        a[j][i] += value / 2.0;
    }
    Some(Quadratic { a, b: found[1..=n].to_vec(), c: found[0] })
}

impl Quadratic {
    /// Its least point and value; None where it has none.
    fn least(&self) -> Option<(Vec<f64>, f64)> {
        if !positive(self.a.clone()) {
            return None;
        }
        let u = solve(self.a.clone(), self.b.iter().map(|b| -b / 2.0).collect())?;
        let linear: f64 = u.iter().zip(&self.b).map(|(u, b)| u * b).sum();
        // At the least point u·A·u = −b·u / 2.
        Some((u, self.c + linear / 2.0))
    }
}

/// Whether a symmetric matrix is positive definite: whether elimination without exchange has positive pivots.
fn positive(mut a: Vec<Vec<f64>>) -> bool {
    (0..a.len()).all(|k| {
        let pivot = a[k].clone();
        for row in &mut a[k + 1..] {
            let factor = row[k] / pivot[k];
            row.iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
        }
        pivot[k] > 0.0
    })
}

/// The solution of a small linear system, by elimination with exchange of rows; None if it is singular.
fn solve(mut a: Vec<Vec<f64>>, mut right: Vec<f64>) -> Option<Vec<f64>> {
    let n = right.len();
    let scale = a.iter().flatten().fold(0.0_f64, |most, x| most.max(x.abs()));
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[i][k].abs().total_cmp(&a[j][k].abs()))?;
        a.swap(k, pivot);
        right.swap(k, pivot);
        if a[k][k].abs() <= 1e-12 * scale {
            return None;
        }
        let (row, value) = (a[k].clone(), right[k]);
        for i in (0..n).filter(|&i| i != k) {
            let factor = a[i][k] / row[k];
            a[i].iter_mut().zip(&row).for_each(|(x, p)| *x -= factor * p);
            right[i] -= factor * value;
        }
    }
    Some((0..n).map(|k| right[k] / a[k][k]).collect())
}

/// Whether the best value is the first or last one that was run, diverged ones counted, and where to look then.
fn edge(runs: &[Measured], axis: usize, best: f64) -> Option<Edge> {
    let mut xs: Vec<f64> = runs.iter().map(|run| run.at[axis]).filter(|x| *x > 0.0).collect();
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
        best if best == first && !runs.iter().any(|run| run.at[axis] == 0.0) => {
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
        xs.iter()
            .flat_map(|&x| (0..seeds).map(move |seed| Measured { at: vec![x], seed, loss: Some(loss(x, seed)) }))
            .collect()
    }

    fn optimum(runs: &[Measured]) -> Option<Optimum> {
        optima(runs).map(|mut all| all.remove(0))
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
    fn values_far_away_do_not_bend_it() {
        // Losses that were measured over a wide axis: the least of them lies at 10, not between 1 and 3.
        let measured = [(0.3, 1.945), (1.0, 1.929), (3.0, 1.847), (10.0, 1.619), (30.0, 2.07), (100.0, 2.5)];
        let runs = measured.map(|(x, loss)| Measured { at: vec![x], seed: 0, loss: Some(loss) });
        let found = optimum(&runs).unwrap();
        assert!((6.0..12.0).contains(&found.x), "{found:?}");
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
        runs.iter_mut().filter(|run| run.at[0] > 2e-2 && run.seed == 1).for_each(|run| run.loss = None);
        let found = optimum(&runs).unwrap();
        // One of two seeds diverged at 3e-2: 1e-2 is the best that holds, and it is no edge.
        assert_eq!((found.best, found.edge), (1e-2, None));
        runs.iter_mut().for_each(|run| run.loss = None);
        assert_eq!(optimum(&runs), None);
    }

    #[test]
    fn zero_may_be_the_best_noise() {
        let mut runs = bowl(1e-6, &[1e-2, 1e-1, 1.0], 1);
        runs.push(Measured { at: vec![0.0], seed: 0, loss: Some(0.5) });
        let found = optimum(&runs).unwrap();
        assert_eq!((found.x, found.edge), (0.0, None));
    }

    #[test]
    fn a_tilted_bowl_over_two_axes_has_its_optimum_where_it_was_put() {
        let (lr, noise) = (2e-3_f64, 0.08_f64);
        let loss = |at: &[f64], seed: i64| {
            let shift = if at.len() > 1 { [0.0, 0.1, -0.1][seed as usize % 3] } else { 0.0 };
            let (u, v) = ((at[0] / lr).log2() - shift, (at[1] / noise).log2());
            2.0 + 0.1 * u * u + 0.05 * v * v + 0.06 * u * v
        };
        let sigmas = [0.01, 0.03, 0.1, 0.3, 1.0];
        let run = |at: Vec<f64>, seed: i64| Measured { loss: Some(loss(&at, seed)), at, seed };
        let grid = |seed: i64| XS.iter().flat_map(move |&x| sigmas.map(|s| run(vec![x, s], seed)));
        let found = optima(&(0..3).flat_map(grid).collect::<Vec<_>>()).unwrap();
        for (found, at) in found.iter().zip([lr, noise]) {
            assert!((found.x / at - 1.0).abs() < 1e-9 && found.edge.is_none(), "{found:?}");
        }
        let [low, high] = found[0].interval.unwrap();
        assert!(low < lr && lr < high && high / low < 2f64.powf(0.21), "{found:?}");
        // Swept one axis at a time, as a cross through (1e-3, 0.1), the interaction is not seen.
        let cross: Vec<_> = grid(0).filter(|run| run.at[0] == 1e-3 || run.at[1] == 0.1).collect();
        let found = optima(&cross).unwrap();
        assert!((found[0].x / lr).log2().abs() < 0.5 && (found[0].x / lr - 1.0).abs() > 1e-3, "{found:?}");
        // No noise at all is best: it stays, and the learning rate is fitted at it.
        let mut with_zero: Vec<_> = grid(0).collect();
        with_zero.extend(XS.map(|x| Measured { at: vec![x, 0.0], seed: 0, loss: Some(1.0 + (x / lr).log2().powi(2)) }));
        let found = optima(&with_zero).unwrap();
        assert!((found[0].x / lr - 1.0).abs() < 1e-9 && found[1].x == 0.0, "{found:?}");
    }
}
