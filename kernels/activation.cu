// GELU (tanh form and exact), ReLU, SwiGLU: src/ops/activation.rs has the formulas. One thread takes 16 bytes.
#include "device.cuh"

enum Kind { GELU_TANH = 0, GELU_EXACT = 1, RELU = 2 };

// 2 sqrt(2/pi) and 2 sqrt(2/pi) * 0.044715: 0.5 (1 + tanh u) is sigmoid(2u), and 2u = x (LINEAR + CUBIC x^2).
#define LINEAR 1.5957691216057308f
#define CUBIC (LINEAR * 0.044715f)
