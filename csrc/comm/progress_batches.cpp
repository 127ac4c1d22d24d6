#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "comm/progress.h"

namespace llmsys::comm {

namespace {

// Small batches and notifications that one peer gets done before the next peer has its turn.
constexpr int kMaxTransactionsPerTurn = 64;
// Notifications sent ahead of their acknowledgement.
constexpr std::size_t kNotificationWindow = 64;

bool at_end(const BatchCursor& cursor, const Transaction& batch) {
    return !cursor.error.empty() || cursor.group >= batch.groups.size();
}

// Puts the cursor on the next segment that has bytes left.
void settle(BatchCursor& cursor, const Transaction& batch) {
    while (cursor.group < batch.groups.size() && cursor.item >= batch.groups[cursor.group].segments->items.size()) {
        ++cursor.group;
        cursor.item = 0;
    }
}

void delay(std::int64_t us) {
    const timespec duration{us / 1'000'000, (us % 1'000'000) * 1000};
    nanosleep(&duration, nullptr);
}

}  // namespace

bool Progress::advance(Peer& peer) {
    bool moved = false;
    std::int64_t moved_bytes = 0;
    for (int n = 0; n < kMaxTransactionsPerTurn && moved_bytes < options_.slice_bytes; ++n) {
        const bool open = peer.state == PeerState::established && peer.ending == Ending::none;
        if (!open || !peer.endpoint_error.empty() || peer.queue.empty()) break;
        Transaction& head = *peer.queue.front();
        if (head.request->kind == RequestKind::notify) {
            if (peer.unacknowledged.size() >= kNotificationWindow) break;
            auto transaction = std::move(peer.queue.front());
            peer.queue.pop_front();
            send_notification(peer, std::move(transaction));
            moved = true;
            continue;
        }
        // Requests end in the order of posting, so a batch waits for the notifications before it.
        if (!peer.unacknowledged.empty()) break;
        moved_bytes += head.request->size_bytes;
        moved |= advance_batch(peer);
        if (!peer.queue.empty() && peer.queue.front().get() == &head) break;
    }
    return moved;
}

// One slice of the batch at the head. True where something was done.
bool Progress::advance_batch(Peer& peer) {
    Transaction& batch = *peer.queue.front();
    if (batch.request->started_ns == 0) {
        batch.request->started_ns = monotonic_ns();
        settle(peer.cursor, batch);
    }
    bool moved = false;
    if (!at_end(peer.cursor, batch)) {
        if (!peer.liveness.may_touch(boottime_ns())) {
            next_check_ns_ = 0;
            return true;
        }
        const std::int64_t before = peer.cursor.moved_bytes;
        run_slice(peer, batch);
        moved = peer.cursor.moved_bytes > before;
        if (options_.test_slice_delay_us > 0) delay(options_.test_slice_delay_us);
    }
    if (peer.ending != Ending::none || !at_end(peer.cursor, batch) || peer.num_operations > 0 || peer.flushing) {
        return moved;
    }
    const bool needs_flush = batch.request->kind == RequestKind::write && peer.cursor.used_ucx;
    if (needs_flush && !peer.cursor.flushed && peer.cursor.error.empty()) {
        flush(peer);
        if (peer.flushing) return true;
    }
    if (peer.endpoint_error.empty()) finish_batch(peer);
    return true;
}

void Progress::run_slice(Peer& peer, Transaction& batch) {
    const bool write = batch.request->kind == RequestKind::write;
    BatchCursor& cursor = peer.cursor;
    std::int64_t ucx_budget = options_.slice_bytes;
    copies_.begin(batch.request->size_bytes - cursor.moved_bytes);
    while (!at_end(cursor, batch) && peer.ending == Ending::none) {
        const BatchGroup& group = batch.groups[cursor.group];
        const Segment& segment = group.segments->items[cursor.item];
        const Segment rest{segment.local + cursor.offset, segment.remote + cursor.offset,
                           segment.length - cursor.offset};
        const std::int64_t length = move_piece(peer, group, rest, write, ucx_budget);
        if (length == 0) break;
        cursor.moved_bytes += length;
        cursor.offset += length;
        counters_.path_bytes[static_cast<int>(group.path)].fetch_add(length, std::memory_order_relaxed);
        if (cursor.offset == segment.length) {
            cursor.offset = 0;
            ++cursor.item;
            settle(cursor, batch);
        }
    }
    if (copies_.size_bytes() > 0 && peer.ending == Ending::none) run_copies(peer, write);
}

// How many of its bytes were taken: 0 where it has to wait for the next slice, or has failed.
std::int64_t Progress::move_piece(Peer& peer, const BatchGroup& group, const Segment& piece, bool write,
                                  std::int64_t& ucx_budget) {
    const std::uint64_t local = group.region->address + static_cast<std::uint64_t>(piece.local);
    if (group.path == Path::cma) {
        const std::uint64_t remote = group.remote->address + static_cast<std::uint64_t>(piece.remote);
        return copies_.add_vectored(local, remote, piece.length);
    }
    if (group.path == Path::shm) {
        const std::uint64_t mapped = group.remote->mapped + static_cast<std::uint64_t>(piece.remote);
        return copies_.add_mapped(write ? mapped : local, write ? local : mapped, piece.length);
    }
    const std::int64_t length = std::min(piece.length, ucx_budget);
    if (length == 0 || !post_operation(peer, group, {piece.local, piece.remote, length}, write)) return 0;
    ucx_budget -= length;
    return length;
}

void Progress::run_copies(Peer& peer, bool write) {
    const Probe* target = peer.arguments.probe ? &*peer.arguments.probe : nullptr;
    // Only this thread changes the lease, and it is in `run` while others ask.
    const int error = copies_.run(target, write, [&peer] { return peer.liveness.may_touch(boottime_ns()); });
    counters_.num_operations.fetch_add(copies_.num_operations(), std::memory_order_relaxed);
    if (error == 0) return;
    // A peer that has left is no failure of the copy.
    read_socket(peer);
    if (peer.ending != Ending::none) return;
    if (error == ESRCH) {
        begin_ending(peer, Ending::lost, "its process has ended");
    } else if (error == ETIME) {
        // Part of the slice was left out, so the batch has failed even if the peer is heard of again.
        peer.cursor.error = "the lease of this side at the peer ended meanwhile";
        next_check_ns_ = 0;
    } else {
        peer.cursor.error = std::string(write ? "process_vm_writev" : "process_vm_readv") + " of " +
                            std::to_string(copies_.size_bytes()) + " bytes: " + strerror(error);
    }
}

bool Progress::post_operation(Peer& peer, const BatchGroup& group, const Segment& piece, bool write) {
    if (peer.num_operations >= options_.window) return false;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMH;
    param.cb.send = &Progress::on_operation;
    param.user_data = &peer;
    param.memh = group.region->handle;
    void* local = reinterpret_cast<void*>(group.region->address + static_cast<std::uint64_t>(piece.local));
    const std::uint64_t remote = group.remote->address + static_cast<std::uint64_t>(piece.remote);
    const auto length = static_cast<std::size_t>(piece.length);
    peer.cursor.used_ucx = true;
    peer.about_to_post();
    void* request = write ? ucx_.ucp_put_nbx(peer.endpoint, local, length, remote, group.remote->key, &param)
                          : ucx_.ucp_get_nbx(peer.endpoint, local, length, remote, group.remote->key, &param);
    counters_.num_operations.fetch_add(1, std::memory_order_relaxed);
    if (UCS_PTR_IS_ERR(request)) {
        peer.cursor.error = std::string(write ? "ucp_put" : "ucp_get") + " of " + std::to_string(length) +
                            " bytes: " + ucx_.ucs_status_string(UCS_PTR_STATUS(request));
        return false;
    }
    if (request == nullptr) return true;
    // The callback runs in ucp_worker_progress, not before this returns.
    ++peer.num_operations;
    return true;
}

void Progress::on_operation(void* request, ucs_status_t status, void* argument) noexcept {
    Peer& peer = *static_cast<Peer*>(argument);
    --peer.num_operations;
    peer.moved(boottime_ns());
    peer.ucx.ucp_request_free(request);
    if (status != UCS_OK) on_endpoint_error(&peer, nullptr, status);
}

void Progress::flush(Peer& peer) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.send = &Progress::on_flush;
    param.user_data = &peer;
    peer.about_to_post();
    void* request = ucx_.ucp_ep_flush_nbx(peer.endpoint, &param);
    if (UCS_PTR_IS_ERR(request)) {
        peer.cursor.error = std::string("ucp_ep_flush: ") + ucx_.ucs_status_string(UCS_PTR_STATUS(request));
    } else if (request == nullptr) {
        peer.cursor.flushed = true;
    } else {
        peer.flushing = true;
    }
}

