//! Stores that go past the caches, for memory that is written once and not read soon: widening, initial values.
//!
//! An ordinary store first reads the cache line that it writes. Past the caches nothing is read, which about doubles
//! the speed of writing a large tensor.
#![allow(unsafe_code, reason = "no safe function of the standard library makes such stores")]

use bytemuck::Pod;

/// Copies `source`, which is small and lies in cache, to `target`. They are equally long.
#[cfg(target_arch = "x86_64")]
pub(crate) fn copy<T: Pod>(target: &mut [T], source: &[T]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    let (target, source) = (bytemuck::cast_slice_mut::<T, u8>(target), bytemuck::cast_slice::<T, u8>(source));
    assert_eq!(target.len(), source.len());
    // A cache line at a time, so that each leaves the write buffers whole.
    const LINE: usize = 64;
    let head = target.as_ptr().align_offset(LINE).min(target.len());
    let (target_head, target) = target.split_at_mut(head);
    let (source_head, source) = source.split_at(head);
    target_head.copy_from_slice(source_head);
    let mut lines = target.chunks_exact_mut(LINE);
    for (line, bytes) in lines.by_ref().zip(source.chunks_exact(LINE)) {
        for at in (0..LINE).step_by(size_of::<__m128i>()) {
            // SAFETY: `line` and `bytes` are 64 bytes each and `at` is 0, 16, 32 or 48, so both accesses of 16 bytes
            // lie inside; `line` starts on a multiple of 64 (the head up to there was split off), so the store is
            // aligned; every x86-64 has these instructions.
            unsafe {
                let value = _mm_loadu_si128(bytes.as_ptr().add(at).cast());
                _mm_stream_si128(line.as_mut_ptr().add(at).cast(), value);
            }
        }
    }
    let tail = lines.into_remainder();
    tail.copy_from_slice(&source[source.len() - tail.len()..]);
    // SAFETY: no operands; every x86-64 has it. It makes the stores above visible before whatever this thread stores
    // next, as the users of `target` expect of ordinary stores.
    unsafe { _mm_sfence() }
}

/// Copies `source` to `target`. They are equally long.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn copy<T: Pod>(target: &mut [T], source: &[T]) {
    target.copy_from_slice(source);
}

#[cfg(test)]
mod tests {
    #[test]
    fn copies_whatever_the_alignment_and_length() {
        let source: Vec<u8> = (0..300u32).map(|i| (i * 7 % 251) as u8 + 1).collect();
        for start in [0, 1, 15, 16, 63, 64] {
            for len in [0, 1, 16, 63, 64, 65, 128, 200] {
                let mut target = vec![0u8; 300];
                super::copy(&mut target[start..start + len], &source[3..3 + len]);
                assert_eq!(target[start..start + len], source[3..3 + len]);
                assert!(target[..start].iter().chain(&target[start + len..]).all(|&b| b == 0));
            }
        }
    }
}
