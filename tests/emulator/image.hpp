// What a program hands to the driver as a module: PTX text, machine code (cubin), or several of them (fatbin).
#pragma once

#include <cstdint>
#include <string>

#pragma GCC visibility push(hidden)
namespace driver {

struct Image {
    std::string bytes;  // Of the part that this device would run.
    bool machine_code = false, compressed = false;

    // Whether it holds an entry point of this name; a compressed one is believed to.
    bool has(const std::string& kernel) const;
    // Bytes of shared memory that the kernel declares; 0 where that cannot be read.
    size_t static_shared(const std::string& kernel) const;
};

// Reads a module for a device of the capability (90 for 9.0) under a driver of the version (13000); an error of the
// driver's numbers, with `image` filled in when that is none.
int read_image(const void* from, int capability, int version, Image& image);

}  // namespace driver
#pragma GCC visibility pop