void Progress::on_flush(void* request, ucs_status_t status, void* argument) noexcept {
    Peer& peer = *static_cast<Peer*>(argument);
    peer.flushing = false;
    peer.moved(boottime_ns());
    peer.cursor.flushed = true;
    peer.ucx.ucp_request_free(request);
    if (status != UCS_OK) on_endpoint_error(&peer, nullptr, status);
}

// A batch has succeeded only if the peer was there and its lease valid after the last byte.
void Progress::finish_batch(Peer& peer) {
    read_socket(peer);
    if (peer.ending != Ending::none) return;
    if (!peer.liveness.may_touch(boottime_ns())) {
        next_check_ns_ = 0;
        return;
    }
    auto batch = std::move(peer.queue.front());
    peer.queue.pop_front();
    const std::string error = peer.cursor.error;
    const std::string text = error.empty() ? "" : describe(peer, *batch) + " failed: " + error;
    peer.cursor = BatchCursor{};
    counters_.num_batches.fetch_add(1, std::memory_order_relaxed);
    counters_.num_segments.fetch_add(batch->request->num_segments, std::memory_order_relaxed);
    batch->finish(error.empty() ? ErrorKind::none : ErrorKind::transport, text);
}

std::string Progress::describe(const Peer& peer, const Transaction& transaction) {
    const Request& request = *transaction.request;
    const std::string name = "peer '" + peer.arguments.name + "'";
    if (request.kind == RequestKind::notify) {
        return "notification of " + std::to_string(request.size_bytes) + " bytes to " + name;
    }
    const bool write = request.kind == RequestKind::write;
    return (write ? "write of " : "read of ") + std::to_string(request.num_entries) + " entries (" +
           std::to_string(request.size_bytes) + " bytes, " + (request.started_ns == 0 ? "not started" : "started") +
           (write ? ") to " : ") from ") + name;
}

}  // namespace llmsys::comm
