#include "comm/copy_slice.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace llmsys::comm {

namespace {

// Less is not worth another thread's wake-up.
constexpr std::int64_t kMinPartBytes = 256 * 1024;
// A process that is stopped inside a copy finishes it when it goes on, whatever has become of its lease. So copies into
// memory of a peer are short, and each asks first.
constexpr std::int64_t kMaxMappedBytes = 64 * 1024;

}  // namespace

CopySlice::CopySlice(int num_threads, std::int64_t part_bytes)
    : pool_(num_threads), max_part_bytes_(part_bytes), parts_(static_cast<std::size_t>(num_threads)) {}

void CopySlice::begin(std::int64_t left_bytes) {
    const std::int64_t share = (left_bytes + pool_.num_threads() - 1) / pool_.num_threads();
    part_bytes_ = std::min(max_part_bytes_, std::max(kMinPartBytes, share));
    size_bytes_ = 0;
    current_ = 0;
    for (Part& part : parts_) {
        part.vectored.clear();
        part.mapped.clear();
        part.size_bytes = part.num_operations = part.error = 0;
    }
}

std::int64_t CopySlice::room_for(std::int64_t length) {
    while (current_ < parts_.size()) {
        const std::int64_t room = part_bytes_ - parts_[current_].size_bytes;
        if (room > 0) return std::min(room, length);
        ++current_;
    }
    return 0;
}

std::int64_t CopySlice::add_mapped(std::uint64_t to, std::uint64_t from, std::int64_t length) {
    const std::int64_t taken = std::min(room_for(length), kMaxMappedBytes);
    if (taken == 0) return 0;
    Part& part = parts_[current_];
    part.mapped.push_back({to, from, static_cast<std::size_t>(taken)});
    part.size_bytes += taken;
    size_bytes_ += taken;
    return taken;
}

std::int64_t CopySlice::add_vectored(std::uint64_t local, std::uint64_t remote, std::int64_t length) {
    while (const std::int64_t taken = room_for(length)) {
        Part& part = parts_[current_];
        if (part.vectored.add(local, remote, static_cast<std::size_t>(taken))) {
            part.size_bytes += taken;
            size_bytes_ += taken;
            return taken;
        }
        ++current_;
    }
    return 0;
}

int CopySlice::run(const Probe* target, bool write, const std::function<bool()>& may_write) {
    const auto used = std::count_if(parts_.begin(), parts_.end(), [](const Part& part) { return part.size_bytes > 0; });
    pool_.run(static_cast<int>(used),
              [&](int index) { run_part(parts_[static_cast<std::size_t>(index)], target, write, may_write); });
    const auto failed = std::find_if(parts_.begin(), parts_.end(), [](const Part& part) { return part.error != 0; });
    return failed == parts_.end() ? 0 : failed->error;
}

void CopySlice::run_part(Part& part, const Probe* target, bool write, const std::function<bool()>& may_write) {
    for (const Mapped& copy : part.mapped) {
        if (write && !may_write()) {
            part.error = ETIME;
            return;
        }
        std::memcpy(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from), copy.length);
        ++part.num_operations;
    }
    if (part.vectored.empty()) return;
    const std::uint64_t calls_before = part.vectored.num_calls();
    part.error = part.vectored.run(*target, write, may_write);
    part.num_operations += static_cast<std::int64_t>(part.vectored.num_calls() - calls_before);
}

std::int64_t CopySlice::num_operations() const {
    std::int64_t sum = 0;
    for (const Part& part : parts_) sum += part.num_operations;
    return sum;
}

}  // namespace llmsys::comm
