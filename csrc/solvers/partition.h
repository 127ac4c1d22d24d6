#pragma once

#include <cstdint>
#include <vector>

namespace llmsys {

// For each of a list of owners, the values that belong to it: those from offsets[i] to offsets[i + 1].
struct Lists {
    std::vector<std::int64_t> offsets;
    std::vector<std::int64_t> values;
};

enum class Role : std::int64_t { before = 0, split = 1, after = 2 };

// A range of a Lancet graph that runs in parts: the fields of llmsys.lancet.pipeline.Pipeline, which defines them.
struct RangePipeline {
    std::vector<Role> roles;
    std::vector<std::int64_t> lanes;  // -1: compute
    Lists waits;
    Lists slices;
    std::vector<std::int64_t> joins;
    Lists uses;

    void check() const;
};

// Times in ms for one number of parts; what they are of is said in llmsys.lancet.pipeline.Durations.
struct RangeDurations {
    std::int64_t num_parts = 1;
    const double* ops_ms = nullptr;
    const double* starts_ms = nullptr;
    const double* waits_ms = nullptr;
    const double* slices_ms = nullptr;
    const double* joins_ms = nullptr;
};

// When the compute lane is done with the range, bit for bit what llmsys.lancet.pipeline.walk gives. The pipeline must
// have passed check().
double pipeline_time(const RangePipeline& pipeline, const RangeDurations& durations);

struct Cover {
    double total_ms = 0.0;                 // infinite: the candidates cannot cover the line
    std::vector<std::int64_t> candidates;  // the chosen ones, from left to right
};

// The cheapest way to cover 0 .. num_groups by candidates [firsts[c], ends[c]) without overlap:
// T(n) = min over candidates c that end at n of T(firsts[c]) + costs_ms[c], Lancet's partition pass. Of equals the
// first candidate in the list wins.
Cover cover(std::int64_t num_groups, const std::vector<std::int64_t>& firsts, const std::vector<std::int64_t>& ends,
            const std::vector<double>& costs_ms);

}  // namespace llmsys
