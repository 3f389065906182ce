//! Kernels in memory: which image of a kernel a GPU gets, and its functions.
//!
//! `build.rs` puts every kernel's text into the program and, where it found nvcc, images: machine code for some
//! architectures and PTX for later ones. Where there is no image that the GPU or its driver can take, NVRTC compiles the
//! text, once; the result is kept on disk.
#![allow(unsafe_code, reason = "loads images into the driver")]

use super::{
    driver::{Context, Properties, cuda, dotted},
    launch::Kernel,
    nvrtc,
};
use crate::{DType, Error, Result};
use cudarc::driver::sys;
use std::{
    collections::HashMap,
    ffi::CString,
    fmt, ptr,
    sync::{Arc, Mutex, PoisonError},
};

/// A file under `kernels/` as built.
pub struct Source {
    /// File name without `.cu`.
    pub stem: &'static str,
    /// Compute type that it was compiled for, `f32` or `bf16`; none where it does not depend on one.
    pub real: Option<&'static str>,
    /// The text.
    pub text: &'static str,
    /// PTX for compute capability 8.0 and later.
    pub ptx: Option<&'static [u8]>,
    /// Machine code by compute capability times ten.
    pub images: &'static [(u32, &'static [u8])],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The road by which kernels reach a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Road {
    /// Machine code for this capability, built with the program.
    Image(u32),
    /// PTX built with the program; the driver compiles it.
    Ptx,
    /// Compiled on this machine.
    Nvrtc,
}

impl fmt::Display for Road {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(arch) => write!(f, "machine code for sm_{arch}"),
            Self::Ptx => f.write_str("PTX for compute_80, compiled by the driver"),
            Self::Nvrtc => f.write_str("compiled on this machine by NVRTC"),
        }
    }
}

/// Chooses the road for a GPU and a driver, and says why.
///
/// Machine code runs on the same major version from its own minor version on. Machine code and PTX of a toolkit need a
/// driver of its major version at least; NVRTC, which came with the machine's own libraries, suits its driver.
/// `MUPSCALE_KERNELS` (`image`, `ptx`, `nvrtc`) forces one.
pub fn road(capability: u32, driver: i32) -> (Road, String) {
    let image = || {
        let fits = |arch: &u32| arch / 10 == capability / 10 && *arch <= capability;
        KERNELS.first().and_then(|k| k.images.iter().map(|(arch, _)| *arch).filter(fits).max())
    };
    let forced = std::env::var("MUPSCALE_KERNELS").unwrap_or_default();
    match (forced.as_str(), TOOLKIT) {
        ("nvrtc", _) => (Road::Nvrtc, "MUPSCALE_KERNELS asks for it".into()),
        (_, None) => (Road::Nvrtc, "the program was built without nvcc".into()),
        (_, Some(toolkit)) if major(toolkit) > driver / 1000 => {
            let why = format!("the program was built with CUDA {toolkit}, the driver knows {}", dotted(driver));
            (Road::Nvrtc, why)
        }
        ("ptx", _) => (Road::Ptx, "MUPSCALE_KERNELS asks for it".into()),
        _ => match image() {
            Some(arch) => (Road::Image(arch), format!("the GPU is sm_{capability}")),
            None => (Road::Ptx, format!("no machine code for sm_{capability} was built")),
        },
    }
}

fn major(toolkit: &str) -> i32 {
    toolkit.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(i32::MAX)
}

/// The modules and functions that a backend has loaded.
pub(super) struct Modules {
    context: Arc<Context>,
    properties: Properties,
    compute: DType,
    road: Road,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// By stem and compute type.
    modules: HashMap<(&'static str, Option<&'static str>), sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: module and function handles may be used from any thread.
unsafe impl Send for Loaded {}

impl Modules {
    pub(super) fn new(context: &Arc<Context>, properties: &Properties, compute: DType, road: Road) -> Self {
        let (context, properties) = (context.clone(), properties.clone());
        Self { context, properties, compute, road, loaded: Mutex::default() }
    }

