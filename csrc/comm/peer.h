#pragma once

#include <ucp/api/ucp.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/batch.h"
#include "comm/liveness.h"
#include "comm/memory.h"
#include "comm/paths.h"
#include "comm/ucx_library.h"

namespace llmsys::comm {

// What a user gives to make a peer.
struct PeerArguments {
    std::string name;
    WorkerAddress address;
    std::uint64_t token_in = 0;
    std::uint64_t token_out = 0;
    std::int64_t peer_lease_ns = 0;
    std::optional<Probe> probe;
};

enum class PeerState : std::uint8_t { connecting, established, lost, left };

// Why a connection is being taken down. Nothing new is started from then on.
enum class Ending : std::uint8_t { none, lost, left, removed, closing };

// Where the batch at the head of the queue is.
struct BatchCursor {
    std::size_t group = 0;
    std::size_t item = 0;
    std::int64_t offset = 0;
    std::int64_t moved_bytes = 0;  // handed to the system or to UCX
    bool used_ucx = false;
    bool flushed = false;
    std::string error;
};

// One connection. Touched by the progress thread only.
struct Peer {
    Peer(const UcxLibrary& library, std::int64_t peer_id, PeerArguments peer_arguments, ControlSocket control,
         std::int64_t lease_ns, std::int64_t now_ns)
        : ucx(library),
          id(peer_id),
          arguments(std::move(peer_arguments)),
          socket(std::move(control)),
          liveness(lease_ns, arguments.peer_lease_ns, now_ns) {}

    const UcxLibrary& ucx;
    const std::int64_t id;
    const PeerArguments arguments;
    ControlSocket socket;
    Liveness liveness;
    bool watches_writable = false;  // what epoll was last told
    bool cma = false;
    PeerState state = PeerState::connecting;
    std::vector<std::shared_ptr<Remote>> remotes;

    // UCX. The callbacks hold a pointer to this object, so it lives until the three counts are 0.
    ucp_ep_h endpoint = nullptr;
    std::vector<ucp_ep_h> unused_endpoints;  // made to come to the same count as the peer
    std::int64_t num_operations = 0;         // gets and puts in flight
    std::int64_t num_sends = 0;              // active messages in flight
    bool flushing = false;
    std::int64_t close_at_ns = 0;  // when an ending closes the endpoint, if UCX gives it up no sooner
    std::vector<void*> close_requests;
    std::string endpoint_error;  // set by UCX's callback, acted upon by the loop
    std::int64_t endpoint_failed_ns = 0;
    std::int64_t moved_ns = 0;    // when UCX last finished something, or got something to do when it had nothing
    std::int64_t stalled_ns = 0;  // when it was first found to have done nothing for too long; 0 if it has not

    std::deque<std::unique_ptr<Transaction>> queue;
    BatchCursor cursor;

    // Notifications out: sent and not acknowledged.
    std::uint64_t last_sent = 0;
    std::deque<std::unique_ptr<Transaction>> unacknowledged;
    std::uint64_t first_unacknowledged = 1;
    // Notifications in.
    std::uint64_t last_delivered = 0;
    std::uint64_t last_acknowledged = 0;
    bool acknowledging = false;
    std::map<std::uint64_t, std::string> early;  // overtook an earlier one on another connection of UCX

    Ending ending = Ending::none;
    std::int64_t gone_after_ns = 0;  // the loss is not told before: until then the peer may touch memory here
    bool gone = false;               // the ending is complete
    std::string reason;
    bool forget = false;  // remove_peer was called
    std::vector<std::function<void()>> when_gone;

    bool drained() const { return num_operations == 0 && num_sends == 0 && !flushing; }
    bool waits_for_ucx() const { return !drained() || !unacknowledged.empty(); }
    // To be called before UCX gets something to do.
    void about_to_post() {
        if (!waits_for_ucx()) moved(boottime_ns());
    }
    void moved(std::int64_t now_ns) {
        moved_ns = now_ns;
        stalled_ns = 0;
    }
};

}  // namespace llmsys::comm
