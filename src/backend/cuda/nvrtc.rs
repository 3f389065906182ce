//! Compiling kernels on the machine that runs them, with NVRTC, and keeping the result on disk.
#![allow(unsafe_code, reason = "calls NVRTC")]

use super::{library, module::Source};
use crate::{Error, Result};
use cudarc::nvrtc::sys::{self, nvrtcResult};
use std::{
    env,
    ffi::{CStr, CString, c_char},
    fs,
    path::PathBuf,
    ptr,
};

/// Machine code for this capability, or PTX where this NVRTC is older than the GPU; from the cache if it is there.
///
/// The cache's key is the text, the headers, the options, and NVRTC's version. An entry begins with the hash of what
/// follows; a damaged one is compiled again.
pub(super) fn compile(source: &Source, headers: &[(&str, &str)], capability: u32) -> Result<Vec<u8>> {
    library::require(library::NVRTC)?;
    let version = version()?;
    let options = options(source, capability)?;
    let mut key = blake3::Hasher::new();
    for part in headers.iter().flat_map(|(name, text)| [*name, *text]).chain([source.text, &version]) {
        key.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    options.iter().for_each(|option| {
        key.update(option.to_bytes_with_nul());
    });
    let entry = cache_folder().map(|folder| folder.join(format!("{}-{}", source.stem, key.finalize().to_hex())));
    if let Some(image) = entry.as_ref().and_then(read) {
        return Ok(image);
    }
    let image = Program::new(source, headers)?.image(&options, source.stem)?;
    if let Some(entry) = entry {
        keep(&entry, &image);
    }
    Ok(image)
}

/// `$XDG_CACHE_HOME/mupscale/kernels`, or the same under `~/.cache`.
fn cache_folder() -> Option<PathBuf> {
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    Some(env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?.join("mupscale/kernels"))
}

fn read(entry: &PathBuf) -> Option<Vec<u8>> {
    let bytes = fs::read(entry).ok()?;
    let (hash, image) = bytes.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(image).as_bytes() == hash).then(|| image.to_vec())
}

/// Written beside and renamed. A cache that cannot be written costs time at the next start only.
fn keep(entry: &PathBuf, image: &[u8]) {
    let beside = entry.with_extension(format!("{}", std::process::id()));
    let bytes = [blake3::hash(image).as_bytes().as_slice(), image].concat();
    let written = entry.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&beside, bytes));
    if written.and_then(|()| fs::rename(&beside, entry)).is_err() {
        let _ = fs::remove_file(&beside);
        tracing::debug!("the cache of kernels, {}, cannot be written", entry.display());
    }
}

fn check(status: nvrtcResult, call: &str) -> Result<()> {
    if status == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(Error::Device(format!("{call}: NVRTC says {status:?}")))
}

macro_rules! nvrtc {
    ($call:ident ( $($argument:expr),* $(,)? )) => {
        // SAFETY: argued at each use.
        check(unsafe { sys::$call($($argument),*) }, stringify!($call))
    };
}

/// For example `13.0`.
pub fn version() -> Result<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: plain out-parameters.
    nvrtc!(nvrtcVersion(&mut major, &mut minor))?;
    Ok(format!("{major}.{minor}"))
}

fn options(source: &Source, capability: u32) -> Result<Vec<CString>> {
    let mut count = 0;
    // SAFETY: a plain out-parameter.
    nvrtc!(nvrtcGetNumSupportedArchs(&mut count))?;
    let mut known = vec![0; count as usize];
    // SAFETY: room for as many numbers as NVRTC said.
    nvrtc!(nvrtcGetSupportedArchs(known.as_mut_ptr()))?;
    let target = match known.contains(&(capability as i32)) {
        true => format!("--gpu-architecture=sm_{capability}"),
        false => "--gpu-architecture=compute_80".into(),
    };
    let mut options = vec![target, "--std=c++17".into(), "--device-as-default-execution-space".into()];
    options.extend(source.real.map(|real| format!("--define-macro=REAL={real}")));
    Ok(options.into_iter().map(|option| CString::new(option).expect("an option has no zero byte")).collect())
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: &Source, headers: &[(&str, &str)]) -> Result<Self> {
        let c = |text: &str| CString::new(text).expect("a kernel's text has no zero byte");
        let (text, name) = (c(source.text), c(&format!("{}.cu", source.stem)));
        let names: Vec<CString> = headers.iter().map(|(name, _)| c(name)).collect();
        let texts: Vec<CString> = headers.iter().map(|(_, text)| c(text)).collect();
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
        let mut program = ptr::null_mut();
        // SAFETY: terminated strings and arrays of them, as many as said, alive during the call, which copies them.
        nvrtc!(nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            pointers(&texts).as_ptr(),
            pointers(&names).as_ptr()
        ))?;
        Ok(Self(program))
    }

    fn image(&self, options: &[CString], stem: &str) -> Result<Vec<u8>> {
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        // SAFETY: a live program, an array of as many terminated strings as said.
        let compiled = nvrtc!(nvrtcCompileProgram(self.0, pointers.len() as i32, pointers.as_ptr()));
        compiled.map_err(|error| Error::Device(format!("kernels/{stem}.cu: {error}:\n{}", self.log())))?;
        let is_machine_code = options[0].to_string_lossy().contains("=sm_");
        let mut size = 0;
        // SAFETY: a compiled program, a plain out-parameter.
        if is_machine_code {
            nvrtc!(nvrtcGetCUBINSize(self.0, &mut size))?
        } else {
            nvrtc!(nvrtcGetPTXSize(self.0, &mut size))?
        }
        let mut image = vec![0u8; size];
        let to = image.as_mut_ptr().cast();
        // SAFETY: room for as many bytes as NVRTC said.
        if is_machine_code {
            nvrtc!(nvrtcGetCUBIN(self.0, to))?
        } else {
            nvrtc!(nvrtcGetPTX(self.0, to))?
        }
        Ok(image)
    }

    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: a live program, a plain out-parameter.
        if nvrtc!(nvrtcGetProgramLogSize(self.0, &mut size)).is_err() {
            return String::new();
        }
        let mut log = vec![0u8; size + 1];
        // SAFETY: room for as many bytes as NVRTC said, and one more that stays zero.
        let read = nvrtc!(nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()));
        read.map_or(String::new(), |()| CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `new`, dropped once.
        let _ = nvrtc!(nvrtcDestroyProgram(&mut self.0));
    }
}
