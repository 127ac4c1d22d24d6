#include "comm/batch.h"

#include <algorithm>
#include <map>
#include <utility>

#include "common/check.h"

namespace llmsys::comm {

namespace {

// Offsets and lengths inside memory of that size. The loop has no branch to leave early, so that it can be vectorised;
// the entry at fault is looked for only when there is one.
void check_entries(const BatchArguments& a, std::size_t group, std::int64_t begin, std::int64_t end,
                   std::uint64_t local_size, std::uint64_t remote_size) {
    const auto bad = [&](std::int64_t i) {
        const auto local = static_cast<std::uint64_t>(a.local_offsets[i]);
        const auto remote = static_cast<std::uint64_t>(a.remote_offsets[i]);
        const auto length = static_cast<std::uint64_t>(a.lengths[i]);
        // A negative number is a huge one here; the subtractions are looked at only where they did not wrap.
        return static_cast<unsigned>(local > local_size) | static_cast<unsigned>(length > local_size - local) |
               static_cast<unsigned>(remote > remote_size) | static_cast<unsigned>(length > remote_size - remote);
    };
    unsigned any = 0;
    for (std::int64_t i = begin; i < end; ++i) any |= bad(i);
    if (any == 0) return;
    for (std::int64_t i = begin; i < end; ++i) {
        LLMSYS_CHECK(bad(i) == 0, "entry " << i << " of group " << group << " is out of bounds: local offset "
                                           << a.local_offsets[i] << " of " << local_size << " bytes, remote offset "
                                           << a.remote_offsets[i] << " of " << remote_size << " bytes, length "
                                           << a.lengths[i]);
    }
}

std::uint64_t destination_base(const BatchGroup& group, bool write) {
    return write ? group.remote->address : group.region->address;
}

// Entries of one group cannot overlap any more. Groups with disjoint spans cannot either, which is the usual case (one
// tensor each) and cheap to see; the others are compared range by range.
void check_groups_apart(const std::vector<BatchGroup>& groups, bool write) {
    std::vector<Range> spans;
    for (const BatchGroup& group : groups) {
        if (group.segments->items.empty()) continue;
        const std::uint64_t base = destination_base(group, write);
        spans.push_back({base + static_cast<std::uint64_t>(group.segments->destination_begin),
                         base + static_cast<std::uint64_t>(group.segments->destination_end)});
    }
    if (find_overlap(spans).empty()) return;
    std::vector<Range> ranges;
    for (const BatchGroup& group : groups) {
        const std::uint64_t base = destination_base(group, write);
        for (const Segment& segment : group.segments->items) {
            const std::uint64_t begin = base + static_cast<std::uint64_t>(write ? segment.remote : segment.local);
            ranges.push_back({begin, begin + static_cast<std::uint64_t>(segment.length)});
        }
    }
    const std::vector<Range> overlap = find_overlap(ranges);
    LLMSYS_CHECK(overlap.empty(), "two groups of a batch have the same destination: addresses "
                                      << overlap[0].begin << " to " << overlap[0].end << " and " << overlap[1].begin
                                      << " to " << overlap[1].end);
}

}  // namespace

void fill_batch(Transaction& transaction, const BatchArguments& a, const Registry& registry) {
    Request& request = *transaction.request;
    std::map<std::pair<std::int64_t, std::int64_t>, std::shared_ptr<const Segments>> made;
    bool used[3] = {};
    transaction.groups.reserve(a.num_groups);
    for (std::size_t g = 0; g < a.num_groups; ++g) {
        const std::int64_t* row = a.groups + g * 4;
        const std::int64_t begin = row[2], end = row[3];
        LLMSYS_CHECK(begin >= 0 && begin <= end && end <= static_cast<std::int64_t>(a.num_entries),
                     "group " << g << " has entries " << begin << " to " << end << ", out of " << a.num_entries);
        Pin<Region> region = registry.pin_region(row[0]);
        Pin<Remote> remote = registry.pin_remote(row[1], request.peer_id);
        check_entries(a, g, begin, end, region->size_bytes, remote->size_bytes);
        std::shared_ptr<const Segments>& segments = made[{begin, end}];
        if (segments == nullptr) {
            const Entries entries{a.local_offsets, a.remote_offsets, a.lengths, begin, end};
            segments = std::make_shared<const Segments>(make_segments(entries, a.write, a.merge));
        }
        const Path path = region->cuda ? Path::ucx : remote->path;
        request.num_entries += end - begin;
        request.num_segments += static_cast<std::int64_t>(segments->items.size());
        request.size_bytes += segments->size_bytes;
        if (!segments->items.empty()) used[static_cast<int>(path)] = true;
        transaction.groups.push_back({std::move(region), std::move(remote), path, segments});
    }
    check_groups_apart(transaction.groups, a.write);
    for (const Path path : {Path::shm, Path::cma, Path::ucx}) {
        if (used[static_cast<int>(path)]) request.paths.push_back(path);
    }
}

}  // namespace llmsys::comm
