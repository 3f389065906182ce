//! Pieces: the rows of a table cut into runs of at most [`PIECE`] elements, with each row's settings, so that one call
//! works on all parameters of an arena (or on the part of it that a rank owns).

use crate::{
    DType, Result,
    backend::{Backend, Tensor, cpu::Pool},
};
use bytemuck::{Pod, Zeroable};
use std::{mem::take, ops::Range, sync::Mutex};

/// Largest piece, in elements. Partial sums are per piece and are added in order, so results do not depend on threads.
pub const PIECE: usize = 1 << 16;

/// A run of elements of one row.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Piece {
    /// First element in the arena.
    pub offset: u64,
    /// Elements.
    pub len: u32,
    /// Row of the table.
    pub row: u32,
}

impl Piece {
    /// Its elements in the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset as usize..self.offset as usize + self.len as usize
    }
}

/// What an optimizer needs to know of a row: the base hyperparameters times the row's factors.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct RowSettings {
    /// Factor on the schedule's learning rate.
    pub lr: f64,
    /// Weight decay (0 for gains and biases).
    pub decay: f64,
    /// Epsilon.
    pub eps: f64,
    /// Weight in the gradient norm.
    pub clip: f64,
    /// 1 where Muon updates the row, and the elementwise optimizer leaves it alone.
    pub muon: u64,
}

/// Pieces and row settings, on the host and on the device.
pub struct Pieces<B: Backend> {
    /// The pieces, in arena order.
    pub list: Vec<Piece>,
    /// Element of the table's arena that their offsets count from: 0, but where an op is given a part of it.
    pub origin: u64,
    /// Settings of every row of the table.
    pub rows: Vec<RowSettings>,
    /// `list` as bytes on the device.
    pub device_list: Tensor<B>,
    /// `rows` as bytes on the device.
    pub device_rows: Tensor<B>,
}

/// Cuts rows, given by the elements of the arena that hold their values, into pieces, as far as they lie in `range`.
pub fn cut(rows: impl IntoIterator<Item = Range<usize>>, range: Range<usize>) -> Vec<Piece> {
    let mut list = Vec::new();
    for (row, values) in rows.into_iter().enumerate() {
        // Borders are multiples of PIECE from the row's own start, so a piece is the same however the arena is cut.
        for start in values.clone().step_by(PIECE) {
            let end = (start + PIECE).min(values.end);
            let (start, end) = (start.max(range.start), end.min(range.end));
            if start < end {
                list.push(Piece { offset: start as u64, len: (end - start) as u32, row: row as u32 });
            }
        }
    }
    list
}

impl<B: Backend> Pieces<B> {
    /// Uploads pieces and settings.
    pub fn new(backend: &B, list: Vec<Piece>, rows: Vec<RowSettings>) -> Result<Self> {
        let device_list = Tensor::from_bytes(backend, DType::U8, bytemuck::cast_slice(&list))?;
        let device_rows = Tensor::from_bytes(backend, DType::U8, bytemuck::cast_slice(&rows))?;
        Ok(Self { list, origin: 0, rows, device_list, device_rows })
    }
}

