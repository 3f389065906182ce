//! The one way in which CPU operations use threads: a fork-join pool, rows of mutable slices handed out to tasks,
//! sums whose order is fixed, and scratch memory that each thread keeps.
//!
//! Nothing here lets a result depend on the number of threads: a task is known by its index alone, and partial
//! results are added in the order of the indices, whichever thread made them.
//!
//! The pool is our own because an optimisation step of a small model is some hundreds of regions of 10-100 µs: a
//! worker looks for the next region for a few microseconds before it sleeps, the caller works too, and a worker
//! that wakes late is not waited for.
#![allow(unsafe_code, reason = "a task borrows from the caller's stack, and tasks write disjoint rows of one slice")]

use std::{
    cell::{Cell, RefCell, UnsafeCell},
    marker::PhantomData,
    ops::Range,
    panic::{AssertUnwindSafe, Location, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use crate::backend::Profile;
use bytemuck::{Pod, Zeroable};

/// An idle thread looks for work this often with a pause between; then, up to look `YIELDS`, it yields the core;
/// then it sleeps.
const PAUSES: usize = 300;
const YIELDS: usize = 500;

/// `Shared::state`: the low 16 bits count the workers inside the region, this bit says that they may enter, the
/// high 32 bits count the regions.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;
const REGION: u64 = 1 << 32;

thread_local! {
    /// Set while this thread runs a task: a region inside a task runs on this thread alone.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
    /// Buffers that this thread lends to its tasks.
    static SCRATCH: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// A cache line, the unit and alignment of scratch memory.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// A pool of threads, the caller's among them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held through a region, so that several threads may own one pool.
    region: Mutex<()>,
    /// What regions took, while somebody wants to know.
    profile: Mutex<Option<Profile>>,
}

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
}

#[derive(Clone, Copy)]
struct Job {
    run: &'static (dyn Fn(usize) + Sync),
    count: usize,
}

// SAFETY: every field but `job` is shared safely by its type. `job` is written only by the thread that holds
// `Pool::region`, while the region is closed and no worker is inside (`Region::drop` has waited for that); workers
// read it only between entering an open region and leaving it.
unsafe impl Sync for Shared {}

impl Pool {
    /// A pool of `threads` threads in all, at least one; `threads - 1` are started here.
    ///
    /// # Errors
    /// The system's, when it cannot start a thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let helpers = threads.clamp(1, INSIDE as usize) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { run: &|_| (), count: 0 }),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool =
            Self { shared, workers: Vec::with_capacity(helpers), region: Mutex::default(), profile: Mutex::default() };
        for index in 0..helpers {
            let shared = Arc::clone(&pool.shared);
            let name = format!("cpu-{}", index + 1);
            pool.workers.push(thread::Builder::new().name(name).spawn(move || shared.work(index))?);
        }
        Ok(pool)
    }

    /// Threads in the pool, the caller's among them.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Takes what was measured since the last call, and goes on measuring or stops.
    pub(crate) fn profile(&self, go_on: bool) -> Option<Profile> {
        let next = go_on.then(Profile::new);
        std::mem::replace(&mut *self.profile.lock().unwrap_or_else(PoisonError::into_inner), next)
    }

    /// Runs `task(0)`, …, `task(count - 1)`, each once, on all threads, and returns when all have ended. A task that
    /// panics makes this call panic. Inside a task it runs serially.
    #[track_caller]
    pub(crate) fn for_tasks(&self, count: usize, task: impl Fn(usize) + Sync) {
        if IN_TASK.get() {
            return (0..count).for_each(task);
        }
        let start = Instant::now();
        self.run(count, task);
        if let Some(profile) = &mut *self.profile.lock().unwrap_or_else(PoisonError::into_inner) {
            let place = Location::caller();
            let (calls, seconds) = profile.entry((place.file(), place.line())).or_default();
            (*calls, *seconds) = (*calls + 1, *seconds + start.elapsed().as_secs_f64());
        }
    }

    fn run(&self, count: usize, task: impl Fn(usize) + Sync) {
        if self.workers.is_empty() || count <= 1 {
            (0..count).for_each(task);
            return;
        }
        let guard = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let region = self.open(count, &task);
        IN_TASK.set(true);
        self.shared.take_tasks(&task, count);
        drop(region);
        let panicked = self.shared.panicked.load(Ordering::Relaxed);
        drop(guard);
        assert!(!panicked, "a task of a parallel region panicked on another thread");
    }

    /// Publishes a region and wakes who sleeps. The caller holds `self.region`.
    fn open<'a>(&'a self, count: usize, task: &'a (dyn Fn(usize) + Sync)) -> Region<'a> {
        // SAFETY: only the lifetime changes. Workers use the reference between entering and leaving an open region,
        // and `Region::drop`, which runs before 'a ends, on a panic too, closes the region and waits until all left.
        let run = unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        // SAFETY: the region is closed with nobody inside and we hold `self.region`, so no one else looks at `job`.
        unsafe { *self.shared.job.get() = Job { run, count } };
        self.shared.next.store(0, Ordering::Relaxed);
        // A region whose caller panicked has not looked at this.
        self.shared.panicked.store(false, Ordering::Relaxed);
        let closed = self.shared.state.load(Ordering::Relaxed);
        self.shared.state.store(closed.wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        for (worker, asleep) in self.workers.iter().zip(&self.shared.asleep).take(count - 1) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        Region { shared: &self.shared }
    }

    /// Calls `task(rows, part)` with disjoint ranges of at most `per_task` rows that together cover `rows`, `part`
    /// being those rows of each slice.
    #[track_caller]
    pub(crate) fn for_rows<R: Rows>(&self, rows: R, per_task: usize, task: impl Fn(Range<usize>, R::Part) + Sync) {
        let (count, per_task) = (rows.count(), per_task.max(1));
        self.for_tasks(count.div_ceil(per_task), |i| {
            let range = i * per_task..((i + 1) * per_task).min(count);
            // SAFETY: the ranges of different tasks are disjoint, and every task runs once.
            let part = unsafe { rows.part(range.clone()) };
            task(range, part);
        });
    }

    /// The sum of `task(0)`, …, `task(count - 1)`, added pairwise in an order given by `count` alone.
    #[track_caller]
    pub(crate) fn sum<F: Pod + Send + Sync + std::ops::Add<Output = F>>(
        &self,
        count: usize,
        task: impl Fn(usize) -> F + Sync,
    ) -> F {
        scratch(count, |partials: &mut [F]| {
            self.for_rows(RowsMut::new(partials, 1), 1, |range, part| part[0] = task(range.start));
            sum_pairwise(partials)
        })
    }

    /// Adds to `sums[j]` the sum over i of what `task(i, partial)` writes to `partial[j]`, pairwise in an order given
    /// by `count` alone. `partial` holds zeros when the task gets it.
    #[track_caller]
    pub(crate) fn add_sums<F: Pod + Send + Sync + std::ops::Add<Output = F>>(
        &self,
        count: usize,
        sums: &mut [F],
        task: impl Fn(usize, &mut [F]) + Sync,
    ) {
        let width = sums.len();
        scratch(count * width, |partials: &mut [F]| {
            self.for_rows(RowsMut::new(partials, width), 1, |range, part| {
                part.fill(F::zeroed());
                task(range.start, part);
            });
            if count > 0 {
                add_rows_pairwise(partials, width);
                for (sum, partial) in sums.iter_mut().zip(&*partials) {
                    *sum = *sum + *partial;
                }
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its tasks' panics, so it cannot have ended with one.
            let _ = worker.join();
        }
    }
}

/// An open region; dropping it closes it and waits for the workers inside.
struct Region<'a> {
    shared: &'a Shared,
}

impl Drop for Region<'_> {
    fn drop(&mut self) {
        IN_TASK.set(false);
        // No task is left to take, even where the caller's own panicked.
        self.shared.next.store(usize::MAX / 2, Ordering::Relaxed);
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        wait(|| self.shared.state.load(Ordering::Acquire) & INSIDE == 0, thread::yield_now);
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, index: usize) {
        IN_TASK.set(true);
        let mut seen = 0;
        while !self.stop.load(Ordering::SeqCst) {
            let state = self.state.load(Ordering::SeqCst);
            if state & OPEN == 0 || state / REGION == seen {
                wait(
                    || self.is_wanted(seen),
                    || {
                        self.asleep[index].store(true, Ordering::SeqCst);
                        if !self.is_wanted(seen) {
                            thread::park();
                        }
                        self.asleep[index].store(false, Ordering::SeqCst);
                    },
                );
            } else if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                seen = state / REGION;
                // SAFETY: we are inside an open region, so the caller waits for us before it writes `job` again.
                let job = unsafe { *self.job.get() };
                if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job.run, job.count))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    fn is_wanted(&self, seen: u64) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        (state & OPEN != 0 && state / REGION != seen) || self.stop.load(Ordering::SeqCst)
    }

    fn take_tasks(&self, run: &(dyn Fn(usize) + Sync), count: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            run(i);
        }
    }
}

