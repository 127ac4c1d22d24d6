#include "comm/paths.h"

#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace llmsys::comm {

namespace {

// A call moves at most MAX_RW_COUNT bytes, a little less than 2 GiB, and reports a longer one as short.
constexpr std::size_t kMaxBytes = std::size_t{1} << 30;
// A process that is stopped before a call makes that call when it goes on, whatever has become of its lease.
constexpr std::size_t kMaxWriteBytes = std::size_t{256} << 10;

iovec* as_iovec(void* vectors) { return static_cast<iovec*>(vectors); }

}  // namespace

VectoredCopy::VectoredCopy() {
    static_assert(sizeof(Vector) == sizeof(iovec) && offsetof(Vector, length) == offsetof(iovec, iov_len));
}

void VectoredCopy::clear() {
    count_ = 0;
    size_bytes_ = 0;
}

bool VectoredCopy::add(std::uint64_t local, std::uint64_t remote, std::size_t length) {
    // The last place is for the nonce.
    if (count_ + 1 >= kMaxVectors || (count_ > 0 && size_bytes_ + length > kMaxBytes)) return false;
    local_[count_] = {local, length};
    remote_[count_] = {remote, length};
    ++count_;
    size_bytes_ += length;
    return true;
}

int VectoredCopy::run(const Probe& target, bool write, const std::function<bool()>& may_write) {
    // A read proves with its last bytes whose memory it was. A write cannot, so it asks before: the pid may have been
    // given to another process, which must not be written to.
    if (write) {
        if (const int error = verify(target)) return error;
    }
    Nonce seen{};
    std::size_t count = count_;
    std::size_t left = size_bytes_;
    if (!write) {
        local_[count] = {reinterpret_cast<std::uint64_t>(seen.data()), seen.size()};
        remote_[count] = {target.address, seen.size()};
        ++count;
        left += seen.size();
    }
    std::size_t first = 0;
    while (left > 0) {
        std::size_t n = count - first;
        std::uint64_t cut = 0;  // bytes of the last vector that are left for the next call
        if (write) {
            std::uint64_t sum = local_[first].length;
            for (n = 1; sum < kMaxWriteBytes && first + n < count; ++n) sum += local_[first + n].length;
            cut = sum > kMaxWriteBytes ? sum - kMaxWriteBytes : 0;
            if (!may_write()) return ETIME;
        }
        iovec* local = as_iovec(&local_[first]);
        iovec* remote = as_iovec(&remote_[first]);
        ++num_calls_;
        // As many bytes move as the shorter side has.
        local_[first + n - 1].length -= cut;
        const ssize_t moved = write ? process_vm_writev(target.pid, local, n, remote, n, 0)
                                    : process_vm_readv(target.pid, local, n, remote, n, 0);
        const int error = errno;
        local_[first + n - 1].length += cut;
        if (moved < 0) return error;
        if (moved == 0) return EFAULT;
        // Short: it stopped at an address that is not mapped, or at a limit. Go on from there and learn which.
        left -= static_cast<std::size_t>(moved);
        std::uint64_t rest = static_cast<std::uint64_t>(moved);
        while (first < count && rest >= local_[first].length) rest -= local_[first++].length;
        if (rest > 0) {
            for (Vector* vector : {&local_[first], &remote_[first]}) {
                vector->base += rest;
                vector->length -= rest;
            }
        }
    }
    if (write) return verify(target);
    return seen == target.nonce ? 0 : ESRCH;
}

int verify(const Probe& target) {
    Nonce seen{};
    iovec local{seen.data(), seen.size()};
    iovec remote{reinterpret_cast<void*>(target.address), seen.size()};
    const ssize_t moved = process_vm_readv(target.pid, &local, 1, &remote, 1, 0);
    if (moved < 0) return errno;
    return moved == static_cast<ssize_t>(seen.size()) && seen == target.nonce ? 0 : ESRCH;
}

}  // namespace llmsys::comm
