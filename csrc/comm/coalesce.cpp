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
    std::size_t count = 0;
    std::int64_t low = 0;
    std::int64_t high = 0;
    std::uint64_t differing_bits = 0;
};

Survey survey(const Entries& entries, const std::int64_t* destination) {
    Survey found;
    std::int64_t previous = -1, first = 0;
    for (std::int64_t i = entries.begin; i < entries.end; ++i) {
        if (entries.length[i] == 0) continue;
        const std::int64_t value = destination[i];
        if (found.count == 0) first = found.low = found.high = value;
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
    const int shift = found.differing_bits == 0 ? 0 : std::countr_zero(found.differing_bits);
    const int num_bits = std::bit_width(static_cast<std::uint64_t>(found.high - found.low) >> shift);
    std::vector<Keyed> from;
    from.reserve(found.count);
    for (std::int64_t i = entries.begin; i < entries.end; ++i) {
        if (entries.length[i] == 0) continue;
        from.push_back({static_cast<std::uint32_t>((destination[i] - found.low) >> shift),
                        static_cast<std::uint32_t>(i - entries.begin)});
    }
    if (num_bits > 32) {
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
    const auto visit = [&](std::int64_t i) {
        LLMSYS_CHECK(destination[i] >= end,
                     "entries " << last << " and " << i << " of a batch have " << (write ? "remote" : "local")
                                << " bytes in common: " << destination[std::max<std::int64_t>(last, 0)] << " to " << end
                                << " and " << destination[i] << " to " << destination[i] + entries.length[i]);
        end = destination[i] + entries.length[i];
        last = i;
        result.size_bytes += entries.length[i];
        if (merge) append(result.items, entry(entries, i));
    };
    if (found.sorted) {
        for (std::int64_t i = entries.begin; i < entries.end; ++i) {
            if (entries.length[i] != 0) visit(i);
        }
    } else {
        for (const Keyed& item : by_destination(entries, destination, found)) visit(entries.begin + item.index);
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
