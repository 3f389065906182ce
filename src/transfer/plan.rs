//! What a training will take, before it is begun: parameters, memory, operations, time, the cost of tuning at a proxy
//! and at full size, and what is known of growing by that much for that many tokens.

use crate::{
    Error, Result,
    backend::cpu::Cpu,
    config::Config,
    dims::{Dims, Width},
    model::{self, Network, decoder::Recompute, spec::Spec},
    quickstart::comparison::training_flops_per_token,
    report::human,
    state::{Meaning, Moment},
    trainer,
};
use serde::{Deserialize, Serialize};
use std::{fmt, fs, path::Path};

/// What is asked.
pub struct Question<'a> {
    /// The base, and the tokens that it has been trained on.
    pub base: (&'a Meaning, u64),
    /// What shall be trained.
    pub target: &'a Meaning,
    /// Its batch, and what backward computes again.
    pub config: &'a Config,
    /// Tokens to train on.
    pub tokens: u64,
    /// GPUs.
    pub gpus: usize,
    /// How fast, if that is known.
    pub speed: Option<Speed>,
    /// Runs of the search for hyperparameters.
    pub trials: u64,
    /// How many times narrower the proxy is; none: 8, 4 or 2, the first that divides all widths.
    pub shrink: Option<usize>,
}

/// Throughput.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Speed {
    /// Tokens a second of the target, on all GPUs together.
    TokensPerSecond(f64),
    /// 10¹² operations a second on one device, as `bench train --json` found them for a model of so many parameters.
    Measured {
        /// The device in words.
        device: String,
        /// 10¹² operations a second.
        tflops: f64,
        /// Of the measured model.
        parameters: usize,
    },
}

impl Speed {
    /// Reads what `bench train --json` printed.
    ///
    /// # Errors
    /// A file that is no such output.
    pub fn read(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Found {
            device: String,
            tflops: f64,
            parameters: usize,
        }
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let found: Found = serde_json::from_str(&text)
            .map_err(|e| Error::file(path, format!("is not the output of `mupscale bench train --json`: {e}")))?;
        let Found { device, tflops, parameters } = found;
        match tflops > 0.0 {
            true => Ok(Self::Measured { device, tflops, parameters }),
            false => Err(Error::file(path, format!("says tflops = {tflops}: measure again"))),
        }
    }

    fn seconds(&self, flops: f64, tokens: u64, gpus: usize) -> f64 {
        match self {
            Self::TokensPerSecond(rate) => tokens as f64 / rate,
            Self::Measured { tflops, .. } => flops / (tflops * 1e12 * gpus as f64),
        }
    }
}

/// Bytes on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// As the trainer plans it in f32, with the batch of the configuration.
    pub f32: usize,
    /// In bf16 (f32 master weights, gradients and moments): activations are taken for half those of f32.
    pub bf16: usize,
    /// The same with master weights and moments shared out among the GPUs (ZeRO-1, by formula).
    pub bf16_zero1: usize,
}

/// One thing that is known, and from where.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What it says of this plan.
    pub says: String,
    /// The paper or folder.
    pub source: &'static str,
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Shape of the target.
    pub shape: Dims,
    /// Parameters of base and target.
    pub parameters: [usize; 2],
    /// Growth of the width: the residual stream's, or the first hidden layer's.
    pub width_ratio: f64,
    /// Tokens to train on.
    pub tokens: u64,
    /// Tokens for each parameter of the target.
    pub tokens_per_parameter: f64,
    /// GPUs.
    pub gpus: usize,
    /// On one GPU.
    pub memory: Memory,
    /// Operations of the base's training and of the target's.
    pub flops: [f64; 2],
    /// Seconds of the target's training; none without a speed.
    pub seconds: Option<f64>,
    /// The speed that was assumed.
    pub speed: Option<Speed>,
    /// Runs of the search.
    pub trials: u64,
    /// How many times narrower the proxy is.
    pub shrink: usize,
    /// Parameters of the proxy.
    pub proxy_parameters: usize,
    /// Operations of the search at the proxy and at full size: all runs on all tokens, as the transfer of
    /// hyperparameters asks for.
    pub tuning_flops: [f64; 2],
    /// What is known.
    pub findings: Vec<Finding>,
}

