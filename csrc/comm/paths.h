#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace llmsys::comm {

// How bytes reach a peer. shm: its memory is mapped here, a copy. cma: process_vm_readv and its twin, the peer's
// process takes no part. ucx: everything else, also other hosts and CUDA memory.
enum class Path : std::uint8_t { shm = 0, cma = 1, ucx = 2 };

inline constexpr std::array<const char*, 3> kPathNames{"shm", "cma", "ucx"};

using Nonce = std::array<std::uint8_t, 16>;

// A word in a process's memory that tells it from another one with the same pid.
struct Probe {
    pid_t pid = 0;
    std::uint64_t address = 0;
    Nonce nonce{};
};

// A list of copies between this process and another, for one system call. `add` as long as it says true, then `run`.
class VectoredCopy {
  public:
    VectoredCopy();

    void clear();
    // False, and nothing added, when the list is full.
    bool add(std::uint64_t local, std::uint64_t remote, std::size_t length);
    std::size_t size_bytes() const { return size_bytes_; }
    bool empty() const { return count_ == 0; }

    // Copies everything, in as many system calls as it takes, and makes sure that it was the process with that nonce.
    // Returns 0 or an errno; ESRCH also where another process has taken the pid. A write is made in short calls and
    // asks `may_write` before each: ETIME where it said no, and then some was not copied.
    int run(const Probe& target, bool write, const std::function<bool()>& may_write);
    std::uint64_t num_calls() const { return num_calls_; }

  private:
    struct Vector {  // the layout of iovec, with addresses that may be of another process
        std::uint64_t base;
        std::uint64_t length;
    };
    static constexpr std::size_t kMaxVectors = 1024;  // IOV_MAX of Linux

    std::array<Vector, kMaxVectors> local_;
    std::array<Vector, kMaxVectors> remote_;
    std::size_t count_ = 0;
    std::size_t size_bytes_ = 0;
    std::uint64_t num_calls_ = 0;
};

// 0 where the process is there, may be read and has the nonce, else an errno (ESRCH for another nonce).
int verify(const Probe& target);

}  // namespace llmsys::comm
