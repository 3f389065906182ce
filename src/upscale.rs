//! From a checkpoint to a state: loading, and widening on the way (upscaling.md).
//!
//! Both are one thing: every target tensor is an expansion of one source tensor, with an index map for each axis, a
//! scale, and perhaps noise. Loading has identity maps and scale 1; other growth operators have other maps
//! ([`Growth`]). The source is mapped into memory and streamed tensor by tensor into the state's arenas, wherever they
//! lie; no wide file exists.

mod plan;

pub use plan::{Growth, RowPlan, Scales, Values};

use crate::{
    DType, Error, Result,
    backend::{Staging, Tensor},
    checkpoint::{CONFIG, MODEL, OPTIMIZER, Reader},
    config::{Moments, NoiseKind},
    data::dataset::TOKENIZER_FILE,
    model::{
        self,
        param::{Init, Kind, Row, Table},
        spec::Scaling,
    },
    mup::Ratios,
    ops::{
        Ops,
        expand::{Noise, Source},
    },
    optim, rng,
    state::{Meaning, Moment, Progress, State},
};

/// A checkpoint to start from.
pub struct Origin {
    /// Its tensors.
    pub reader: Reader,
    /// What they mean.
    pub meaning: Meaning,
    /// Where its run stood.
    pub progress: Progress,
    table: Table,
}

impl Origin {
    /// Opens a checkpoint, checks it whole (every checksum), and compares its tensors with what its configuration says.
    pub fn open(path: &std::path::Path) -> Result<Self> {
        let origin = Self::open_to_stream(path)?;
        origin.reader.verify()?;
        Ok(origin)
    }

    /// The same without the checksums of tensors, for those who read each tensor once and check it then
    /// ([`Reader::verify_tensor`]).
    pub fn open_to_stream(path: &std::path::Path) -> Result<Self> {
        let reader = Reader::open(path)?;
        let meaning: Meaning = reader.json(CONFIG)?;
        meaning.spec.check().map_err(|e| Error::file(path.join(CONFIG), e.to_string()))?;
        meaning.scaling.check(&meaning.spec).map_err(|e| Error::file(path.join(CONFIG), e.to_string()))?;
        let progress = reader.json(crate::checkpoint::STATE)?;
        let table = model::table(&meaning.spec, &meaning.scaling);
        let origin = Self { reader, meaning, progress, table };
        origin.check()?;
        Ok(origin)
    }

    /// Type of the stored weights: the widest of them.
    pub fn dtype(&self) -> Result<DType> {
        let types = self.table.rows.iter().map(|row| self.tensor(&row.name, row, MODEL)).collect::<Result<Vec<_>>>()?;
        Ok(types.into_iter().max_by_key(|t| t.size()).unwrap_or(DType::F32))
    }

    /// Whether optimizer moments are stored.
    pub fn has_moments(&self) -> bool {
        self.reader.has_file(OPTIMIZER)
    }

    /// The tokenizer file that the checkpoint carries, if any.
    pub fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        if !self.reader.has_file(TOKENIZER_FILE) {
            return Ok(None);
        }
        Ok(Some(self.reader.bytes(TOKENIZER_FILE)?.to_vec()))
    }

    /// Every weight that the configuration asks for is there with its shape, and nothing else is.
    fn check(&self) -> Result<()> {
        let dir = self.reader.dir();
        for row in &self.table.rows {
            self.tensor(&row.name, row, MODEL)?;
        }
        let known = |name: &str| {
            let stem = Moment::ALL.iter().find_map(|m| name.strip_prefix(m.name("").as_str())).unwrap_or(name);
            self.table.find(stem).is_some()
        };
        match self.reader.tensors().find(|t| !known(&t.name)) {
            Some(extra) => {
                Err(Error::tensor(dir, &extra.name, "the model that config.json describes has no such tensor"))
            }
            None => Ok(()),
        }
    }

    /// Checks one tensor against a row; gives its type.
    fn tensor(&self, name: &str, row: &Row, file: &str) -> Result<DType> {
        let meta = self.reader.tensor(name)?;
        let path = self.reader.dir().join(file);
        if meta.shape != row.shape() {
            let why = format!("has shape {:?}, but config.json describes one of {:?}", meta.shape, row.shape());
            return Err(Error::tensor(path, name, why));
        }
        if !matches!(meta.dtype, DType::F64 | DType::F32 | DType::BF16 | DType::F16) {
            let why = format!("is of type {:?}; weights and moments must be floats", meta.dtype);
            return Err(Error::tensor(path, name, why));
        }
        Ok(meta.dtype)
    }
}