/// Looks whether it is `done`, a while with pauses, a while yielding the core, then calling `idle` between looks.
fn wait(done: impl Fn() -> bool, idle: impl Fn()) {
    for look in 0.. {
        if done() {
            return;
        }
        match look {
            0..PAUSES => std::hint::spin_loop(),
            PAUSES..YIELDS => thread::yield_now(),
            _ => idle(),
        }
    }
}

/// Slices that are handed out by rows: one [`RowsMut`], or a tuple of two to four with equally many rows.
pub(crate) trait Rows: Sync {
    /// A range of the rows, as one slice or a tuple of slices.
    type Part;

    /// How many rows.
    fn count(&self) -> usize;

    /// The rows of `range`.
    ///
    /// # Safety
    /// No row may be asked for twice.
    unsafe fn part(&self, range: Range<usize>) -> Self::Part;
}

/// A mutable slice seen as rows of `width` elements.
pub(crate) struct RowsMut<'a, T> {
    start: *mut T,
    len: usize,
    count: usize,
    width: usize,
    slice: PhantomData<&'a mut [T]>,
}

impl<'a, T> RowsMut<'a, T> {
    /// Rows of `width` elements; the length must be a multiple of it. Width 0 means no rows.
    pub(crate) fn new(slice: &'a mut [T], width: usize) -> Self {
        assert!(if width == 0 { slice.is_empty() } else { slice.len().is_multiple_of(width) });
        let count = slice.len().checked_div(width).unwrap_or(0);
        Self { start: slice.as_mut_ptr(), len: slice.len(), count, width, slice: PhantomData }
    }

