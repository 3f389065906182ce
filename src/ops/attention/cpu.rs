//! Attention on the CPU.
//!
//! Queries are taken in blocks, each against all keys that any of them sees, so that no later correction of maxima is
//! needed. Scores are kept transposed, keys × queries: a key is then one contiguous row, whose hidden part under the
//! causal border is a prefix; maxima, sums and exponentials go down the columns, a vector of queries at a time; and
//! every product but one finds its operands in the order in which it reads them.

use super::{Attention, AttentionShape, HeadShape, Strided};
use crate::backend::{
    Mut, Ref,
    cpu::{
        Cpu, Real,
        gemm::{Matrix, gemm},
        math::{dot, vectorize},
        parallel::{RowsMut, scratch},
    },
};
use crate::ops::softmax::numerators;
use std::ops::Range;

/// Scores of a block: with their gradients they fit into the cache of a core.
const BLOCK_SCORES: usize = 1 << 17;
/// Queries of a block, at the most.
const BLOCK_QUERIES: usize = 32;

/// Queries that are taken together: few, so that little is computed beyond the causal border (32 was fastest, from 16
/// to 128).
fn query_block(shape: AttentionShape) -> usize {
    let block = (BLOCK_SCORES / shape.keys.max(1) / 16 * 16).clamp(16, BLOCK_QUERIES);
    block.min(shape.queries.max(1))
}

/// One head's part of the rows of a sequence.
struct HeadRows<'a, F> {
    /// From the head's first element in the first row on.
    elements: &'a [F],
    /// Elements from one row to the next.
    stride: usize,
}

impl<'a, F> HeadRows<'a, F> {
    /// The matrix that begins at `row`, with its strides.
    fn from(&self, row: usize) -> Matrix<'a, F> {
        (&self.elements[row * self.stride..], (self.stride, 1))
    }

    /// The same transposed.
    fn transposed(&self, row: usize) -> Matrix<'a, F> {
        (&self.elements[row * self.stride..], (1, self.stride))
    }
}

/// A block of queries of one sequence and the keys that some of them see.
struct Block<'a> {
    /// Queries, counted from the sequence's first.
    queries: Range<usize>,
    /// Keys, counted from the sequence's first.
    keys: Range<usize>,
    /// Position of the first query among the keys.
    position: usize,
    /// First key of every query, if some may be hidden.
    first_key: Option<&'a [i32]>,
}

impl<'a> Block<'a> {
    /// `first_key` is that of the sequence's queries.
    fn new(queries: Range<usize>, first_key: Option<&'a [i32]>, shape: AttentionShape) -> Self {
        let before = shape.keys - shape.queries;
        let first_key = first_key.map(|f| &f[queries.clone()]);
        let end = before + queries.end;
        let first = first_key.and_then(|f| f.iter().min()).map_or(0, |&f| f.max(0) as usize);
        Self { keys: first.min(end)..end, position: before + queries.start, queries, first_key }
    }

    /// Sets the scores, keys × queries, of hidden keys to −∞.
    fn hide<F: Real>(&self, scores: &mut [F]) {
        let width = self.queries.len();
        for key in self.keys.start.max(self.position + 1)..self.keys.end {
            let row = &mut scores[(key - self.keys.start) * width..][..width];
            row[..key - self.position].fill(F::NEG_INFINITY);
        }
        for (query, &first) in self.first_key.unwrap_or_default().iter().enumerate() {
            for key in self.keys.start..self.keys.end.min(first.max(0) as usize) {
                scores[(key - self.keys.start) * width + query] = F::NEG_INFINITY;
            }
        }
    }

    /// Scores of the block, keys × queries.
    fn scores<F: Real>(&self, scores: &mut [F], q: &HeadRows<F>, k: &HeadRows<F>, shape: AttentionShape) {
        let size = (self.keys.len(), self.queries.len(), shape.heads.head_dim);
        let (k, q) = (k.from(self.keys.start), q.transposed(self.queries.start));
        gemm(size, F::from_f64(shape.scale), k, q, F::ZERO, (&mut *scores, (size.1, 1)));
        self.hide(scores);
    }

    /// Writes one head's out, from its first element in the block's first row on, and log_sum_exp likewise.
    fn forward<F: Real>(
        &self,
        out: &mut [F],
        log_sum_exp: &mut [F],
        [q, k, v]: [HeadRows<F>; 3],
        shape: AttentionShape,
    ) {
        let HeadShape { kv_heads, group, head_dim } = shape.heads;
        let (keys, queries) = (self.keys.len(), self.queries.len());
        let (mut max, mut sum) = ([F::ZERO; BLOCK_QUERIES], [0.0; BLOCK_QUERIES]);
        let (max, sum) = (&mut max[..queries], &mut sum[..queries]);
        scratch(keys * queries, |scores: &mut [F]| {
            self.scores(scores, &q, &k, shape);
            numerators(scores, max, sum);
            let width = shape.heads.queries();
            let size = (queries, head_dim, keys);
            gemm(size, F::ONE, (scores, (1, queries)), v.from(self.keys.start), F::ZERO, (&mut *out, (width, 1)));
            for (query, (&max, &sum)) in max.iter().zip(&*sum).enumerate() {
                // Without a key to see there are no numerators: out stays 0 and the logarithm is −∞.
                let factor = if sum == 0.0 { F::ZERO } else { F::from_f64(1.0 / sum) };
                out[query * width..][..head_dim].iter_mut().for_each(|x| *x *= factor);
                log_sum_exp[query * kv_heads * group] = F::from_f64(max.to_f64() + sum.ln());
            }
        });
    }
}

