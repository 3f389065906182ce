//! Where a command computes: from what the user asked for to a backend.

use crate::{
    DType, Error, Result,
    backend::{
        cpu::Cpu,
        cuda::{self, Cuda, library},
    },
    comm::environment::World,
    config::{Config, Device, KeptIn, Precision, Recording, Reduction},
    ops::Ops,
};

/// What a command was asked to compute on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// `auto`, `cpu` or `cuda`.
    pub device: Device,
    /// Type of activations and of the weights that they are computed from.
    pub precision: Precision,
    /// Type of the gradients of a micro-batch.
    pub gradients: KeptIn,
    /// Type of moments.
    pub moments: KeptIn,
    /// CPU threads; 0: all cores.
    pub threads: usize,
    /// On a GPU, launch every kernel by itself.
    pub eager: bool,
    /// On a GPU, measure the algorithms of matrix products.
    pub autotune: bool,
    /// On a GPU, apply GELU and sum the gradients of biases in kernels of their own.
    pub unfused: bool,
    /// Which of the visible GPUs, from 0.
    pub ordinal: u32,
}

/// Something to do on any backend.
pub trait Work {
    /// What it gives.
    type Output;
    /// Does it.
    fn on<B: Ops>(self, backend: B) -> Result<Self::Output>;
    /// There is no backend, and why. Gives the error to end with.
    fn refused(self, error: Error) -> Error
    where
        Self: Sized,
    {
        error
    }
}

fn attempt<W: Work, B: Ops>(work: W, backend: Result<B>) -> Result<W::Output> {
    match backend {
        Ok(backend) => work.on(backend),
        Err(error) => Err(work.refused(error)),
    }
}

impl Place {
    /// What a configuration means for one of the ranks of a host; see [`Self::among`].
    pub fn of_rank(config: &Config, world: &World) -> Result<Self> {
        let Config { device, precision, threads, graph, autotune, unfused, .. } = *config;
        let eager = graph == Recording::None;
        let (gradients, moments) = (config.memory.gradients, config.memory.moments);
        let place = Self { device, precision, gradients, moments, threads, eager, autotune, unfused, ordinal: 0 };
        let place = place.among(world)?;
        if place.device == Device::Cpu && config.comm.reduction == Reduction::Bf16 {
            let why = "is for GPUs: ranks on CPUs sum in f64; leave it out, or set comm.reduction=f32";
            return Err(Error::config("comm.reduction", "bf16", why));
        }
        Ok(place)
    }

    /// The part of one of the ranks of a host: `auto` is decided, cores are shared, and each rank has a GPU of its own:
    /// that of its number, or the only one that is shown to it.
    pub fn among(self, world: &World) -> Result<Self> {
        let (local, mut place) = (world.local_world, self);
        if place.threads == 0 && local > 1 {
            place.threads = (std::thread::available_parallelism().map_or(1, usize::from) / local).max(1);
        }
        if !place.on_gpu()? {
            return Ok(Self { device: Device::Cpu, ..place });
        }
        let ordinal = match cuda::driver::devices()? as usize {
            0 | 1 => 0,
            count if local <= count => world.local_rank as u32,
            count => {
                let why = format!("more than the {count} GPUs that are visible: start one process for each GPU");
                return Err(Error::config("ranks on a host", local, why));
            }
        };
        Ok(Self { device: Device::Cuda, ordinal, ..place })
    }

    /// Does something on the backend that this place means.
    pub fn run<W: Work>(self, work: W) -> Result<W::Output> {
        match (self.on_gpu(), self.precision) {
            (Err(error), _) => Err(work.refused(error)),
            (Ok(true), _) => attempt(work, self.gpu()),
            (Ok(false), Precision::F64) => attempt(work, self.fits_cpu().and_then(|()| Cpu::<f64>::new(self.threads))),
            (Ok(false), _) => {
                let cpu = self.fits_cpu().and_then(|()| Cpu::<f32>::new(self.threads));
                attempt(work, cpu.map(|cpu| cpu.with_moments(self.moments.dtype())))
            }
        }
    }

    /// Whether a CPU computes in the types that were asked for.
    fn fits_cpu(self) -> Result<()> {
        let (field, why) = match self {
            Self { gradients: KeptIn::Bf16, .. } => {
                ("memory.gradients", "is for GPUs: use f32 on a CPU (--set memory.gradients=f32), or --device cuda")
            }
            Self { precision: Precision::Bf16, .. } => {
                ("precision", "is for GPUs: use f32 (or auto) on a CPU, or --device cuda")
            }
            Self { precision: Precision::F64, moments: KeptIn::Bf16, .. } => (
                "memory.moments",
                "would spoil what is computed in f64: set it to f32 (which is f64 here), or use precision f32",
            ),
            _ => return Ok(()),
        };
        Err(Error::config(field, "bf16", why))
    }

    /// The GPU.
    pub fn gpu(self) -> Result<Cuda> {
        let compute = match self.precision {
            Precision::Auto | Precision::Bf16 => DType::BF16,
            Precision::F32 => DType::F32,
            Precision::F64 => {
                return Err(Error::config("precision", "f64", "is for the CPU: use --device cpu, or bf16 or f32"));
            }
        };
        let (gradient, moment) = (self.gradients.dtype(), self.moments.dtype());
        if gradient == DType::BF16 && compute != DType::BF16 {
            let why = "goes with precision bf16: products of f32 give f32 only; set it to f32, or precision to bf16";
            return Err(Error::config("memory.gradients", "bf16", why));
        }
        let Self { ordinal, eager, autotune, unfused, .. } = self;
        Cuda::new(cuda::Options { ordinal, compute, gradient, moment, eager, autotune, unfused })
    }

    /// Whether the GPU is meant. `auto` means it where a driver shows one; a GPU that is there but cannot be used is an
    /// error even so, as nobody wants to find out after a day that the CPU was busy.
    pub fn on_gpu(self) -> Result<bool> {
        match self.device {
            Device::Cpu => Ok(false),
            Device::Cuda => Ok(true),
            // Proofs in f64 are for the CPU.
            Device::Auto if self.precision == Precision::F64 => Ok(false),
            Device::Auto => {
                Ok(library::require(library::DRIVER).is_ok() && cuda::driver::devices().is_ok_and(|count| count > 0))
            }
        }
    }
}