impl Question<'_> {
    /// Works the plan out.
    ///
    /// # Errors
    /// Numbers that are none, and a proxy that would have no whole number of something.
    pub fn answer(self) -> Result<Plan> {
        let counts = [("--tokens", self.tokens), ("--gpus", self.gpus as u64), ("--trials", self.trials)];
        if let Some((field, value)) = counts.into_iter().find(|&(_, count)| count == 0) {
            return Err(Error::config(field, value, "must be 1 or more"));
        }
        if let Some(Speed::TokensPerSecond(rate)) = self.speed
            && !(rate > 0.0 && rate.is_finite())
        {
            return Err(Error::config("--throughput", rate, "must be a positive number of tokens a second"));
        }
        let (base, target) = (self.base.0, self.target);
        let (shrink, proxy) = self.proxy()?;
        let cost = |spec: &Spec, meaning: &Meaning, tokens: u64| {
            training_flops_per_token(spec, &model::table(spec, &meaning.scaling)) * tokens as f64
        };
        let count = |spec: &Spec, meaning: &Meaning| model::table(spec, &meaning.scaling).parameters();
        let flops = [cost(&base.spec, base, self.base.1), cost(&target.spec, target, self.tokens)];
        let parameters = [count(&base.spec, base), count(&target.spec, target)];
        let width = if target.spec.dims().has(Width::Residual) { Width::Residual } else { Width::Hidden(1) };
        let width_ratio = target.spec.dims().ratio(base.spec.dims(), width);
        let tokens_per_parameter = self.tokens as f64 / parameters[1] as f64;
        let trials = self.trials as f64;
        Ok(Plan {
            shape: target.spec.dims().clone(),
            parameters,
            width_ratio,
            tokens: self.tokens,
            tokens_per_parameter,
            gpus: self.gpus,
            memory: self.memory()?,
            flops,
            seconds: self.speed.as_ref().map(|speed| speed.seconds(flops[1], self.tokens, self.gpus)),
            trials: self.trials,
            shrink,
            proxy_parameters: count(&proxy, target),
            tuning_flops: [trials * cost(&proxy, target, self.tokens), trials * flops[1]],
            findings: findings(parameters[1] as f64 / parameters[0] as f64, width_ratio, tokens_per_parameter),
            speed: self.speed,
        })
    }

    /// The target, narrower: heads keep their size.
    fn proxy(&self) -> Result<(usize, Spec)> {
        let dims = self.target.spec.dims();
        let shrinks = |width: Width| !matches!(width, Width::Group | Width::HeadDim);
        let divides = |k: usize| k > 0 && dims.iter().all(|(width, size)| !shrinks(width) || size.is_multiple_of(k));
        let at = |k: usize| {
            let sizes = dims.iter().map(|(width, size)| (width, if shrinks(width) { size / k } else { size }));
            (k, self.target.spec.with_dims(sizes.collect()))
        };
        match self.shrink {
            Some(k) if divides(k) => Ok(at(k)),
            Some(k) => Err(Error::config(
                "--shrink",
                k,
                format!("must divide every width that shrinks with the proxy: {dims}"),
            )),
            None => Ok(at([8, 4, 2, 1].into_iter().find(|&k| divides(k)).unwrap_or(1))),
        }
    }

    fn memory(&self) -> Result<Memory> {
        let backend = Cpu::<f32>::new(1)?;
        let network = Network::new(&backend, &self.target.spec, &self.target.scaling)?;
        let recompute = self.config.memory.recompute.candidates().first().copied().unwrap_or(Recompute::None);
        let samples = self.config.batch.size;
        // Whole on each GPU; what ranks share is a formula below.
        let mut config = self.config.clone();
        config.comm.zero = false;
        let f32 = trainer::memory(&backend, &network, &config, self.target, (0, self.gpus), samples, recompute);
        let (table, optimizer) = (network.table(), &self.target.optimizer);
        let kept = |moment: &&Moment| table.rows.iter().any(|row| moment.exists(optimizer, row));
        let moments = Moment::ALL.iter().filter(kept).count();
        let activations = f32.saturating_sub(table.arena * 4 * (2 + moments));
        let (own, shared) = (table.arena * (2 + 4), table.arena * 4 * (1 + moments));
        let with = |shared: usize| own + shared + activations / 2;
        Ok(Memory { f32, bf16: with(shared), bf16_zero1: with(shared.div_ceil(self.gpus)) })
    }
}

