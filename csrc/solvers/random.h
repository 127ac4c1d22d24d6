#pragma once

#include <cstdint>

namespace llmsys {

// SplitMix64 (Steele, Lea and Flood, 2014): the standard library's distributions differ between compilers, and a
// seed must give the same plan everywhere.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::int64_t below(std::int64_t bound) {
        state_ += 0x9E3779B97F4A7C15ull;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return static_cast<std::int64_t>((z ^ (z >> 31)) % static_cast<std::uint64_t>(bound));
    }

  private:
    std::uint64_t state_;
};

}  // namespace llmsys
