#pragma once

#include <cstdint>
#include <vector>

namespace llmsys::comm {

// Bytes [local, local + length) of a region here and [remote, remote + length) of one at the peer.
struct Segment {
    std::int64_t local = 0;
    std::int64_t remote = 0;
    std::int64_t length = 0;
};

// Entries of a batch in the caller's order; the arrays are the caller's.
struct Entries {
    const std::int64_t* local = nullptr;
    const std::int64_t* remote = nullptr;
    const std::int64_t* length = nullptr;
    std::int64_t begin = 0;
    std::int64_t end = 0;
};

// Result of `make_segments`: what to transfer, and the destination range it lies in.
struct Segments {
    std::vector<Segment> items;
    std::int64_t size_bytes = 0;
    std::int64_t destination_begin = 0;
    std::int64_t destination_end = 0;
};

// With `merge`: sorted by destination (remote where `write`, else local), entries adjacent on both sides joined. Else
// in the caller's order. Empty entries are left out. Throws std::invalid_argument where two destination ranges overlap.
// Offsets and lengths must be non-negative and their sums must not overflow.
Segments make_segments(const Entries& entries, bool write, bool merge);

// One destination range, in addresses.
struct Range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
};

// Two ranges that overlap, as a pair, or an empty vector. Sorts `ranges`.
std::vector<Range> find_overlap(std::vector<Range>& ranges);

}  // namespace llmsys::comm