/// Calls `work(piece, its elements of the weights, and of each moment)` for all pieces, which are in arena order and do
/// not overlap, and puts what it returns into `partials`, one for each piece. An arena that is not there is empty.
pub(crate) fn for_pieces<T: Send, M: Send>(
    pool: &Pool,
    pieces: &[Piece],
    mut weights: &mut [T],
    mut moments: [&mut [M]; 3],
    partials: &mut [f64],
    work: impl Fn(&Piece, &mut [T], [&mut [M]; 3]) -> f64 + Sync,
) {
    assert_eq!(partials.len(), pieces.len());
    let per_task = pieces.len().div_ceil(TASKS).max(1);
    let mut end = 0;
    let mut tasks = Vec::with_capacity(TASKS);
    for (pieces, partials) in pieces.chunks(per_task).zip(partials.chunks_mut(per_task)) {
        let range = pieces[0].range().start..pieces[pieces.len() - 1].range().end;
        let (skip, len) = (range.start - end, range.len());
        let part = moments.each_mut().map(|arena| cut_off(arena, skip, len));
        end = range.end;
        tasks.push(Mutex::new((cut_off(&mut weights, skip, len), part, pieces, partials)));
    }
    pool.for_tasks(tasks.len(), |i| {
        let mut task = tasks[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (weights, moments, pieces, partials) = &mut *task;
        let mut end = pieces[0].range().start;
        for (piece, partial) in pieces.iter().zip(&mut **partials) {
            let (skip, len) = (piece.range().start - end, piece.range().len());
            let elements = moments.each_mut().map(|arena| cut_off(arena, skip, len));
            end = piece.range().end;
            *partial = work(piece, cut_off(weights, skip, len), elements);
        }
    });
}

/// More tasks than this are not made of the pieces.
const TASKS: usize = 256;

/// Takes `len` elements off the front of `slice`, after dropping `skip`; nothing from an empty one.
fn cut_off<'a, T>(slice: &mut &'a mut [T], skip: usize, len: usize) -> &'a mut [T] {
    if slice.is_empty() {
        return &mut [];
    }
    let (taken, rest) = take(slice)[skip..].split_at_mut(len);
    *slice = rest;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of three rows with gaps between them: padding.
    fn rows() -> [Range<usize>; 3] {
        let second = 3 * PIECE + 40;
        [0..3 * PIECE, second..second + 5, second + 128..second + 128 + 2 * (PIECE - 1)]
    }

    #[test]
    fn pieces_cover_the_values_and_no_padding() {
        let arena = rows()[2].end + 100;
        let mut covered = vec![0; arena];
        for piece in cut(rows(), 0..arena) {
            assert!(piece.len as usize <= PIECE);
            assert!(rows()[piece.row as usize].start <= piece.range().start);
            piece.range().for_each(|i| covered[i] += 1);
        }
        let mut expected = vec![0; arena];
        rows().into_iter().for_each(|row| expected[row].fill(1));
        assert_eq!(covered, expected);
    }

    #[test]
    fn borders_do_not_move_when_the_arena_is_cut() {
        let arena = rows()[2].end + 100;
        let ends = |pieces: Vec<Piece>| pieces.iter().map(|p| p.range().end).collect::<Vec<_>>();
        let at = PIECE + 17;
        let mut parts = ends(cut(rows(), 0..at));
        parts.extend(ends(cut(rows(), at..arena)));
        let mut whole = ends(cut(rows(), 0..arena));
        whole.insert(1, at);
        assert_eq!(parts, whole);
    }

    #[test]
    fn every_piece_gets_its_own_elements() {
        let piece = |offset, len, row| Piece { offset, len, row };
        // More pieces than tasks, with gaps.
        let pieces: Vec<Piece> = (0..TASKS as u64 * 3 + 1).map(|i| piece(i * 10 + 2, 7, i as u32)).collect();
        let mut arena: Vec<u32> = (0..pieces.len() as u32 * 10 + 5).collect();
        let mut partials = vec![f64::NAN; pieces.len()];
        let pool = Pool::new(2).unwrap();
        let mut bytes: Vec<u8> = arena.iter().map(|&i| i as u8).collect();
        let moments = [&mut bytes[..], &mut [], &mut []];
        for_pieces(&pool, &pieces, &mut arena, moments, &mut partials, |piece, x, [bytes, absent, _]| {
            assert_eq!(x.iter().map(|&i| i as usize).collect::<Vec<_>>(), piece.range().collect::<Vec<_>>());
            assert!(absent.is_empty() && bytes.iter().zip(&*x).all(|(&byte, &i)| byte == i as u8));
            x.fill(0);
            f64::from(piece.row)
        });
        assert!(partials.iter().enumerate().all(|(i, &p)| p == i as f64));
        assert_eq!(arena.iter().filter(|&&i| i == 0).count(), 7 * pieces.len() + 1);
    }
}
