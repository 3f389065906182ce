// What kernels of the update share with src/ops/pieces.rs and src/ops/scalars.rs.
#pragma once
#include "device.cuh"

// A run of at most 65,536 elements of one row of the parameter table.
struct Piece {
    u64 offset;
    u32 len, row;
};

struct RowSettings {
    f64 lr, decay, eps, clip;
    u64 muon;
};

// Places in StepScalars.
enum Scalar {
    LEARNING_RATE,
    TIME,
    LOSS_SUM,
    COUNTED,
    GRAD_NORM,
    FACTOR,
    SKIP,
    HALT,
    BAD_ROW,
    UPDATE_NORM,
};
