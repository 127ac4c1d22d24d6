#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/coalesce.h"
#include "comm/memory.h"
#include "comm/request.h"

namespace llmsys::comm {

// The segments between one region and one remote. Groups over the same entries share their segments.
struct BatchGroup {
    Pin<Region> region;
    Pin<Remote> remote;
    Path path;
    std::shared_ptr<const Segments> segments;
};

// One item of a peer's queue: a batch of copies, or a notification.
struct Transaction {
    std::shared_ptr<Request> request;
    std::vector<BatchGroup> groups;
    std::string payload;

    // Gives the memory back before whoever waits for the request sees its end.
    void finish(ErrorKind kind, std::string error) {
        groups.clear();
        request->finish(kind, std::move(error));
    }
};

// What a user asks for, in his arrays. Rows of `groups` are (region, remote, begin, end).
struct BatchArguments {
    bool write = false;
    bool merge = true;
    const std::int64_t* groups = nullptr;
    std::size_t num_groups = 0;
    const std::int64_t* local_offsets = nullptr;
    const std::int64_t* remote_offsets = nullptr;
    const std::int64_t* lengths = nullptr;
    std::size_t num_entries = 0;
};

// Checks everything about a batch and fills `transaction`. Throws std::invalid_argument naming the group or entry.
void fill_batch(Transaction& transaction, const BatchArguments& arguments, const Registry& registry);

}  // namespace llmsys::comm