/// What is known of such a growth. Papers are quoted from their abstracts.
fn findings(parameters: f64, width: f64, tokens_per_parameter: f64) -> Vec<Finding> {
    if parameters <= 1.0 {
        return Vec::new();
    }
    let budget = if tokens_per_parameter < 20.0 { "under" } else { "over" };
    let size = if parameters <= 2.0 { "within" } else { "over" };
    vec![
        Finding {
            says: format!(
                "a factor of 2 speeds convergence up most reliably, most under 20 tokens per parameter, and from \
                 scratch is better beyond some factor; here parameters × {parameters:.2} (width × {width:.2}) is \
                 {size} 2, and {tokens_per_parameter:.1} tokens per parameter are {budget} 20"
            ),
            source: "arXiv 2605.13405, abstract",
        },
        Finding {
            says: "a widened model equals the narrow one throughout training while nothing perturbs it, and \
                   hyperparameters tuned on small upscales hold for large ones"
                .into(),
            source: "arXiv 2602.10545, abstract",
        },
        Finding {
            says:
                "growing the width 2× in the middle of training saved up to 35 % of its cost, with moments reset and \
                   the rate warmed up for what is new (init.moments = \"asymmetric\" is our form of it)"
                    .into(),
            source: "arXiv 2602.02472, abstract",
        },
        Finding {
            says: "measured here, on small models; `mupscale compare-growth` measures it for yours".into(),
            source: "experiments/",
        },
    ]
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |x: usize| human::count(x as f64);
        let bytes = |x: usize| human::bytes(x as u64);
        let [base, target] = self.parameters;
        writeln!(f, "parameters   {} from {} ({})", count(target), count(base), self.shape)?;
        let ratio = self.tokens_per_parameter;
        writeln!(f, "tokens       {}, {ratio:.1} for each parameter", human::count(self.tokens as f64))?;
        let Memory { f32, bf16, bf16_zero1 } = self.memory;
        writeln!(
            f,
            "memory       {} in bf16 on each of {} GPUs, {} with ZeRO-1; {} in f32",
            bytes(bf16),
            self.gpus,
            bytes(bf16_zero1),
            bytes(f32)
        )?;
        writeln!(f, "FLOPs        {}, the base's {}", human::count(self.flops[1]), human::count(self.flops[0]))?;
        match (&self.speed, self.seconds) {
            (Some(Speed::Measured { device, tflops, parameters }), Some(seconds)) => writeln!(
                f,
                "time         {} at {tflops:.3} TFLOP/s on each of {} devices (measured with {} parameters on {device})",
                human::seconds(seconds),
                self.gpus,
                count(*parameters)
            )?,
            (Some(Speed::TokensPerSecond(rate)), Some(seconds)) => {
                writeln!(f, "time         {} at {} tokens/s", human::seconds(seconds), human::count(*rate))?;
            }
            _ => writeln!(f, "time         unknown: give --throughput, or --measured with `bench train --json`")?,
        }
        let [proxy, full] = self.tuning_flops;
        writeln!(
            f,
            "tuning       {} runs of a proxy {} times narrower ({} parameters): {} FLOPs; at full size {} ({:.0}×)",
            self.trials,
            self.shrink,
            count(self.proxy_parameters),
            human::count(proxy),
            human::count(full),
            full / proxy
        )?;
        for finding in &self.findings {
            writeln!(f, "\n{} ({})", finding.says, finding.source)?;
        }
        Ok(())
    }
}
