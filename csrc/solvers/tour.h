#pragma once

#include <cstdint>
#include <vector>

namespace llmsys {

// A short open path through points (x, y) under the L1 distance: greedy start, 2-opt and Or-opt on near neighbours,
// then max_kicks seeded double-bridge kicks, each kept when the path does not get longer. Returns the visiting order.
// Work is bounded by a count, not by a clock, so the same input gives the same path on any machine.
std::vector<std::int32_t> open_path(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& y,
                                    std::int64_t max_kicks, std::uint64_t seed);

}  // namespace llmsys
