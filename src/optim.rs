//! From the optimizer's configuration and the parameter table to each row's settings.

use crate::{
    config::{ClipNorm, OptimizerConfig, OptimizerKind, ShapeFactor},
    dims::Axis,
    model::{
        param::{Kind, Row, Table},
        spec::Scaling,
    },
    mup::{Ratios, Rule},
    ops::{optimizer::Method, pieces::RowSettings},
};

impl OptimizerConfig {
    /// The rule that a row follows under widening.
    pub fn rule(&self, row: &Row) -> Rule {
        match self.kind {
            OptimizerKind::Sgd => Rule::Sgd,
            OptimizerKind::Adam => Rule::Adam,
            OptimizerKind::AdamW => Rule::AdamW,
            OptimizerKind::Lion => Rule::Lion,
            OptimizerKind::Muon if row.kind == Kind::Hidden => Rule::Muon,
            OptimizerKind::Muon => Rule::AdamW,
        }
    }

    /// Whether the optimizer keeps a first moment.
    pub fn has_first(&self) -> bool {
        self.kind != OptimizerKind::Sgd || self.momentum != 0.0
    }

    /// Whether a row has a second moment.
    pub fn has_second(&self, row: &Row) -> bool {
        matches!(self.rule(row), Rule::Adam | Rule::AdamW)
    }

    /// Whether a row has a maximum of the second moment.
    pub fn has_maximum(&self, row: &Row) -> bool {
        self.amsgrad && self.has_second(row) && matches!(self.method(), Method::Adam { amsgrad: true, .. })
    }

    /// What the optimizer needs to know of each row.
    pub fn settings(&self, table: &Table, scaling: &Scaling) -> Vec<RowSettings> {
        table.rows.iter().map(|row| self.row_settings(row, table, scaling)).collect()
    }

    fn row_settings(&self, row: &Row, table: &Table, scaling: &Scaling) -> RowSettings {
        let ratios = ratios(row, table, scaling);
        let rule = self.rule(row);
        let exact = ratios.factors(rule);
        let factors = scaling.rules.apply(exact, row.kind, ratios.k_in, ratios.k_out);
        let muon = rule == Rule::Muon;
        let decay = if row.is_matrix() { self.weight_decay * factors.decay } else { 0.0 };
        let clip = match self.clip_norm {
            ClipNorm::Mup => ratios.clip(),
            ClipNorm::Plain => 1.0,
        };
        let (eps, shape) = if muon { (self.muon_eps, self.shape_factor(row, table, scaling)) } else { (self.eps, 1.0) };
        // Decay goes with the learning rate, so a shape factor on the rate must not reach it.
        RowSettings {
            lr: factors.lr * shape,
            decay: decay / shape,
            eps: eps * factors.eps * depth_factor(row, table, scaling),
            clip,
            muon: u64::from(muon),
        }
    }

    /// Muon's factor from a matrix's shape, at the base shape, so that widening does not change it.
    fn shape_factor(&self, row: &Row, table: &Table, scaling: &Scaling) -> f64 {
        let base = scaling.reference(&table.dims);
        let size = |axis: Option<&Axis>| axis.map_or(1.0, |a| a.size() as f64 / a.ratio(&table.dims, base));
        let (rows, columns) = (size(row.axes.first()), size(row.axes.get(1)));
        match self.shape_factor {
            ShapeFactor::None => 1.0,
            ShapeFactor::Spectral => (rows / columns).max(1.0).sqrt(),
            ShapeFactor::Rms => 0.2 * rows.max(columns).sqrt(),
        }
    }
}

/// Ratios of a row of this model to the same row of its base.
pub fn ratios(row: &Row, table: &Table, scaling: &Scaling) -> Ratios {
    Ratios::new(row, &table.dims, scaling.reference(&table.dims), scaling.scaled_readout())
}

/// Factor on a row's epsilon from the number of blocks: gradients of a block fall with what it adds.
fn depth_factor(row: &Row, table: &Table, scaling: &Scaling) -> f64 {
    // Groups are the embeddings, the blocks, and the end.
    let blocks = 1..table.groups().saturating_sub(1);
    if blocks.contains(&row.group) { scaling.rules.depth_factor(blocks.len()) } else { 1.0 }
}

/// Deviation of a row's initial values, μP's ratio included; 0 for gains and biases.
pub fn init_std(row: &Row, table: &Table, scaling: &Scaling) -> f64 {
    match row.init {
        crate::model::param::Init::Normal(std) => std * ratios(row, table, scaling).init(row.kind),
        _ => 0.0,
    }
}
