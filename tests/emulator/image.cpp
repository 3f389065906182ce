#include "image.hpp"

#include <elf.h>

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "driver.hpp"

namespace driver {

template <class T> static T read(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static bool is_elf(const char* at) { return std::memcmp(at, ELFMAG, SELFMAG) == 0; }

static size_t elf_bytes(const char* at) {
    auto header = read<Elf64_Ehdr>(at);
    size_t sections = header.e_shoff + size_t(header.e_shnum) * header.e_shentsize;
    size_t segments = header.e_phoff + size_t(header.e_phnum) * header.e_phentsize;
    return std::max(sections, segments);
}

// In the header's flags: the second byte since ABI 8 (CUDA 13), the first before.
static int elf_capability(const char* at) {
    auto header = read<Elf64_Ehdr>(at);
    return int(header.e_flags >> (header.e_ident[EI_ABIVERSION] >= 8 ? 8 : 0) & 0xff);
}

// Machine code runs on its own generation from its own step on, PTX on all that came later.
static bool code_runs(int built, int capability) { return built / 10 == capability / 10 && built <= capability; }

static int number_after(const std::string& text, const char* word) {
    size_t at = text.find(word);
    if (at == std::string::npos) return -1;
    const char* p = text.c_str() + at + std::strlen(word);
    while (*p && !std::isdigit(static_cast<unsigned char>(*p))) p++;
    char* end = nullptr;
    int whole = int(std::strtol(p, &end, 10));
    return *end == '.' ? whole * 10 + std::atoi(end + 1) : whole;
}

// The newest PTX that a driver reads: 9.0 came with 13.0, 8.0 with 12.0, and one more with each minor version but for
// 12.7, which has 8.6 as 12.6 has 8.5 (PTX ISA, "Release Notes").
static int newest_ptx(int version) {
    int major = version / 1000, minor = version % 1000 / 10;
    return major >= 13 ? 90 + minor : major == 12 ? (minor >= 6 ? 79 : 80) + minor : 70 + minor;
}

static int read_ptx(const char* text, int capability, int version, Image& image) {
    image.bytes = text;
    int isa = number_after(image.bytes, ".version"), target = number_after(image.bytes, ".target sm_");
    if (isa < 0 || target < 0) return INVALID_IMAGE;
    if (isa > newest_ptx(version)) return UNSUPPORTED_PTX_VERSION;
    return target <= capability ? SUCCESS : NO_BINARY_FOR_GPU;
}

// A fatbin's header: magic, version, its own size, the size of what follows; then entries of kind (1 PTX, 2 ELF), own
// header's size, payload's size, and at 28 the architecture, at 40 flags, of which 0x2000 and 0x8000 mean compressed.
constexpr uint32_t FATBIN = 0xba55ed50, COMPRESSED = 0xa000;

static int read_fatbin(const char* at, int capability, int version, Image& image) {
    const char* entry = at + read<uint16_t>(at + 6);
    const char* end = entry + read<uint64_t>(at + 8);
    int best = -1, result = NO_BINARY_FOR_GPU;
    while (entry < end) {
        bool ptx = read<uint16_t>(entry) == 1;
        int built = read<int>(entry + 28);
        size_t header = read<uint32_t>(entry + 4), payload = read<uint64_t>(entry + 8);
        // Machine code before PTX, the later before the earlier.
        int rank = (ptx ? 0 : 1000) + built;
        if ((ptx ? built <= capability : code_runs(built, capability)) && rank > best) {
            best = rank;
            image.machine_code = !ptx;
            image.compressed = read<uint32_t>(entry + 40) & COMPRESSED;
            image.bytes.assign(entry + header, payload);
            result = ptx && !image.compressed ? read_ptx(entry + header, capability, version, image) : SUCCESS;
        }
        entry += header + payload;
    }
    return result;
}

int read_image(const void* from, int capability, int version, Image& image) {
    const char* at = static_cast<const char*>(from);
    if (!at) return INVALID_VALUE;
    image.machine_code = is_elf(at);
    if (is_elf(at)) {
        image.bytes.assign(at, elf_bytes(at));
        return code_runs(elf_capability(at), capability) ? SUCCESS : NO_BINARY_FOR_GPU;
    }
    // A wrapper around a fatbin: magic, version, pointer.
    if (read<uint32_t>(at) == 0x466243b1) at = read<const char*>(at + 8);
    if (read<uint32_t>(at) == FATBIN) return read_fatbin(at, capability, version, image);
    return read_ptx(at, capability, version, image);
}

bool Image::has(const std::string& kernel) const {
    if (compressed) return true;
    std::string entry = machine_code ? std::string(".text.") + kernel + '\0' : ".entry " + kernel + "(";
    return bytes.find(entry) != std::string::npos;
}

size_t Image::static_shared(const std::string& kernel) const {
    if (compressed || !machine_code) return 0;
    auto header = read<Elf64_Ehdr>(bytes.data());
    auto section = [&](size_t i) { return read<Elf64_Shdr>(bytes.data() + header.e_shoff + i * header.e_shentsize); };
    const char* names = bytes.data() + section(header.e_shstrndx).sh_offset;
    size_t found = 0, system = 0;
    for (size_t i = 0; i < header.e_shnum; i++) {
        std::string name = names + section(i).sh_name;
        if (name == ".nv.shared." + kernel) found = section(i).sh_size;
        // Since sm_90 the system's own KiB of a block is counted in.
        if (name == ".nv.shared.reserved.0") system = 1024;
    }
    return found ? found - system : 0;
}

}  // namespace driver