    /// Blocks of `len` elements, not 0, of which the last may be shorter: for ops with a partial result for each block.
    pub(crate) fn blocks(slice: &'a mut [T], len: usize) -> Self {
        let count = slice.len().div_ceil(len);
        Self { start: slice.as_mut_ptr(), len: slice.len(), count, width: len, slice: PhantomData }
    }
}

// SAFETY: a shared `RowsMut` gives out nothing but disjoint parts (the contract of `part`), each as good as the
// `&mut [T]` that it came from; so it may be shared between threads where that could be sent.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T: Send> Rows for RowsMut<'a, T> {
    type Part = &'a mut [T];

    fn count(&self) -> usize {
        self.count
    }

    unsafe fn part(&self, range: Range<usize>) -> Self::Part {
        assert!(range.start <= range.end && range.end <= self.count);
        let [start, end] = [range.start, range.end].map(|row| (row * self.width).min(self.len));
        // SAFETY: start ≤ end ≤ len, the length of the slice that was borrowed for 'a, and the caller promises that no
        // other part shares a row, and so an element, with it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), end - start) }
    }
}

macro_rules! rows_of_tuple {
    ($($name:ident $index:tt),+) => {
        impl<$($name: Rows),+> Rows for ($($name,)+) {
            type Part = ($($name::Part,)+);

            fn count(&self) -> usize {
                let count = self.0.count();
                $(assert_eq!(self.$index.count(), count, "slices with unequal numbers of rows");)+
                count
            }

            unsafe fn part(&self, range: Range<usize>) -> Self::Part {
                // SAFETY: disjoint ranges of the tuple's rows are disjoint in each of its slices.
                unsafe { ($(self.$index.part(range.clone()),)+) }
            }
        }
    };
}
rows_of_tuple!(A 0, B 1);
rows_of_tuple!(A 0, B 1, C 2);
rows_of_tuple!(A 0, B 1, C 2, D 3);

/// Lends `len` elements of memory that this thread keeps for the next call, aligned to a cache line and holding
/// anything. Calls may nest; each depth has a buffer of its own.
pub(crate) fn scratch<F: Pod, R>(len: usize, use_it: impl FnOnce(&mut [F]) -> R) -> R {
    let mut lines = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    let wanted = (len * size_of::<F>()).div_ceil(size_of::<Line>());
    if lines.len() < wanted {
        lines.resize(wanted, Line::zeroed());
    }
    let result = use_it(&mut bytemuck::cast_slice_mut(&mut lines[..wanted])[..len]);
    SCRATCH.with_borrow_mut(|buffers| buffers.push(lines));
    result
}

/// Adds neighbours, then neighbouring sums, and so on; returns the total and leaves the partial sums changed.
fn sum_pairwise<F: Pod + std::ops::Add<Output = F>>(partials: &mut [F]) -> F {
    add_rows_pairwise(partials, 1);
    partials.first().copied().unwrap_or(F::zeroed())
}

/// The same for rows of `width` elements; the total is the first row.
fn add_rows_pairwise<F: Pod + std::ops::Add<Output = F>>(rows: &mut [F], width: usize) {
    let mut step = width;
    while step < rows.len() {
        for pair in rows.chunks_mut(2 * step) {
            if let Some((left, right)) = pair.split_at_mut_checked(step) {
                for (l, r) in left[..width].iter_mut().zip(right) {
                    *l = *l + *r;
                }
            }
        }
        step *= 2;
    }
}

#[cfg(test)]
mod tests;
