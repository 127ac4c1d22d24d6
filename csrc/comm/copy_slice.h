#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "comm/copy_pool.h"
#include "comm/paths.h"

namespace llmsys::comm {

// One slice of copies within this host: a part for each copying thread. `begin`, `add_...` until it is full, `run`.
class CopySlice {
  public:
    // part_bytes: the most for one thread.
    CopySlice(int num_threads, std::int64_t part_bytes);

    // left_bytes: what is left of the batch, so that a short rest is shared out as well.
    void begin(std::int64_t left_bytes);
    // How many bytes were taken, from the first on; 0 when the slice is full.
    std::int64_t add_mapped(std::uint64_t to, std::uint64_t from, std::int64_t length);
    std::int64_t add_vectored(std::uint64_t local, std::uint64_t remote, std::int64_t length);
    std::int64_t size_bytes() const { return size_bytes_; }

    // Copies everything. Returns 0 or an errno: see VectoredCopy::run; ETIME where `may_write` said no before a write
    // to mapped memory, and then some of the slice was not copied. target: for vectored copies.
    int run(const Probe* target, bool write, const std::function<bool()>& may_write);
    // Ends the threads that help; no `run` afterwards.
    void stop() { pool_.stop(); }
    // System calls and copies of the last run.
    std::int64_t num_operations() const;

  private:
    struct Mapped {
        std::uint64_t to, from;
        std::size_t length;
    };
    struct Part {
        VectoredCopy vectored;
        std::vector<Mapped> mapped;
        std::int64_t size_bytes = 0;
        std::int64_t num_operations = 0;
        int error = 0;
    };

    // How much of `length` the part has room for; goes on to the next part when it is full.
    std::int64_t room_for(std::int64_t length);
    static void run_part(Part& part, const Probe* target, bool write, const std::function<bool()>& may_write);

    CopyPool pool_;
    const std::int64_t max_part_bytes_;
    std::int64_t part_bytes_ = 0;
    std::int64_t size_bytes_ = 0;
    std::vector<Part> parts_;
    std::size_t current_ = 0;
};

}  // namespace llmsys::comm
