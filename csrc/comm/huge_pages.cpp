#include "comm/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace llmsys::comm {

namespace {

constexpr std::uint64_t kPageBytes = 4096;
constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

bool is_resident(std::uint64_t address) {
    std::array<unsigned char, kHugePageBytes / kPageBytes> pages;
    if (mincore(reinterpret_cast<void*>(address), kHugePageBytes, pages.data()) != 0) return false;
    return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

}  // namespace

void ask_for_huge_pages(std::uint64_t address, std::uint64_t size_bytes) {
    const std::uint64_t begin = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const std::uint64_t end = (address + size_bytes) / kHugePageBytes * kHugePageBytes;
    if (end <= begin) return;
    if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
    for (std::uint64_t page = begin; page < end; page += kHugePageBytes) {
        if (is_resident(page) && madvise(reinterpret_cast<void*>(page), kHugePageBytes, MADV_COLLAPSE) != 0) return;
    }
}

}  // namespace llmsys::comm
