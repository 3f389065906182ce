//! GPT-2 checkpoints of llm.c (`gpt2_124M.bin`, `gpt2_124M_bf16.bin`): 256 little-endian int32 - magic 20240326, version
//! (3: f32, 5: bf16), longest sequence, vocabulary, layers, heads, channels, padded vocabulary -, then the tensors of one
//! kind for all layers after each other, matrices `[outputs, inputs]`.

use crate::{
    export::decoder,
    families::{self, Fold},
    import::{self, Elements},
    layout::{Foreign, Part},
    plain::Stored,
};
use mupscale::{
    DType, Error, Result,
    checkpoint::Writer,
    data::output::Partial,
    dims::{Dims, Width},
    model::{
        gpt2::{self, Gpt2},
        spec::{DecoderSpec, Spec},
    },
    ops::activation::Activation,
    upscale::Origin,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const MAGIC: i32 = 20240326;
const HEADER: usize = 256;
/// Kinds of tensors in the order of the file; `{}` stands for the layer.
const ORDER: [&str; 16] = [
    "wte.weight",
    "wpe.weight",
    "h.{}.ln_1.weight",
    "h.{}.ln_1.bias",
    "h.{}.attn.c_attn.weight",
    "h.{}.attn.c_attn.bias",
    "h.{}.attn.c_proj.weight",
    "h.{}.attn.c_proj.bias",
    "h.{}.ln_2.weight",
    "h.{}.ln_2.bias",
    "h.{}.mlp.c_fc.weight",
    "h.{}.mlp.c_fc.bias",
    "h.{}.mlp.c_proj.weight",
    "h.{}.mlp.c_proj.bias",
    "ln_f.weight",
    "ln_f.bias",
];

/// The tensors of a model in the order of the file, the vocabulary padded.
fn tensors(spec: &DecoderSpec, fold: Fold, padded: usize) -> Result<Vec<Foreign>> {
    let mut by_name: BTreeMap<String, Foreign> =
        families::gpt2(spec, fold, "", false)?.into_iter().map(|t| (t.name.clone(), t)).collect();
    if padded > spec.vocab
        && let Some(embedding) = by_name.get_mut("wte.weight")
    {
        embedding.parts.push(Part::zeros(padded - spec.vocab));
        embedding.shape[0] = padded;
    }
    let layers = |kind: &'static str| match kind.contains("{}") {
        true => (0..spec.layers).map(|i| kind.replace("{}", &i.to_string())).collect(),
        false => vec![kind.to_string()],
    };
    Ok(ORDER.into_iter().flat_map(layers).filter_map(|name| by_name.remove(&name)).collect())
}

/// A file of llm.c.
pub struct LlmcFile {
    path: PathBuf,
    file: File,
    dtype: DType,
    /// The model that its header describes.
    pub spec: DecoderSpec,
    tensors: Vec<Foreign>,
    /// Tensors by name: the place in `tensors`, and where in the file it begins.
    places: BTreeMap<String, (usize, u64)>,
}

impl Elements for LlmcFile {
    fn expect(&self, _: &Foreign) -> Result<DType> {
        Ok(self.dtype)
    }

    fn read(&self, tensor: &Foreign) -> Result<Vec<u8>> {
        Stored::read(self, &tensor.name, 0..tensor.shape.iter().product())
    }

    fn place(&self) -> &Path {
        &self.path
    }
}

impl Stored for LlmcFile {
    fn place(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    fn meta(&self, name: &str) -> Result<(DType, &[usize])> {
        Ok((self.dtype, &self.tensors[self.find(name)?.0].shape))
    }

    fn read(&self, name: &str, elements: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; elements.len() * self.dtype.size()];
        let start = self.find(name)?.1 + (elements.start * self.dtype.size()) as u64;
        self.file.read_exact_at(&mut bytes, start).map_err(Error::io("read", &self.path))?;
        Ok(bytes)
    }
}

impl LlmcFile {
    fn find(&self, name: &str) -> Result<(usize, u64)> {
        self.places.get(name).copied().ok_or_else(|| Error::tensor(&self.path, name, "is no tensor of llm.c's GPT-2"))
    }