/// What the backward pass reads.
struct Saved<'a, F> {
    qkv: &'a [F],
    out: &'a [F],
    dout: &'a [F],
    log_sum_exp: &'a [F],
    first_key: Option<&'a [i32]>,
    shape: AttentionShape,
}

impl<F: Real> Saved<'_, F> {
    /// The gradients of a key/value head of a sequence and of its group's queries: dq, queries × [group, head_dim], dk
    /// and dv, queries × head_dim each.
    fn backward(&self, sequence: usize, kv_head: usize, gradients: &mut [F]) {
        let HeadShape { group, head_dim, .. } = self.shape.heads;
        let tokens = self.shape.queries;
        let (dq, dkv) = gradients.split_at_mut(tokens * group * head_dim);
        dkv.fill(F::ZERO);
        let block = query_block(self.shape);
        let first_key = self.first_key.map(|f| &f[sequence * tokens..][..tokens]);
        scratch(2 * block * tokens + 2 * block, |memory: &mut [F]| {
            for member in 0..group {
                for start in (0..tokens).step_by(block) {
                    let block = Block::new(start..(start + block).min(tokens), first_key, self.shape);
                    let head = kv_head * group + member;
                    let dq = &mut dq[start * group * head_dim + member * head_dim..];
                    self.block_backward(&block, sequence, head, dq, dkv, memory);
                }
            }
        });
    }

    /// Writes dq of a block, from the head's first element in the block's first row on, and adds to dk and dv.
    fn block_backward(
        &self,
        block: &Block,
        sequence: usize,
        head: usize,
        dq: &mut [F],
        dkv: &mut [F],
        memory: &mut [F],
    ) {
        let HeadShape { kv_heads, group, head_dim } = self.shape.heads;
        let (row, width, tokens) = (self.shape.heads.row(), self.shape.heads.queries(), self.shape.queries);
        let from = sequence * tokens;
        let part = |x, stride, at| HeadRows { elements: <[F]>::split_at(x, from * stride + at).1, stride };
        let q = part(self.qkv, row, head * head_dim);
        let k = part(self.qkv, row, width + head / group * head_dim);
        let v = part(self.qkv, row, width + (kv_heads + head / group) * head_dim);
        let [out, dout] = [self.out, self.dout].map(|x| part(x, width, head * head_dim));
        let first = block.queries.start;
        let (keys, queries) = (block.keys.len(), block.queries.len());

        let (statistics, scores) = memory.split_at_mut(2 * queries);
        let (log_sum_exp, inner) = statistics.split_at_mut(queries);
        let (p, ds) = scores[..2 * keys * queries].split_at_mut(keys * queries);
        for (i, (log, inner)) in log_sum_exp.iter_mut().zip(&mut *inner).enumerate() {
            let saved = self.log_sum_exp[(sequence * tokens + first + i) * kv_heads * group + head];
            *log = if saved == F::NEG_INFINITY { F::ZERO } else { saved };
            let (out, dout) = (&out.from(first + i).0[..head_dim], &dout.from(first + i).0[..head_dim]);
            *inner = vectorize!(dot(out, dout));
        }
        block.scores(p, &q, &k, self.shape);
        let (scores, by_row) = ((keys, queries, head_dim), (queries, 1));
        gemm(scores, F::ONE, v.from(block.keys.start), dout.transposed(first), F::ZERO, (&mut *ds, by_row));
        let scale = F::from_f64(self.shape.scale);
        vectorize!(score_gradients(p, ds, log_sum_exp, inner, scale));

        let (dk, dv) = dkv.split_at_mut(tokens * head_dim);
        let [dk, dv] = [dk, dv].map(|x| (&mut x[block.keys.start * head_dim..], (head_dim, 1)));
        let by_key = (keys, head_dim, queries);
        gemm(by_key, F::ONE, (p, by_row), dout.from(first), F::ONE, dv);
        gemm(by_key, F::ONE, (ds, by_row), q.from(first), F::ONE, dk);
        let dq = (dq, (group * head_dim, 1));
        gemm((queries, head_dim, keys), F::ONE, (ds, (1, queries)), k.from(block.keys.start), F::ZERO, dq);
    }
}

/// Turns scores into probabilities, and the gradient by the probabilities into that by the scores before scaling:
/// ds = p ∘ (dp − inner) · scale, with inner = Σ out · dout. Both are keys × queries.
#[inline(always)]
fn score_gradients<F: Real>(scores: &mut [F], dp: &mut [F], log_sum_exp: &[F], inner: &[F], scale: F) {
    let queries = log_sum_exp.len();
    for (scores, dp) in scores.chunks_mut(queries).zip(dp.chunks_mut(queries)) {
        for (((score, dp), &log), &inner) in scores.iter_mut().zip(dp).zip(log_sum_exp).zip(inner) {
            *score = (*score - log).exp();
            *dp = *score * (*dp - inner) * scale;
        }
    }
}

