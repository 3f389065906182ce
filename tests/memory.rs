//! Memory is planned before the first step, and a step allocates nothing. One test, so that nothing else happens in this
//! process.

mod common;

use common::*;
use mupscale::{
    backend::{Backend, cpu::Cpu},
    machine,
};

/// Steps before memory is looked at: the first ones touch what was planned, and fill the allocator's own lists.
const WARM_UP: usize = 20;
const STEPS: usize = 200;

#[test]
fn a_step_takes_no_memory() {
    for (name, model) in MODELS {
        for (optimizer_name, optimizer) in [OPTIMIZERS[5], OPTIMIZERS[7]] {
            let config = config(model, optimizer, &["batch.micro_batches=2"]);
            let mut trainer = trainer(Cpu::<f32>::new(2).unwrap(), &config, &meaning(&config));
            let allocated = trainer.backend.allocated();
            assert!(allocated >= trainer.plan.bytes(), "{name}: less is allocated than was planned");
            let mut run = |steps| {
                for _ in 0..steps / 10 {
                    losses(&mut trainer, 10);
                    trainer.validate(2).unwrap();
                    assert_eq!(trainer.backend.allocated(), allocated, "{name}, {optimizer_name}");
                }
                machine::resident_memory().expect("a system that says how much memory is resident")
            };
            let before = run(WARM_UP);
            let grown = run(STEPS).saturating_sub(before);
            assert!(grown <= 1 << 20, "{name}, {optimizer_name}: {grown} bytes more after {STEPS} steps");
        }
    }
}
