// The stand-in libnccl.so.2: sums between processes of one machine over shared memory, in the order of the ranks. As
// the real one, it waits for no other rank in a call: what is not over is "in progress"; a rank that is gone is an
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

struct Sum {
    Comm* comm;
    const char* from;
    char* to;
    size_t bytes, item;
    size_t at = 0;
    bool written = false;
};

template <class T> void add(Comm& comm, char* to, size_t bytes) {
    for (size_t i = 0; i < bytes / sizeof(T); i++) {
        T sum = 0;
        for (int r = 0; r < comm.world; r++) {
            T x;
            std::memcpy(&x, comm.shared->ranks[r].pieces[comm.pieces % 2] + i * sizeof(T), sizeof(T));
            sum = r ? sum + x : x;
        }
        std::memcpy(to + i * sizeof(T), &sum, sizeof(T));
    }
}

// Writes a piece where nobody reads any more, adds it up once it is there of all, and so on. Nonzero: not over yet.
int run(void* data, char* failed) {
    Sum* sum = static_cast<Sum*>(data);
    Comm& comm = *sum->comm;
    Rank& self = comm.shared->ranks[comm.rank];
    if (!comm.aborted && (!emulated_reaches(sum->from, sum->bytes) || !emulated_reaches(sum->to, sum->bytes)))
        std::snprintf(failed, 256, "ncclAllReduce, when it ran: %zu bytes that are no memory of the device", sum->bytes);
    while (!comm.aborted && !*failed && sum->at < sum->bytes) {
        size_t bytes = std::min(PIECE, sum->bytes - sum->at);
        for (int r = 0; r < comm.world; r++) {
            const Rank& other = comm.shared->ranks[r];
            bool waits = sum->written ? other.written <= comm.pieces : other.read + 2 <= comm.pieces;
            if (!waits) continue;
            look(comm);
            return 1;
        }
        if (!sum->written) {
            std::memcpy(self.pieces[comm.pieces % 2], sum->from + sum->at, bytes);
            self.written = comm.pieces + 1;
            sum->written = true;
            continue;
        }
        if (sum->item == sizeof(float)) add<float>(comm, sum->to + sum->at, bytes);
        else add<double>(comm, sum->to + sum->at, bytes);
        self.read = ++comm.pieces;
        sum->at += bytes;
        sum->written = false;
    }
    delete sum;
    return 0;
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
    if (!comm->joined) return refuse(INVALID_USAGE, "a communicator that is not connected");
    size_t item = type == 7 ? sizeof(float) : type == 8 ? sizeof(double) : 0;
    if (!item || operation != 0) return refuse(INVALID_ARGUMENT, "only sums of f32 and f64 are emulated");
    if (!emulated_reaches(to, count * item)) return refuse(INVALID_ARGUMENT, "no memory of the device");
    // Freed when it has run.
    Sum* sum = new Sum{comm, static_cast<const char*>(from), static_cast<char*>(to), count * item, item};
    return emulated_enqueue_waiting(stream, "ncclAllReduce", run, sum) ? CUDA_ERROR : SUCCESS;
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
