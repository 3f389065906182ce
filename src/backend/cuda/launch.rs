//! Launching kernels. A kernel is declared once, with [`kernels!`]; the declaration becomes a function whose arguments
//! are the kernel's. `tests/tidy.rs` compares declarations with the kernels' texts, and the first launch of a kernel
//! compares the number and sizes of its parameters with what the driver says.
#![allow(unsafe_code, reason = "hands argument lists to the driver")]

use super::{Cuda, driver::cuda};
use crate::{
    Result,
    backend::{Mut, Ref},
};
use std::ffi::c_void;

/// How many blocks of how many threads, and the bytes of shared memory that the launch adds.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    grid: [u32; 3],
    threads: u32,
    shared: u32,
}

impl Launch {
    /// A one-dimensional grid, at least one block, of 256 threads.
    pub fn blocks(blocks: usize) -> Self {
        Self::grid(blocks, 1, 1)
    }

    /// A grid of x × y × z blocks of 256 threads.
    pub fn grid(x: usize, y: usize, z: usize) -> Self {
        assert!(x <= i32::MAX as usize && y < 1 << 16 && z < 1 << 16, "a grid of {x} x {y} x {z} blocks");
        Self { grid: [x, y, z].map(|n| n.max(1) as u32), threads: 256, shared: 0 }
    }

    /// Rows along the grid's x, and the `pieces` of a row, one a thread, along its y and in blocks of up to 256 threads.
    pub fn pieces(rows: usize, pieces: usize) -> Self {
        let parts = pieces.div_ceil(256);
        Self::grid(rows, parts, 1).threads(warps(pieces.div_ceil(parts)))
    }

    /// Blocks of this many threads.
    pub fn threads(self, threads: u32) -> Self {
        Self { threads, ..self }
    }

    /// Adds shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }
}

/// Threads in whole warps.
pub fn warps(threads: usize) -> u32 {
    threads.next_multiple_of(32) as u32
}

/// How rows of `pieces`, one a thread, are shared out where a block goes through many rows: a team of whole warps has a
/// row, or one of its equal parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Teams {
    /// Teams of a block, each with rows of its own.
    pub teams: usize,
    /// Warps of a team.
    pub warps: usize,
    /// Parts of a row, along the grid's y.
    pub parts: usize,
}

impl Teams {
    /// Teams in blocks of at most `warps` warps.
    pub fn new(pieces: usize, warps: usize) -> Self {
        let parts = pieces.div_ceil(32 * warps);
        let of_team = pieces.div_ceil(32 * parts);
        Self { teams: warps / of_team, warps: of_team, parts }
    }

    /// Blocks of them.
    pub fn launch(self, blocks: usize) -> Launch {
        Launch::grid(blocks, self.parts, 1).threads((32 * self.warps * self.teams) as u32)
    }
}

/// A kernel's argument, in the eight bytes that the driver copies it from.
pub trait Argument {
    /// Bytes of the kernel's parameter.
    const SIZE: usize;
    /// The value in the low bytes.
    fn slot(self) -> u64;
}

macro_rules! scalars {
    ($($type:ty: $size:expr, $convert:expr;)*) => { $(impl Argument for $type {
        const SIZE: usize = $size;
        fn slot(self) -> u64 { let convert: fn($type) -> u64 = $convert; convert(self) }
    })* };
}
scalars! {
    u32: 4, u64::from;
    i32: 4, |x| u64::from(x as u32);
    u64: 8, |x| x;
    f32: 4, |x| u64::from(x.to_bits());
    f64: 8, f64::to_bits;
}

impl Argument for Ref<'_, Cuda> {
    const SIZE: usize = 8;
    fn slot(self) -> u64 {
        self.address().0
    }
}

impl Argument for Mut<'_, Cuda> {
    const SIZE: usize = 8;
    fn slot(self) -> u64 {
        self.address().0
    }
}

/// A null pointer where there is none.
impl<A: Argument> Argument for Option<A> {
    const SIZE: usize = A::SIZE;
    fn slot(self) -> u64 {
        self.map_or(0, A::slot)
    }
}

/// A kernel by file and name.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The stem of its file under `kernels/`.
    pub file: &'static str,
    /// Its name, without the compute type.
    pub name: &'static str,
    /// Whether the file is compiled for each compute type, whose name ends the kernel's.
    pub typed: bool,
    /// Bytes of each parameter.
    pub sizes: &'static [usize],
}

impl Cuda {
    /// Enqueues a kernel on the compute stream. A failure is kept, and told at the next synchronisation.
    pub(crate) fn launch(&self, kernel: &'static Kernel, launch: Launch, slots: &mut [u64]) {
        self.note(self.try_launch(kernel, launch, slots));
    }

    fn try_launch(&self, kernel: &'static Kernel, launch: Launch, slots: &mut [u64]) -> Result<()> {
        let function = self.function(kernel)?;
        let mut parameters: Vec<*mut c_void> = slots.iter_mut().map(|slot| std::ptr::from_mut(slot).cast()).collect();
        let ([x, y, z], threads) = (launch.grid, launch.threads);
        let stream = self.queue(crate::backend::Stream::Compute).raw;
        // SAFETY: `function` checked that the kernel has as many parameters of these sizes, each of which the driver
        // copies from its slot before it returns; views keep the memory that they point to alive until the work
        // enqueued before its release has run (releasing synchronises).
        cuda!(cuLaunchKernel(
            function,
            x,
            y,
            z,
            threads,
            1,
            1,
            launch.shared,
            stream,
            parameters.as_mut_ptr(),
            std::ptr::null_mut()
        ))
    }
}

/// Declares kernels of a file, `NAMED` ones with the compute type in their names:
///
/// ```text
/// kernels! { "norm": NAMED norm_forward(y: Mut, x: Ref, bias: Option<Ref>, rows: u64, eps: f32); }
/// norm_forward(cuda, Launch::blocks(rows), y, x, None, rows as u64, 1e-5);
/// ```
macro_rules! kernels {
    ($file:literal: $($kind:ident $name:ident ( $($argument:ident: $type:tt $(<$inner:ident>)?),* $(,)? );)*) => { $(
        #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
        pub(super) fn $name(
            cuda: &$crate::backend::cuda::Cuda,
            launch: $crate::backend::cuda::Launch,
            $($argument: $crate::backend::cuda::launch::kernels!(@type $type $(<$inner>)?)),*
        ) {
            use $crate::backend::cuda::launch::{Argument, Kernel};
            static KERNEL: Kernel = Kernel {
                file: $file,
                name: stringify!($name),
                typed: $crate::backend::cuda::launch::kernels!(@typed $kind),
                sizes: &[$(<$crate::backend::cuda::launch::kernels!(@type $type $(<$inner>)?) as Argument>::SIZE),*],
            };
            cuda.launch(&KERNEL, launch, &mut [$($argument.slot()),*]);
        }
    )* };
    (@typed NAMED) => { true };
    (@typed PLAIN) => { false };
    (@type Ref) => { $crate::backend::Ref<'_, $crate::backend::cuda::Cuda> };
    (@type Mut) => { $crate::backend::Mut<'_, $crate::backend::cuda::Cuda> };
    (@type Option<Ref>) => { Option<$crate::backend::Ref<'_, $crate::backend::cuda::Cuda>> };
    (@type Option<Mut>) => { Option<$crate::backend::Mut<'_, $crate::backend::cuda::Cuda>> };
    (@type $scalar:tt) => { $scalar };
}
pub(crate) use kernels;