/// What the loaded model is: the source's meaning at the target's shape.
pub fn meaning(origin: &Meaning, growth: Option<&Growth>) -> Result<Meaning> {
    let mut meaning = origin.clone();
    if let Some(growth) = growth {
        meaning.spec = growth.spec(&origin.spec)?;
    }
    Ok(meaning)
}

/// Fills a state (its weights, and with `moments` kept its moments, as far as this rank has them) from a checkpoint,
/// widening by `growth`. Noise does not depend on what part that is.
///
/// `optimizer` is the one that will go on; its moments must be the source's. None: weights alone.
pub fn load<B: Ops>(
    backend: &B,
    origin: &Origin,
    growth: Option<&Growth>,
    state: &mut State<B>,
    target: &Meaning,
    optimizer: Option<&crate::config::OptimizerConfig>,
    moments: Moments,
) -> Result<()> {
    let wide = model::table(&target.spec, &target.scaling);
    let mut staging = Staging::default();
    let none = Growth::none();
    let plan = growth.unwrap_or(&none);
    plan.check_moments(moments)?;
    let asymmetric = moments == Moments::Asymmetric;
    for (i, row) in wide.rows.iter().enumerate() {
        let loader = RowLoader::new(backend, origin, row, RowPlan::new(plan, &origin.table, &wide, i))?;
        let ratios = Ratios::new(row, &wide.dims, &origin.table.dims, target.scaling.scaled_readout());
        let noise = match growth {
            Some(growth) => loader.noise(backend, &mut staging, growth, &wide, &target.scaling, ratios)?,
            None => None,
        };
        for (start, part) in state.renew(wide.values(i)) {
            let target = (start, part);
            loader.expand(backend, &mut staging, None, Values::Weights, target, ratios.s(), noise.as_ref())?;
        }
        // Moments that were reset when the checkpoint was written are zero, as they are in a new state.
        let fresh = origin.progress.position.time == 0 && !origin.has_moments();
        let (Some(optimizer), false) = (optimizer, fresh || moments == Moments::Reset) else { continue };
        for moment in Moment::ALL.into_iter().filter(|m| m.exists(optimizer, row)) {
            let factors = ratios.factors(optimizer.rule(row));
            let (scale, values) = match moment {
                Moment::First => (factors.first, Values::First(asymmetric)),
                Moment::Second | Moment::Maximum => (factors.second, Values::Second(asymmetric)),
            };
            let Some(part) = state.renew_moment(moment, &wide.values(i)) else { continue };
            loader.expand(backend, &mut staging, Some(moment), values, part, scale, None)?;
        }
    }
    state.round(backend);
    Ok(())
}

fn no_moments(origin: &Origin, name: &str) -> Error {
    let kind = format!("{:?}", origin.meaning.optimizer.kind).to_lowercase();
    let why = format!(
        "is absent: the checkpoint was trained with {kind}; keep that optimizer, or start the moments anew with init.moments = \"reset\""
    );
    Error::tensor(origin.reader.dir().join(OPTIMIZER), name, why)
}

/// One row on its way from the checkpoint to the device.
struct RowLoader<'a, B: Ops> {
    origin: &'a Origin,
    row: &'a Row,
    plan: RowPlan<'a>,
    rows_map: Tensor<B>,
    columns_map: Tensor<B>,
}

impl<'a, B: Ops> RowLoader<'a, B> {
    fn new(backend: &B, origin: &'a Origin, row: &'a Row, plan: RowPlan<'a>) -> Result<Self> {
        let (rows_map, columns_map) = (map_tensor(backend, &plan.rows)?, map_tensor(backend, &plan.columns)?);
        Ok(Self { origin, row, plan, rows_map, columns_map })
    }

