// One of kernels/*.cu, named by KERNEL_FILE, as the emulated device's code.
#include "machine.hpp"

namespace {
#include KERNEL_FILE
}