/// Puts a token's row of dqkv together from the gradients of [`Saved::backward`].
fn gather<F: Real>(row: &mut [F], by_head: &[F], token: usize, shape: AttentionShape) {
    let HeadShape { kv_heads, group, head_dim } = shape.heads;
    let (sequence, token, tokens) = (token / shape.queries, token % shape.queries, shape.queries);
    let (dq, dkv) = row.split_at_mut(shape.heads.queries());
    let (dk, dv) = dkv.split_at_mut(shape.heads.keys());
    let of_heads = by_head.chunks(tokens * (group + 2) * head_dim).skip(sequence * kv_heads);
    let rows = dq.chunks_mut(group * head_dim).zip(dk.chunks_mut(head_dim)).zip(dv.chunks_mut(head_dim));
    for (((dq, dk), dv), from) in rows.zip(of_heads) {
        dq.copy_from_slice(&from[token * group * head_dim..][..group * head_dim]);
        dk.copy_from_slice(&from[(tokens * group + token) * head_dim..][..head_dim]);
        dv.copy_from_slice(&from[(tokens * (group + 1) + token) * head_dim..][..head_dim]);
    }
}

/// The parts of a range of rows that lie in one sequence each: its number, and the rows counted from its first.
fn sequences(rows: Range<usize>, tokens: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    (rows.start / tokens..rows.end.div_ceil(tokens)).map(move |sequence| {
        let first = sequence * tokens;
        (sequence, rows.start.max(first) - first..rows.end.min(first + tokens) - first)
    })
}

impl<F: Real> Attention for Cpu<F> {
    fn attention(
        &self,
        out: Mut<'_, Self>,
        log_sum_exp: Mut<'_, Self>,
        q: Strided<'_, Self>,
        k: Strided<'_, Self>,
        v: Strided<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    ) {
        let HeadShape { kv_heads, group, head_dim } = shape.heads;
        let (width, heads) = (shape.heads.queries(), kv_heads * group);
        let first_key = first_key.map(Ref::as_slice::<i32>);
        let inputs = [q, k, v].map(|x| (x.view.as_slice::<F>(), x.stride, x.rows));
        let rows = (RowsMut::new(out.into_slice::<F>(), width), RowsMut::new(log_sum_exp.into_slice::<F>(), heads));
        self.pool().for_rows(rows, query_block(shape), |range, (mut out, mut log_sum_exp)| {
            for (sequence, queries) in sequences(range, shape.queries) {
                let first_key = first_key.map(|f| &f[sequence * shape.queries..][..shape.queries]);
                let rows = queries.len();
                let block = Block::new(queries, first_key, shape);
                for head in 0..heads {
                    let mut of = [head, head / group, head / group].into_iter();
                    let qkv = inputs.map(|(x, stride, rows)| {
                        let at = of.next().expect("three heads") * head_dim;
                        HeadRows { elements: &x[sequence * rows * stride + at..], stride }
                    });
                    block.forward(&mut out[head * head_dim..], &mut log_sum_exp[head..], qkv, shape);
                }
                (out, log_sum_exp) = (&mut out[rows * width..], &mut log_sum_exp[rows * heads..]);
            }
        });
    }

    fn attention_backward(
        &self,
        dqkv: Mut<'_, Self>,
        dout: Ref<'_, Self>,
        out: Ref<'_, Self>,
        log_sum_exp: Ref<'_, Self>,
        qkv: Ref<'_, Self>,
        first_key: Option<Ref<'_, Self>>,
        shape: AttentionShape,
    ) {
        assert_eq!(shape.queries, shape.keys, "backward is for whole sequences");
        let HeadShape { kv_heads, group, head_dim } = shape.heads;
        let saved = Saved {
            qkv: qkv.as_slice(),
            out: out.as_slice(),
            dout: dout.as_slice(),
            log_sum_exp: log_sum_exp.as_slice(),
            first_key: first_key.map(Ref::as_slice),
            shape,
        };
        let dqkv = dqkv.into_slice::<F>();
        // A task's gradients lie together first, and are then brought into the order of tokens: rows of a token belong
        // to all heads, and tasks are finer than sequences.
        let per_task = shape.queries * (group + 2) * head_dim;
        scratch(shape.batch * kv_heads * per_task, |by_head: &mut [F]| {
            self.pool().for_rows(RowsMut::new(by_head, per_task), 1, |task, by_head| {
                saved.backward(task.start / kv_heads, task.start % kv_heads, by_head);
            });
            let by_head = &*by_head;
            self.pool().for_rows(RowsMut::new(dqkv, shape.heads.row()), 64, |tokens, dqkv| {
                for (token, row) in tokens.zip(dqkv.chunks_mut(shape.heads.row())) {
                    gather(row, by_head, token, shape);
                }
            });
        });
    }
}
