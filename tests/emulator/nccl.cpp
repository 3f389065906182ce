// The stand-in libnccl.so.2: sums and copies between processes of one machine over shared memory, sums in the order of
// the ranks, each addition rounded to the type. As the real one, it waits for no other rank in a call: what is not over is "in progress"; a rank that is gone is an
// error that ncclCommGetAsyncError tells, and ncclCommAbort lets the device go on without it.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of libcuda.so.1.
extern "C" int emulated_enqueue_waiting(void* stream, const char* name, int (*run)(void*, char*), void* data);
extern "C" int emulated_reaches(const void* at, size_t bytes);

namespace {

enum Result { SUCCESS, CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE, IN_PROGRESS };

constexpr int RANKS = 64;
constexpr size_t PIECE = 64 << 10;

struct Id {
    char name[128];
};
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

struct Rank {
    std::atomic<uint64_t> joined, left;
    // Pieces that it has written, and that it has read of all ranks. It writes one while others read the one before.
    std::atomic<uint64_t> written, read;
    char pieces[2][PIECE];
};
// The memory that ranks share; zero at first. A rank holds a lock on its own byte of the file, which goes with it.
struct Shared {
    Rank ranks[RANKS];
};

struct Comm {
    int rank = 0, world = 0, file = -1;
    std::string path;
    Shared* shared = nullptr;
    uint64_t pieces = 0;
    bool joined = false;
    std::atomic<bool> aborted = false;
    std::atomic<int> error = SUCCESS;
};

thread_local std::string last_error;

int refuse(int status, const std::string& why) {
    last_error = why;
    return status;
}

struct flock lock_of(int rank) {
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = rank;
    lock.l_len = 1;
    return lock;
}

bool is_there(const Comm& comm, int rank) {
    struct flock lock = lock_of(rank);
    return rank == comm.rank || (fcntl(comm.file, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK);
}

// Notes the loss of a rank that joined and did not leave.
void look(Comm& comm) {
    for (int r = 0; r < comm.world; r++) {
        const Rank& other = comm.shared->ranks[r];
        if (other.joined && !other.left && !is_there(comm, r)) comm.error = REMOTE;
    }
}

bool attach(Comm& comm) {
    comm.file = shm_open(comm.path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (comm.file < 0 || ftruncate(comm.file, sizeof(Shared)) != 0) return false;
    struct flock lock = lock_of(comm.rank);
    if (fcntl(comm.file, F_OFD_SETLK, &lock) != 0) return false;
    void* at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, comm.file, 0);
    if (at == MAP_FAILED) return false;
    comm.shared = static_cast<Shared*>(at);
    comm.shared->ranks[comm.rank].joined = 1;
    return true;
}

// Whether all ranks have joined. The memory has no name from then on, and ends with the last process.
bool all_joined(Comm& comm) {
    for (int r = 0; r < comm.world; r++)
        if (!comm.shared->ranks[r].joined) return false;
    if (!comm.joined && comm.rank == 0) shm_unlink(comm.path.c_str());
    return comm.joined = true;
}

// A collective: a sum on all ranks or on `root` alone, or a copy of what `root` has.
struct Work {
    Comm* comm;
    const char* name;
    const char* from;
    char* to;
    size_t bytes;
    // ncclDataType_t, and the rank that gets the sum or gives the copy; ALL for a sum on all ranks.
    int type, root;
    bool copies;
    size_t at = 0;
    bool written = false;
};

constexpr int ALL = -1;
enum Type { BYTE = 1, F32 = 7, F64 = 8, BF16 = 9 };

size_t size_of(int type) { return type == BYTE ? 1 : type == BF16 ? 2 : type == F32 ? 4 : type == F64 ? 8 : 0; }

struct Bf16 {
    uint16_t bits;
    Bf16(int) : bits(0) {}
    Bf16() = default;
    explicit Bf16(float x) {
        uint32_t all;
        std::memcpy(&all, &x, 4);
        // To the nearest, ties to even; what is no number stays so.
        bits = x != x ? 0x7fff : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
    }
    operator float() const {
        uint32_t all = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &all, 4);
        return x;
    }
};

template <class T> void add(Comm& comm, char* to, size_t bytes) {
    for (size_t i = 0; i < bytes / sizeof(T); i++) {
        T sum = 0;
        for (int r = 0; r < comm.world; r++) {
            T x;
            std::memcpy(&x, comm.shared->ranks[r].pieces[comm.pieces % 2] + i * sizeof(T), sizeof(T));
            sum = r ? T(sum + x) : x;
        }
        std::memcpy(to + i * sizeof(T), &sum, sizeof(T));
    }
}

// What becomes of a piece that all have written.
void take(Work& work, size_t bytes) {
    Comm& comm = *work.comm;
    char* to = work.to + work.at;
    if (work.copies) std::memcpy(to, comm.shared->ranks[work.root].pieces[comm.pieces % 2], bytes);
    // The others' memory may hold anything afterwards: whoever reads it is found out.
    else if (work.root != ALL && work.root != comm.rank) std::memset(to, 0xff, bytes);
    else if (work.type == BF16) add<Bf16>(comm, to, bytes);
    else if (work.type == F32) add<float>(comm, to, bytes);
    else add<double>(comm, to, bytes);
}

// Writes a piece where nobody reads any more, adds it up once it is there of all, and so on. Nonzero: not over yet.
int run(void* data, char* failed) {
    Work* work = static_cast<Work*>(data);
    Comm& comm = *work->comm;
    Rank& self = comm.shared->ranks[comm.rank];
    if (!comm.aborted && (!emulated_reaches(work->from, work->bytes) || !emulated_reaches(work->to, work->bytes)))
        std::snprintf(failed, 256, "%s, when it ran: %zu bytes that are no memory of the device", work->name, work->bytes);
    while (!comm.aborted && !*failed && work->at < work->bytes) {
        size_t bytes = std::min(PIECE, work->bytes - work->at);
        for (int r = 0; r < comm.world; r++) {
            const Rank& other = comm.shared->ranks[r];
            bool waits = work->written ? other.written <= comm.pieces : other.read + 2 <= comm.pieces;
            if (!waits) continue;
            look(comm);
            return 1;
        }
        if (!work->written) {
            std::memcpy(self.pieces[comm.pieces % 2], work->from + work->at, bytes);
            self.written = comm.pieces + 1;
            work->written = true;
            continue;
        }
        take(*work, bytes);
        self.read = ++comm.pieces;
        work->at += bytes;
        work->written = false;
    }
    delete work;
    return 0;
}

int enqueue(const char* name, const void* from, void* to, size_t count, int type, int root, bool copies, Comm* comm,
            void* stream) {
    if (!comm->joined) return refuse(INVALID_USAGE, "a communicator that is not connected");
    size_t bytes = count * size_of(type);
    if (!size_of(type)) return refuse(INVALID_ARGUMENT, "a type that is not emulated");
    if (!emulated_reaches(to, bytes)) return refuse(INVALID_ARGUMENT, "no memory of the device");
    // Freed when it has run.
    Work* work = new Work{comm, name, static_cast<const char*>(from), static_cast<char*>(to), bytes, type, root, copies};
    return emulated_enqueue_waiting(stream, name, run, work) ? CUDA_ERROR : SUCCESS;
}

}  // namespace