    /// Opens a file; its header is checked, and its size against the header.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let mut header = [0i32; HEADER];
        let refuse = |why: String| Error::file(path, why);
        file.read_exact_at(bytemuck::cast_slice_mut(&mut header), 0)
            .map_err(|_| refuse(format!("has {size} bytes, too few for a checkpoint of llm.c: copy it again")))?;
        let [magic, version, context, vocab, layers, heads, channels, padded, ..] = header;
        if magic != MAGIC {
            let why = format!("starts with {magic} instead of {MAGIC}: it is no GPT-2 checkpoint of llm.c");
            return Err(refuse(why));
        }
        let found = match version {
            3 => DType::F32,
            5 => DType::BF16,
            _ => {
                return Err(refuse(format!(
                    "is of version {version}; known are 3 (f32) and 5 (bf16), as llm.c writes them"
                )));
            }
        };
        let positive = |name: &str, value: i32| {
            let size = usize::try_from(value).ok().filter(|&n| n > 0);
            size.ok_or_else(|| refuse(format!("its header says {name} {value}: it is damaged, copy it again")))
        };
        let (vocab, padded) = (positive("vocabulary", vocab)?, positive("padded vocabulary", padded)?);
        let (heads, residual) = (positive("heads", heads)?, positive("channels", channels)?);
        if !residual.is_multiple_of(heads) || padded < vocab {
            let why = format!(
                "its header contradicts itself: {residual} channels of {heads} heads, {vocab} of {padded} tokens"
            );
            return Err(refuse(why));
        }
        let dims = Dims::from_iter([
            (Width::Residual, residual),
            (Width::Ffn, 4 * residual),
            (Width::KvHeads, heads),
            (Width::Group, 1),
            (Width::HeadDim, residual / heads),
        ]);
        let parts = Gpt2 { bias: true, activation: Activation::GeluTanh, tied: true };
        let spec = gpt2::spec(dims, positive("layers", layers)?, vocab, positive("sequence", context)?, parts);
        Spec::Decoder(spec.clone()).check().map_err(|e| refuse(e.to_string()))?;
        let tensors = tensors(&spec, Fold::NONE, padded)?;
        let (mut places, mut end) = (BTreeMap::new(), (HEADER * 4) as u64);
        for (i, tensor) in tensors.iter().enumerate() {
            places.insert(tensor.name.clone(), (i, end));
            end += tensor.shape.iter().product::<usize>() as u64 * found.size() as u64;
        }
        if end != size {
            return Err(refuse(format!(
                "its header describes {end} bytes, but it has {size}: it is cut off or damaged"
            )));
        }
        Ok(Self { path: path.into(), file, dtype: found, spec, tensors, places })
    }
}

/// Converts an llm.c checkpoint.
pub fn from_llmc(path: &Path, out: &Path, dtype: Option<DType>, force: bool) -> Result<()> {
    let file = LlmcFile::open(path)?;
    import::write(file.spec.clone(), None, &file, &file.tensors, dtype, Writer::create(out, force)?)
}

/// Writes an llm.c checkpoint, in f32 or bf16.
pub fn to_llmc(origin: &Origin, out: &Path, dtype: Option<DType>, force: bool) -> Result<()> {
    let spec = decoder(origin)?;
    let reader = &origin.reader;
    if !families::is_gpt2(spec)? {
        return Err(Error::config("model", &spec.arch, "llm.c's checkpoints are GPT-2s, this is none: use to-hf"));
    }
    let (residual, ffn) = (spec.dims.get(Width::Residual), spec.dims.get(Width::Ffn));
    if ffn != 4 * residual {
        return Err(Error::config("model.ffn", ffn, format!("llm.c's MLP is 4 × {residual} wide, always")));
    }
    if !spec.tied || spec.norm_eps != 1e-5 || gelu(spec) != Some(Activation::GeluTanh) {
        let why = "llm.c has a tied readout, norm_eps 1e-5 and gelu-tanh, and no other: use to-hf";
        return Err(Error::config("model", &spec.arch, why));
    }
    let dtype = match dtype.map_or_else(|| origin.dtype(), Ok)? {
        DType::BF16 => DType::BF16,
        DType::F16 => return Err(Error::config("--dtype", "f16", "llm.c has f32 and bf16")),
        _ => DType::F32,
    };
    let padded = spec.vocab.next_multiple_of(128);
    let mut header = [0i32; HEADER];
    let version = if dtype == DType::F32 { 3 } else { 5 };
    let sizes = [spec.context, spec.vocab, spec.layers, spec.dims.heads(), residual, padded];
    header[0] = MAGIC;
    header[1] = version;
    // Sizes are at most MAX_SIZE, which an i32 holds.
    sizes.iter().zip(&mut header[2..]).for_each(|(&size, field)| *field = size as i32);
    let partial = Partial::file(out, force)?;
    let path = partial.path();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io("create", path))?);
    file.write_all(bytemuck::cast_slice(&header)).map_err(Error::io("write", path))?;
    for tensor in tensors(spec, Fold::new(spec, &origin.meaning.scaling), padded)? {
        let bytes = tensor.assemble(reader, dtype, reader.dir())?;
        file.write_all(&bytes).map_err(Error::io("write", path))?;
    }
    file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", path))?;
    partial.publish()
}

fn gelu(spec: &DecoderSpec) -> Option<Activation> {
    match spec.feed_forward {
        mupscale::model::spec::FeedForward::Plain { activation } => Some(activation),
        mupscale::model::spec::FeedForward::Gated => None,
    }
}
