#include "comm/coalesce.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <limits>
#include <utility>

#include "common/check.h"

namespace llmsys::comm {

namespace {

constexpr int kDigitBits = 11;
constexpr std::size_t kNumDigits = std::size_t{1} << kDigitBits;

struct Keyed {
    std::uint32_t key;
    std::uint32_t index;
};

// What one look at the entries tells about their destinations, empty entries aside.
struct Survey {
    bool sorted = true;
    bool equal_lengths = true;
    std::size_t count = 0;
    std::int64_t low = 0;
    std::int64_t high = 0;
    std::int64_t length = 0;  // of the first
    std::uint64_t differing_bits = 0;

    // Keys of a sort: destination = low + (key << shift()), of key_bits() bits.
    int shift() const { return differing_bits == 0 ? 0 : std::countr_zero(differing_bits); }
    int key_bits() const { return std::bit_width(static_cast<std::uint64_t>(high - low) >> shift()); }
};

constexpr int kMaxKeyBits = 32;

Survey survey(const Entries& entries, const std::int64_t* destination) {
    Survey found;
    std::int64_t previous = -1, first = 0;
    for (std::int64_t i = entries.begin; i < entries.end; ++i) {
        if (entries.length[i] == 0) continue;
        const std::int64_t value = destination[i];
        if (found.count == 0) {
            first = found.low = found.high = value;
            found.length = entries.length[i];
        }
        found.equal_lengths = found.equal_lengths && entries.length[i] == found.length;
        found.low = std::min(found.low, value);
        found.high = std::max(found.high, value);
        found.differing_bits |= static_cast<std::uint64_t>(value ^ first);
        found.sorted = found.sorted && value >= previous;
        previous = value;
        ++found.count;
    }
    return found;
}

// Indices of the entries that are not empty, by destination. A radix sort, because lists of blocks are long, and a
// cheap one, because offsets of blocks are multiples of their size in one region: few bits differ.
std::vector<Keyed> by_destination(const Entries& entries, const std::int64_t* destination, const Survey& found) {
    const int shift = found.shift(), num_bits = found.key_bits();
    std::vector<Keyed> from;
    from.reserve(found.count);
    for (std::int64_t i = entries.begin; i < entries.end; ++i) {
        if (entries.length[i] == 0) continue;
        from.push_back({static_cast<std::uint32_t>((destination[i] - found.low) >> shift),
                        static_cast<std::uint32_t>(i - entries.begin)});
    }
    if (num_bits > kMaxKeyBits) {
        std::stable_sort(from.begin(), from.end(), [&](const Keyed& a, const Keyed& b) {
            return destination[entries.begin + a.index] < destination[entries.begin + b.index];
        });
        return from;
    }
    std::vector<Keyed> to(from.size());
    for (int done = 0; done < num_bits; done += kDigitBits) {
        std::array<std::uint32_t, kNumDigits> next{};
        for (const Keyed& item : from) ++next[(item.key >> done) & (kNumDigits - 1)];
        std::uint32_t sum = 0;
        for (std::uint32_t& count : next) sum += std::exchange(count, sum);
        for (const Keyed& item : from) to[next[(item.key >> done) & (kNumDigits - 1)]++] = item;
        from.swap(to);
    }
    return from;
}

Segment entry(const Entries& entries, std::int64_t i) {
    return {entries.local[i], entries.remote[i], entries.length[i]};
}

// The same by what the sort knows: in a long list each look at an array, in sorted order, is a miss of the cache.
Segment sorted_entry(const Entries& entries, const Survey& found, const Keyed& item, bool write) {
    const std::int64_t i = entries.begin + item.index;
    const std::int64_t destination = found.low + (static_cast<std::int64_t>(item.key) << found.shift());
    const std::int64_t length = found.equal_lengths ? found.length : entries.length[i];
    return write ? Segment{entries.local[i], destination, length} : Segment{destination, entries.remote[i], length};
}

// Adds a segment that lies behind all others; joins it to the last where they touch on both sides.
void append(std::vector<Segment>& items, const Segment& segment) {
    if (!items.empty()) {
        Segment& last = items.back();
        if (last.local + last.length == segment.local && last.remote + last.length == segment.remote) {
            last.length += segment.length;
            return;
        }
    }
    items.push_back(segment);
}

}  // namespace

Segments make_segments(const Entries& entries, bool write, bool merge) {
    LLMSYS_CHECK(entries.end - entries.begin <= std::numeric_limits<std::uint32_t>::max(),
                 "a group has at most 4294967295 entries, got " << entries.end - entries.begin);
    const std::int64_t* destination = write ? entries.remote : entries.local;
    const Survey found = survey(entries, destination);
    Segments result;
    if (found.count == 0) return result;
    result.items.reserve(found.count);
    result.destination_begin = found.low;
    std::int64_t end = 0, last = -1;
    const auto visit = [&](std::int64_t i, const Segment& segment) {
        const std::int64_t begin = write ? segment.remote : segment.local;
        LLMSYS_CHECK(begin >= end, "entries "
                                       << last << " and " << i << " of a batch have " << (write ? "remote" : "local")
                                       << " bytes in common: " << destination[std::max<std::int64_t>(last, 0)] << " to "
                                       << end << " and " << begin << " to " << begin + segment.length);
        end = begin + segment.length;
        last = i;
        result.size_bytes += segment.length;
        if (merge) append(result.items, segment);
    };
    if (found.sorted) {
        for (std::int64_t i = entries.begin; i < entries.end; ++i) {
            if (entries.length[i] != 0) visit(i, entry(entries, i));
        }
    } else {
        const bool by_key = found.key_bits() <= kMaxKeyBits;
        for (const Keyed& item : by_destination(entries, destination, found)) {
            const std::int64_t i = entries.begin + item.index;
            visit(i, by_key ? sorted_entry(entries, found, item, write) : entry(entries, i));
        }
    }
    result.destination_end = end;
    for (std::int64_t i = entries.begin; i < entries.end && !merge; ++i) {
        if (entries.length[i] != 0) result.items.push_back(entry(entries, i));
    }
    return result;
}

std::vector<Range> find_overlap(std::vector<Range>& ranges) {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < ranges.size(); ++i) {
        if (ranges[i].begin < ranges[i - 1].end) return {ranges[i - 1], ranges[i]};
    }
    return {};
}

}  // namespace llmsys::comm