EXPORT int ncclGetVersion(int* version) {
    *version = 22703;
    return SUCCESS;
}
EXPORT int ncclGetUniqueId(Id* id) {
    std::memset(id, 0, sizeof *id);
    auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    std::snprintf(id->name, sizeof id->name, "/emulated-nccl-%d-%lld", int(getpid()), (long long)now);
    return SUCCESS;
}
EXPORT int ncclCommInitRankConfig(Comm** made, int world, Id id, int rank, Config* config) {
    *made = nullptr;
    if (config->magic != 0xcafebeef || config->version < 21400) return refuse(INVALID_ARGUMENT, "config");
    if (config->blocking != 0) return refuse(INVALID_USAGE, "blocking communicators are not emulated");
    if (world > RANKS || rank < 0 || rank >= world) return refuse(INVALID_ARGUMENT, "rank");
    Comm* comm = new Comm;
    comm->rank = rank;
    comm->world = world;
    comm->path = id.name;
    if (!attach(*comm)) return refuse(SYSTEM_ERROR, "shared memory " + comm->path);
    *made = comm;
    return IN_PROGRESS;
}
EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
    look(*comm);
    *state = comm->error ? comm->error.load() : comm->joined || all_joined(*comm) ? SUCCESS : IN_PROGRESS;
    return SUCCESS;
}
EXPORT int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Comm* comm, void* stream) {
    if (type == BYTE || operation != 0) return refuse(INVALID_ARGUMENT, "only sums of bf16, f32 and f64 are emulated");
    return enqueue("ncclAllReduce", from, to, count, type, ALL, false, comm, stream);
}
EXPORT int ncclReduce(const void* from, void* to, size_t count, int type, int operation, int root, Comm* comm,
                      void* stream) {
    if (type == BYTE || operation != 0) return refuse(INVALID_ARGUMENT, "only sums of bf16, f32 and f64 are emulated");
    if (root < 0 || root >= comm->world) return refuse(INVALID_ARGUMENT, "root");
    return enqueue("ncclReduce", from, to, count, type, root, false, comm, stream);
}
EXPORT int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, void* stream) {
    if (root < 0 || root >= comm->world) return refuse(INVALID_ARGUMENT, "root");
    return enqueue("ncclBroadcast", from, to, count, type, root, true, comm, stream);
}
EXPORT int ncclCommFinalize(Comm* comm) {
    comm->shared->ranks[comm->rank].left = 1;
    return SUCCESS;
}
// The memory stays: work that is under way may look at it.
EXPORT int ncclCommDestroy(Comm* comm) {
    comm->shared->ranks[comm->rank].left = 1;
    return SUCCESS;
}
EXPORT int ncclCommAbort(Comm* comm) {
    comm->aborted = true;
    if (!comm->joined && comm->rank == 0) shm_unlink(comm->path.c_str());
    return SUCCESS;
}
EXPORT const char* ncclGetErrorString(int status) {
    static const char* const words[] = {"no error",         "unhandled cuda error", "unhandled system error",
                                        "internal error",   "invalid argument",     "invalid usage",
                                        "remote process exited or there was a network error", "in progress"};
    return status >= 0 && status <= IN_PROGRESS ? words[status] : "unknown result code";
}
EXPORT const char* ncclGetLastError(Comm*) { return last_error.c_str(); }