    /// The function of a kernel, loaded at its first use.
    pub(super) fn function(&self, kernel: &'static Kernel) -> Result<sys::CUfunction> {
        self.context.bind()?;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = loaded.functions.get(kernel.name) {
            return Ok(function);
        }
        let real = kernel.typed.then(|| self.compute.name());
        let module = match loaded.modules.get(&(kernel.file, real)) {
            Some(&module) => module,
            None => {
                let module = self.load(kernel.file, real)?;
                loaded.modules.insert((kernel.file, real), module);
                module
            }
        };
        let function = self.find(module, kernel, real)?;
        loaded.functions.insert(kernel.name, function);
        Ok(function)
    }

    fn load(&self, stem: &'static str, real: Option<&'static str>) -> Result<sys::CUmodule> {
        let source = KERNELS.iter().find(|k| k.stem == stem && k.real == real);
        let source = source.unwrap_or_else(|| panic!("no kernels/{stem}.cu for {real:?}"));
        let missing = || Error::Device(format!("kernels/{stem}.cu was built without an image for {}", self.road));
        let image = match self.road {
            Road::Image(arch) => {
                source.images.iter().find(|(a, _)| *a == arch).map(|(_, image)| image.to_vec()).ok_or_else(missing)?
            }
            Road::Ptx => source.ptx.ok_or_else(missing)?.to_vec(),
            Road::Nvrtc => nvrtc::compile(source, HEADERS, self.properties.capability)?,
        };
        // PTX is a C string.
        let mut image = image;
        image.push(0);
        let mut module = ptr::null_mut();
        // SAFETY: an image that nvcc or NVRTC made, terminated, alive during the call; the driver checks its form.
        cuda!(cuModuleLoadData(&mut module, image.as_ptr().cast())).map_err(|error| {
            let name = real.map_or(stem.to_string(), |real| format!("{stem} ({real})"));
            Error::Device(format!("kernel file {name} cannot be loaded: {error} ({})", self.road))
        })?;
        Ok(module)
    }

    fn find(&self, module: sys::CUmodule, kernel: &Kernel, real: Option<&str>) -> Result<sys::CUfunction> {
        let name = real.map_or(kernel.name.to_string(), |real| format!("{}_{real}", kernel.name));
        let text = CString::new(name.clone()).expect("a kernel's name has no zero byte");
        let mut function = ptr::null_mut();
        // SAFETY: a loaded module, a terminated string.
        cuda!(cuModuleGetFunction(&mut function, module, text.as_ptr()))
            .map_err(|error| Error::Device(format!("kernel {name}: {error}")))?;
        for (i, &expected) in kernel.sizes.iter().enumerate() {
            assert_eq!(parameter(function, i)?, Some(expected), "size of parameter {i} of {name}");
        }
        assert_eq!(parameter(function, kernel.sizes.len())?, None, "{name} has more parameters than are declared");
        self.allow_shared(function)?;
        Ok(function)
    }

    /// Lets launches ask for all the shared memory that a block can have.
    fn allow_shared(&self, function: sys::CUfunction) -> Result<()> {
        use sys::CUfunction_attribute_enum as A;
        let mut fixed = 0;
        // SAFETY: a loaded function, a plain out-parameter.
        cuda!(cuFuncGetAttribute(&mut fixed, A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))?;
        let most = self.properties.shared_limit as i32 - fixed;
        // SAFETY: a loaded function.
        cuda!(cuFuncSetAttribute(function, A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most))
    }
}

/// Bytes of a parameter; none beyond the last.
fn parameter(function: sys::CUfunction, index: usize) -> Result<Option<usize>> {
    let (mut offset, mut size) = (0, 0);
    // SAFETY: a loaded function, plain out-parameters; the driver refuses an index beyond the last.
    match unsafe { sys::cuFuncGetParamInfo(function, index, &mut offset, &mut size) } {
        sys::CUresult::CUDA_SUCCESS => Ok(Some(size)),
        sys::CUresult::CUDA_ERROR_INVALID_VALUE => Ok(None),
        status => super::driver::check(status, "cuFuncGetParamInfo").map(|()| None),
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        if self.context.bind().is_ok() {
            for &module in loaded.modules.values() {
                // SAFETY: loaded by `load`; its functions are launched by the backend that is being dropped only.
                let _ = cuda!(cuModuleUnload(module));
            }
        }
    }
}