    /// The source's tensor that most of this row comes from.
    fn source(&self) -> &'a Row {
        &self.origin.table.rows[self.plan.parts[0].1]
    }

    /// Writes a part of scale × (copies of weights, or of a moment) + noise, from the row's element `start` on.
    fn expand(
        &self,
        backend: &B,
        staging: &mut Staging<B>,
        moment: Option<Moment>,
        values: Values,
        (start, mut target): (usize, crate::backend::Mut<'_, B>),
        scale: f64,
        noise: Option<&Noise>,
    ) -> Result<()> {
        let scales = self.plan.scales(values);
        let factors = |factors: Option<Vec<f64>>| {
            factors.map(|f| Tensor::from_bytes(backend, DType::F64, bytemuck::cast_slice(&f))).transpose()
        };
        let (rows_scale, columns_scale) = (factors(scales.rows)?, factors(scales.columns)?);
        let columns = self.row.columns();
        for (range, source) in &self.plan.parts {
            let narrow = &self.origin.table.rows[*source];
            let from = (range.start * columns).max(start);
            let to = (range.end * columns).min(start + target.len());
            if from >= to {
                continue;
            }
            let part = target.reborrow().slice(from - start..to - start);
            let (name, file) = match moment {
                None => (narrow.name.clone(), MODEL),
                Some(moment) => (moment.name(&narrow.name), OPTIMIZER),
            };
            if moment.is_some() && !self.origin.reader.contains(&name) {
                return Err(no_moments(self.origin, &name));
            }
            let dtype = self.origin.tensor(&name, narrow, file)?;
            let bytes = self.origin.reader.read(&name, 0..narrow.len())?;
            let source = Source {
                values: backend.stage(staging, &bytes, dtype)?,
                columns: narrow.columns(),
                rows_map: self.rows_map.view(),
                columns_map: self.columns_map.view(),
                scale: scale * scales.whole,
                rows_scale: rows_scale.as_ref().map(Tensor::view),
                columns_scale: columns_scale.as_ref().map(Tensor::view),
            };
            backend.expand(part, from, columns, source, noise);
            drop(bytes);
            self.origin.reader.release(&name)?;
        }
        Ok(())
    }

    /// The noise of this row, if it gets any (upscaling.md, "Noise").
    fn noise(
        &self,
        backend: &B,
        staging: &mut Staging<B>,
        growth: &Growth,
        wide: &Table,
        scaling: &Scaling,
        ratios: Ratios,
    ) -> Result<Option<Noise>> {
        let (config, row) = (&growth.config, self.row);
        let Init::Normal(base_std) = row.init else { return Ok(None) };
        if config.noise == 0.0 || !row.is_matrix() {
            return Ok(None);
        }
        let has_input_width = matches!(row.kind, Kind::Hidden | Kind::Readout);
        let copies = (self.plan.columns.len() / self.source().columns()) as u32;
        let paired = match growth.noise_kind() {
            NoiseKind::Paired if has_input_width && copies > 1 => Some(copies),
            NoiseKind::Paired => return Ok(None),
            _ => None,
        };
        let unit = match growth.noise_kind() {
            NoiseKind::Independent | NoiseKind::Paired => optim::init_std(row, wide, scaling),
            NoiseKind::Relative => ratios.s() * self.root_mean_square(backend, staging)?,
            // The μpscaling code adds its noise, in units of the target's constant deviation, before the 1/k rescale.
            NoiseKind::Paper => ratios.s() * base_std,
        };
        Ok(Some(Noise { stream: rng::Stream::new(config.seed, &row.name), amount: config.noise * unit, paired }))
    }

    fn root_mean_square(&self, backend: &B, staging: &mut Staging<B>) -> Result<f64> {
        use crate::backend::{HostBuffer, Stream};
        let source = self.source();
        let dtype = self.origin.tensor(&source.name, source, MODEL)?;
        let bytes = self.origin.reader.read(&source.name, 0..source.len())?;
        let mut out = Tensor::new(backend, DType::F64, 1)?;
        backend.mean_square(out.view_mut(), backend.stage(staging, &bytes, dtype)?);
        let mut host = backend.host(8)?;
        backend.download(Stream::Compute, out.view(), &mut host, 0);
        backend.synchronize(&backend.record(Stream::Compute))?;
        Ok(bytemuck::pod_read_unaligned::<f64>(&host.bytes()[..8]).sqrt())
    }
}

fn map_tensor<B: Ops>(backend: &B, map: &[u32]) -> Result<Tensor<B>> {
    Tensor::from_bytes(backend, DType::U32, bytemuck::cast_slice(map))
}
