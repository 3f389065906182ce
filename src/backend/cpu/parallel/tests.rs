//! The pool on several threads, with panics, nesting, and fixed orders of sums.

use super::*;

#[test]
fn every_task_runs_once_on_any_number_of_threads() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads).unwrap();
        assert_eq!(pool.threads(), threads);
        for round in 0..200 {
            let counts: Vec<AtomicUsize> = (0..round).map(|_| AtomicUsize::new(0)).collect();
            pool.for_tasks(round, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }
}

#[test]
fn workers_that_slept_wake_again() {
    let pool = Pool::new(2).unwrap();
    for _ in 0..5 {
        thread::sleep(std::time::Duration::from_millis(20));
        let names = Mutex::new(std::collections::BTreeSet::new());
        pool.for_tasks(8, |_| {
            thread::sleep(std::time::Duration::from_millis(5));
            names.lock().unwrap().insert(thread::current().name().map(String::from));
        });
        assert_eq!(names.lock().unwrap().len(), 2);
    }
}

#[test]
fn several_callers_and_regions_inside_tasks() {
    let pool = Pool::new(3).unwrap();
    let total = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.for_tasks(5, |_| pool.for_tasks(7, |_| _ = total.fetch_add(1, Ordering::Relaxed)));
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 3 * 50 * 5 * 7);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = Pool::new(2).unwrap();
    for bad in 0..20 {
        let run = || pool.for_tasks(20, |i| assert_ne!(i, bad));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        assert_eq!(pool.sum(10, |i| i), 45);
    }
}

#[test]
fn rows_of_unequal_width_go_side_by_side() {
    let pool = Pool::new(2).unwrap();
    let (mut wide, mut narrow) = (vec![0usize; 7 * 5], vec![0usize; 7]);
    pool.for_rows((RowsMut::new(&mut wide, 5), RowsMut::new(&mut narrow, 1)), 2, |range, (wide, narrow)| {
        for ((row, wide), narrow) in range.zip(wide.chunks_mut(5)).zip(narrow) {
            wide.fill(row);
            *narrow = row;
        }
    });
    assert!(wide.chunks(5).zip(&narrow).enumerate().all(|(i, (w, n))| w == [i; 5] && *n == i));
}

#[test]
fn sums_do_not_depend_on_the_number_of_threads() {
    let term = |i: usize| ((i * 2_654_435_761) % 1_000_003) as f32 * 1e-3 - 400.0;
    for count in [0, 1, 2, 3, 17, 1000] {
        let results: Vec<(f32, Vec<f32>)> = [1, 2, 5]
            .map(|threads| {
                let pool = Pool::new(threads).unwrap();
                let mut rows = vec![1.0; 3];
                pool.add_sums(count, &mut rows, |i, part| {
                    part.iter_mut().enumerate().for_each(|(j, p)| *p += term(3 * i + j))
                });
                (pool.sum(count, term), rows)
            })
            .into();
        assert!(results.iter().all(|r| *r == results[0]));
        let exact: f64 = (0..count).map(|i| f64::from(term(i))).sum();
        assert!((f64::from(results[0].0) - exact).abs() <= 1e-6 * 400.0 * count as f64);
        let exact: f64 = 1.0 + (0..count).map(|i| f64::from(term(3 * i + 2))).sum::<f64>();
        assert!((f64::from(results[0].1[2]) - exact).abs() <= 1e-6 * 400.0 * (count + 1) as f64);
    }
}

#[test]
fn scratch_is_aligned_nests_and_is_kept() {
    let address = scratch(100, |outer: &mut [f32]| {
        scratch(10, |inner: &mut [f64]| inner.fill(1.0));
        outer.fill(2.0);
        assert_eq!(outer.as_ptr().align_offset(64), 0);
        outer.as_ptr().addr()
    });
    assert_eq!(scratch(100, |again: &mut [f32]| again.as_ptr().addr()), address);
}
