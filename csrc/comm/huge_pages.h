#pragma once

#include <cstdint>

namespace llmsys::comm {

// Asks the kernel to put memory that is in use into huge pages: reading another process's memory costs a look-up for
// each page. Memory that was not touched yet is only marked, so that nothing is taken that is not needed. A wish: where
// the kernel cannot (old, no huge pages free, memory of a file), all stays as it is.
void ask_for_huge_pages(std::uint64_t address, std::uint64_t size_bytes);

}  // namespace llmsys::comm
