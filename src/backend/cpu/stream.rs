//! Stores that go past the caches, for memory that is written once and not read soon: widening, initial values.
//!
//! An ordinary store first reads the cache line that it writes. Past the caches nothing is read, which about doubles
//! the speed of writing a large tensor.
#![allow(unsafe_code, reason = "no safe function of the standard library makes such stores")]

use bytemuck::Pod;

/// The right to store past the caches; see [`past_caches`].
pub(crate) struct Stores(());

/// Runs `work`, which may store past the caches. All that it has stored is seen by whoever sees what this thread stores
/// after this call, as is true of ordinary stores.
pub(crate) fn past_caches<R>(work: impl FnOnce(&Stores) -> R) -> R {
    let _fence = Fence;
    work(&Stores(()))
}

/// Orders the stores made so far before all later ones, when dropped: after a panic too.
struct Fence;

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: the instruction has no operands, and every x86-64 has it.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// Bytes of a cache line. Whole lines are stored, since parts of one would be read back to be put together.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

impl Stores {
    /// Copies `source`, which is small and lies in cache, to `target`. They are equally long.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn copy<T: Pod>(&self, target: &mut [T], source: &[T]) {
        let (target, source) = (bytemuck::cast_slice_mut::<T, u8>(target), bytemuck::cast_slice::<T, u8>(source));
        assert_eq!(target.len(), source.len());
        let head = target.as_ptr().align_offset(LINE).min(target.len());
        let (target_head, target) = target.split_at_mut(head);
        let (source_head, source) = source.split_at(head);
        let (target_lines, target_tail) = target.as_chunks_mut::<LINE>();
        let (source_lines, source_tail) = source.as_chunks::<LINE>();
        target_head.copy_from_slice(source_head);
        if std::is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has AVX-512F, and `target_lines` begins on a multiple of a line: the head up to there
            // was split off, and if it took all of `target` there are no lines.
            unsafe { copy_lines_avx512(target_lines, source_lines) }
        } else {
            // SAFETY: as above.
            unsafe { copy_lines_sse2(target_lines, source_lines) }
        }
        target_tail.copy_from_slice(source_tail);
    }

    /// Copies `source` to `target`. They are equally long.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn copy<T: Pod>(&self, target: &mut [T], source: &[T]) {
        target.copy_from_slice(source);
    }
}

/// A fifth faster than by quarters of a line.
///
/// # Safety
/// `target` begins on a multiple of [`LINE`] bytes, or is empty.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn copy_lines_avx512(target: &mut [[u8; LINE]], source: &[[u8; LINE]]) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    for (line, bytes) in target.iter_mut().zip(source) {
        // SAFETY: `line` and `bytes` are 64 bytes, which is what is read and written; the load needs no alignment, and
        // `line` is a whole number of lines behind the start of `target`, which is aligned.
        unsafe { _mm512_stream_si512(line.as_mut_ptr().cast(), _mm512_loadu_si512(bytes.as_ptr().cast())) }
    }
}

/// # Safety
/// `target` begins on a multiple of [`LINE`] bytes, or is empty.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_lines_sse2(target: &mut [[u8; LINE]], source: &[[u8; LINE]]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm_stream_si128};
    for (line, bytes) in target.iter_mut().zip(source) {
        for at in (0..LINE).step_by(16) {
            // SAFETY: `line` and `bytes` are 64 bytes and `at` is 0, 16, 32 or 48, so both accesses, of 16 bytes, lie
            // inside; the load needs no alignment, and `line` is aligned to 64 as in `copy_lines_avx512`. Every
            // x86-64 has these instructions.
            unsafe {
                let value = _mm_loadu_si128(bytes.as_ptr().add(at).cast());
                _mm_stream_si128(line.as_mut_ptr().add(at).cast(), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_whatever_the_alignment_and_length() {
        let source: Vec<u8> = (0..300u32).map(|i| (i * 7 % 251) as u8 + 1).collect();
        for start in [0, 1, 15, 16, 63, 64] {
            for len in [0, 1, 16, 63, 64, 65, 128, 200] {
                let mut target = vec![0u8; 300];
                past_caches(|stores| stores.copy(&mut target[start..start + len], &source[3..3 + len]));
                assert_eq!(target[start..start + len], source[3..3 + len]);
                assert!(target[..start].iter().chain(&target[start + len..]).all(|&b| b == 0));
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn machines_without_avx512_copy_lines_too() {
        #[repr(align(64))]
        struct Aligned([[u8; LINE]; 5]);
        let (mut target, source) = (Aligned([[0; LINE]; 5]), [1, 2, 3, 4, 5].map(|i| [i; LINE]));
        // SAFETY: the type is aligned to a line.
        unsafe { copy_lines_sse2(&mut target.0, &source) }
        assert_eq!(target.0, source);
    }
}
