#pragma once

#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "comm/paths.h"

namespace llmsys::comm {

// Memory of this process that peers may reach.
struct Region {
    std::int64_t id = 0;
    std::uint64_t address = 0;
    std::uint64_t size_bytes = 0;
    bool cuda = false;
    ucp_mem_h handle = nullptr;
    std::atomic<std::int64_t> num_users{0};
};

// Memory of a peer that this process may reach.
struct Remote {
    std::int64_t id = 0;
    std::int64_t peer_id = 0;
    std::uint64_t address = 0;
    std::uint64_t size_bytes = 0;
    bool cuda = false;
    Path path = Path::ucx;
    std::uint64_t mapped = 0;  // where it is mapped here; Path::shm only
    ucp_rkey_h key = nullptr;  // used by the progress thread only, null once the peer is gone
    std::atomic<std::int64_t> num_users{0};
};

// Holds a region or remote in use: as long as it lives, nobody releases it.
template <typename Memory>
class Pin {
  public:
    explicit Pin(std::shared_ptr<Memory> memory) : memory_(std::move(memory)) { ++memory_->num_users; }
    ~Pin() {
        if (memory_ != nullptr) --memory_->num_users;
    }
    Pin(Pin&& other) noexcept : memory_(std::move(other.memory_)) {}
    Pin& operator=(Pin&&) = delete;
    Memory* operator->() const { return memory_.get(); }

  private:
    std::shared_ptr<Memory> memory_;
};

// Ids of regions, remotes and peers, for all threads. Ids are never given twice.
class Registry {
  public:
    std::int64_t add(std::shared_ptr<Region> region);
    std::int64_t add(std::shared_ptr<Remote> remote);
    std::int64_t add_peer(const std::string& name);

    // Throw std::invalid_argument for an unknown id.
    std::shared_ptr<Region> region(std::int64_t id) const;
    std::shared_ptr<Remote> remote(std::int64_t id) const;
    std::string peer_name(std::int64_t id) const;
    Pin<Region> pin_region(std::int64_t id) const;
    Pin<Remote> pin_remote(std::int64_t id, std::int64_t peer_id) const;

    // Remove and return; throw std::invalid_argument for an unknown id or one in use.
    std::shared_ptr<Region> take_region(std::int64_t id);
    std::shared_ptr<Remote> take_remote(std::int64_t id);
    // What is left, at the end.
    std::unordered_map<std::int64_t, std::shared_ptr<Region>> take_all_regions();
    // Also forgets all its remotes.
    void remove_peer(std::int64_t id);

    struct Counts {
        std::size_t num_regions, num_remotes, num_peers;
    };
    Counts counts() const;

  private:
    mutable std::mutex mutex_;
    std::int64_t next_region_ = 1;
    std::int64_t next_remote_ = 1;
    std::int64_t next_peer_ = 1;
    std::unordered_map<std::int64_t, std::shared_ptr<Region>> regions_;
    std::unordered_map<std::int64_t, std::shared_ptr<Remote>> remotes_;
    std::unordered_map<std::int64_t, std::string> peers_;
};

}  // namespace llmsys::comm
