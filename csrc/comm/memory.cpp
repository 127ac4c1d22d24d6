#include "comm/memory.h"

#include "common/check.h"

namespace llmsys::comm {

namespace {

template <typename Map>
auto find(const Map& map, std::int64_t id, const char* what) {
    const auto found = map.find(id);
    LLMSYS_CHECK(found != map.end(), "there is no " << what << " " << id << " (never made, or given up already)");
    return found->second;
}

template <typename Map>
auto take_unused(Map& map, std::int64_t id, const char* what) {
    auto memory = find(map, id, what);
    const std::int64_t num_users = memory->num_users.load();
    LLMSYS_CHECK(num_users == 0, what << " " << id << " is used " << num_users
                                      << " times by requests that have not ended: wait for them first");
    map.erase(id);
    return memory;
}

}  // namespace

std::int64_t Registry::add(std::shared_ptr<Region> region) {
    const std::lock_guard lock(mutex_);
    region->id = next_region_++;
    const std::int64_t id = region->id;
    regions_.emplace(id, std::move(region));
    return id;
}

std::int64_t Registry::add(std::shared_ptr<Remote> remote) {
    const std::lock_guard lock(mutex_);
    remote->id = next_remote_++;
    const std::int64_t id = remote->id;
    remotes_.emplace(id, std::move(remote));
    return id;
}

std::int64_t Registry::add_peer(const std::string& name) {
    const std::lock_guard lock(mutex_);
    peers_.emplace(next_peer_, name);
    return next_peer_++;
}

std::shared_ptr<Region> Registry::region(std::int64_t id) const {
    const std::lock_guard lock(mutex_);
    return find(regions_, id, "region");
}

std::shared_ptr<Remote> Registry::remote(std::int64_t id) const {
    const std::lock_guard lock(mutex_);
    return find(remotes_, id, "remote");
}

std::string Registry::peer_name(std::int64_t id) const {
    const std::lock_guard lock(mutex_);
    return find(peers_, id, "peer");
}

Pin<Region> Registry::pin_region(std::int64_t id) const {
    const std::lock_guard lock(mutex_);
    return Pin<Region>(find(regions_, id, "region"));
}

Pin<Remote> Registry::pin_remote(std::int64_t id, std::int64_t peer_id) const {
    const std::lock_guard lock(mutex_);
    auto remote = find(remotes_, id, "remote");
    LLMSYS_CHECK(remote->peer_id == peer_id,
                 "remote " << id << " belongs to peer " << remote->peer_id << ", not to peer " << peer_id);
    return Pin<Remote>(std::move(remote));
}

std::shared_ptr<Region> Registry::take_region(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    return take_unused(regions_, id, "region");
}

std::shared_ptr<Remote> Registry::take_remote(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    return take_unused(remotes_, id, "remote");
}

std::unordered_map<std::int64_t, std::shared_ptr<Region>> Registry::take_all_regions() {
    const std::lock_guard lock(mutex_);
    return std::exchange(regions_, {});
}

void Registry::remove_peer(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    peers_.erase(id);
    std::erase_if(remotes_, [id](const auto& item) { return item.second->peer_id == id; });
}

Registry::Counts Registry::counts() const {
    const std::lock_guard lock(mutex_);
    return {regions_.size(), remotes_.size(), peers_.size()};
}

}  // namespace llmsys::comm
