#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "comm/progress.h"
#include "common/check.h"

namespace llmsys::comm {

namespace {

// UCX may notice the end of a connection before its goodbye has been read: wait a moment for the better reason.
constexpr std::int64_t kGraceNs = 100'000'000;
// How long UCX has to find out by itself that a connection it is still making will not come about. Taking one down in
// the middle of that crashed UCX 1.22 in ucp_worker_discard_uct_ep, seen once in some thousand fault rounds.
constexpr std::int64_t kConnectGraceNs = 200'000'000;
// UCX has so many leases of time to finish some operation or message while the control connection works.
constexpr std::int64_t kStallLeases = 2;
// More endpoints that one side has made alone than connection attempts fail between two processes.
constexpr std::uint64_t kMaxUnusedEndpoints = 4096;
// How often an ending that waits for UCX is looked at, besides UCX's own events.
constexpr std::int64_t kDrainCheckNs = 5'000'000;

std::string seconds(std::int64_t ns) {
    const std::int64_t ms = ns / 1'000'000;
    const std::string fraction = std::to_string(ms % 1000);
    return std::to_string(ms / 1000) + "." + std::string(3 - fraction.size(), '0') + fraction + " s";
}

const char* name(PeerState state) {
    switch (state) {
        case PeerState::connecting:
            return "connecting";
        case PeerState::established:
            return "established";
        case PeerState::left:
            return "left";
        default:
            return "lost";
    }
}

}  // namespace

Peer& Progress::peer(std::int64_t id) {
    const auto found = peers_.find(id);
    LLMSYS_CHECK(found != peers_.end(), "there is no peer " << id << " (never made, or removed already)");
    return *found->second;
}

void Progress::add_peer(std::int64_t id, PeerArguments arguments, ControlSocket socket) {
    if (closing_) throw UcxError("the engine is closed");
    auto added =
        std::make_unique<Peer>(ucx_, id, std::move(arguments), std::move(socket), options_.lease_ns, boottime_ns());
    const std::uint64_t token = added->arguments.token_in;
    LLMSYS_CHECK(!by_token_.contains(token), "token_in " << token << " belongs to a peer already");
    added->cma = options_.cma && added->arguments.probe && verify(*added->arguments.probe) == 0;
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = static_cast<std::uint64_t>(id);
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, added->socket.fd(), &event);
    Peer& made = *added;
    peers_.emplace(id, std::move(added));
    by_token_.emplace(token, &made);
    turn_.push_back(id);
    next_check_ns_ = 0;
    send_frame(made, FrameKind::endpoints, num_endpoints_made_[made.arguments.address.engine]);
    send_frame(made, FrameKind::heartbeat, made.liveness.next_heartbeat(boottime_ns()));
}

// UCX tells connections of two workers apart by counting endpoints on both sides, so an endpoint made on one side only,
// for a peer that did not answer, makes the next ones meet the remains of former connections and wait for ever. Both
// sides say how many they have made, and the one with fewer makes up for it.
void Progress::create_endpoints(Peer& made, std::uint64_t num_made_by_peer) {
    std::uint64_t& num_made = num_endpoints_made_[made.arguments.address.engine];
    if (num_made_by_peer > num_made + kMaxUnusedEndpoints) {
        begin_ending(made, Ending::lost,
                     "it says it has made " + std::to_string(num_made_by_peer) +
                         " endpoints to this one, which has made " + std::to_string(num_made));
        return;
    }
    try {
        for (; num_made < num_made_by_peer; ++num_made) made.unused_endpoints.push_back(create_endpoint(made, false));
        made.endpoint = create_endpoint(made, true);
        ++num_made;
    } catch (const UcxError& error) {
        begin_ending(made, Ending::lost, error.what());
    }
}

ucp_ep_h Progress::create_endpoint(Peer& made, bool used) {
    ucp_ep_params_t params{};
    params.field_mask =
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(made.arguments.address.ucx_address.data());
    // Without this mode a dead peer leaves operations that never end and cannot be cancelled.
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = used ? &Progress::on_endpoint_error : [](void*, ucp_ep_h, ucs_status_t) {};
    params.err_handler.arg = &made;
    ucp_ep_h endpoint = nullptr;
    ucx_.check(ucx_.ucp_ep_create(context_.worker(), &params, &endpoint),
               "connecting to peer '" + made.arguments.name + "'");
    return endpoint;
}

void Progress::on_endpoint_error(void* argument, ucp_ep_h, ucs_status_t status) noexcept {
    Peer& failed = *static_cast<Peer*>(argument);
    if (!failed.endpoint_error.empty()) return;
    failed.endpoint_error = std::string("UCX lost the connection: ") + failed.ucx.ucs_status_string(status);
    failed.endpoint_failed_ns = boottime_ns();
}

void Progress::send_frame(Peer& to, FrameKind kind, std::uint64_t sequence) {
    Frame frame;
    frame.kind = kind;
    frame.token = to.arguments.token_out;
    frame.sequence = sequence;
    frame.delivered = to.last_delivered;
    to.socket.send(frame);
    watch(to);
}

void Progress::send_heartbeats() {
    for (const std::int64_t id : turn_) {
        Peer& to = peer(id);
        if (to.ending != Ending::none) continue;
        send_frame(to, FrameKind::heartbeat, to.liveness.next_heartbeat(boottime_ns()));
    }
}

void Progress::read_socket(Peer& from) {
    frames_.clear();
    std::string reason;
    const bool open = from.socket.receive(from.arguments.token_in, frames_, reason);
    for (const Frame& frame : frames_) {
        if (from.ending != Ending::none) return;
        handle_frame(from, frame);
    }
    if (!open && from.ending == Ending::none) begin_ending(from, Ending::lost, reason);
}

void Progress::handle_frame(Peer& from, const Frame& frame) {
    from.liveness.heard(boottime_ns());
    acknowledged(from, frame.delivered);
    switch (frame.kind) {
        case FrameKind::heartbeat:
            send_frame(from, FrameKind::ack, frame.sequence);
            break;
        case FrameKind::ack:
            if (from.endpoint == nullptr || !from.liveness.answered(frame.sequence)) break;
            from.state = PeerState::established;
            events_->push(EstablishedEvent{from.id});
            deliver_in_order(from);
            break;
        case FrameKind::endpoints:
            if (from.endpoint == nullptr) create_endpoints(from, frame.sequence);
            break;
        case FrameKind::bye:
            begin_ending(from, Ending::left, "it left in good order");
            break;
    }
}

void Progress::check_peer(Peer& checked, std::int64_t now_ns) {
    if (checked.ending == Ending::none && !checked.endpoint_error.empty()) {
        read_socket(checked);
        if (checked.ending == Ending::none && now_ns >= checked.endpoint_failed_ns + kGraceNs) {
            give_up(checked, checked.endpoint_error);
        }
    }
    const bool established = checked.state == PeerState::established;
    const auto expired = [&] {
        return checked.liveness.silent(now_ns) || (established && !checked.liveness.may_touch(now_ns));
    };
    if (checked.ending == Ending::none && expired()) {
        // What it said while this process did not run is still unread.
        read_socket(checked);
        if (checked.ending == Ending::none && expired()) {
            const bool silent = checked.liveness.silent(now_ns);
            give_up(checked, silent ? "nothing was heard of it for " + seconds(checked.liveness.silent_ns(now_ns))
                                    : "it has answered no heartbeat within its lease of " +
                                          seconds(checked.arguments.peer_lease_ns) +
                                          ", so it may take this side for dead");
        }
    }
    check_stall(checked, now_ns);
    if (checked.ending != Ending::none) {
        complete_ending(checked);
        if (!checked.gone) next_check_ns_ = std::min(next_check_ns_, now_ns + kDrainCheckNs);
        return;
    }
    next_check_ns_ = std::min(next_check_ns_, checked.endpoint_error.empty() ? checked.liveness.next_deadline_ns()
                                                                             : checked.endpoint_failed_ns + kGraceNs);
}

// The control connection alone would keep a peer alive that UCX does not reach.
void Progress::check_stall(Peer& checked, std::int64_t now_ns) {
    if (checked.ending != Ending::none || !checked.waits_for_ucx()) return;
    const std::int64_t limit_ns = checked.moved_ns + kStallLeases * options_.lease_ns;
    if (now_ns < limit_ns) {
        next_check_ns_ = std::min(next_check_ns_, limit_ns);
        return;
    }
    // UCX may have news that this thread, which may itself have been stopped, has not fetched yet.
    if (checked.stalled_ns == 0) checked.stalled_ns = now_ns;
    if (now_ns < checked.stalled_ns + kGraceNs) {
        next_check_ns_ = std::min(next_check_ns_, checked.stalled_ns + kGraceNs);
        return;
    }
    give_up(checked,
            "UCX moved nothing for " + seconds(now_ns - checked.moved_ns) + ", although the peer was heard of");
}

// For a loss that this side has decided on, where the peer may live: what it may touch must not be used again yet.
void Progress::give_up(Peer& lost, const std::string& reason) {
    if (lost.state == PeerState::established) lost.gone_after_ns = lost.liveness.peer_touches_until_ns();
    begin_ending(lost, Ending::lost, reason);
}

// Nothing new is started and UCX is told to drop what is in flight. The rest waits until it has: until then UCX could
// still write into memory here, or at the peer, which may use it for something else once the socket is closed.
void Progress::begin_ending(Peer& ended, Ending ending, const std::string& reason) {
    if (ended.ending != Ending::none) return;
    ended.ending = ending;
    ended.reason = reason;
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, ended.socket.fd(), nullptr);
    by_token_.erase(ended.arguments.token_in);
    // Nothing can be in flight on a connection that is still being made.
    const bool wait = ended.state == PeerState::connecting && ended.endpoint_error.empty();
    ended.close_at_ns = wait ? boottime_ns() + kConnectGraceNs : 0;
    if (!wait) close_endpoints(ended);
    next_check_ns_ = 0;
}

void Progress::close_endpoints(Peer& ended) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    auto endpoints = std::exchange(ended.unused_endpoints, {});
    if (ended.endpoint != nullptr) endpoints.push_back(std::exchange(ended.endpoint, nullptr));
    for (ucp_ep_h endpoint : endpoints) {
        void* closing = ucx_.ucp_ep_close_nbx(endpoint, &param);
        if (UCS_PTR_IS_PTR(closing)) ended.close_requests.push_back(closing);
    }
}

void Progress::complete_ending(Peer& ended) {
    if (ended.gone) return;
    if (ended.endpoint != nullptr) {
        if (ended.endpoint_error.empty() && boottime_ns() < ended.close_at_ns) return;
        close_endpoints(ended);
    }
    while (!ended.close_requests.empty()) {
        if (ucx_.ucp_request_check_status(ended.close_requests.back()) == UCS_INPROGRESS) return;
        ucx_.ucp_request_free(ended.close_requests.back());
        ended.close_requests.pop_back();
    }
    if (!ended.drained()) return;
    const bool own_will = ended.ending == Ending::removed || ended.ending == Ending::closing;
    if (own_will) send_frame(ended, FrameKind::bye, 0);
    ended.socket.close();
    if (boottime_ns() < ended.gone_after_ns) return;
    for (const auto& remote : ended.remotes) {
        if (remote->key != nullptr) ucx_.ucp_rkey_destroy(std::exchange(remote->key, nullptr));
    }
    ended.remotes.clear();
    ended.early.clear();
    ended.state = ended.ending == Ending::lost ? PeerState::lost : PeerState::left;
    ended.gone = true;
    for (auto& transaction : ended.unacknowledged) fail_transaction(ended, std::move(transaction));
    ended.unacknowledged.clear();
    for (auto& transaction : ended.queue) fail_transaction(ended, std::move(transaction));
    ended.queue.clear();
    if (!own_will) events_->push(LostEvent{ended.id, ended.reason, ended.ending == Ending::left});
    for (const auto& then : std::exchange(ended.when_gone, {})) then();
}

void Progress::fail_transaction(Peer& ended, std::unique_ptr<Transaction> transaction) {
    ErrorKind kind = ErrorKind::lost;
    if (ended.ending == Ending::removed) kind = ErrorKind::cancelled;
    if (ended.ending == Ending::closing) kind = ErrorKind::closed;
    const char* verb = kind == ErrorKind::lost ? " failed, the peer is lost: " : " was given up: ";
    transaction->finish(kind, describe(ended, *transaction) + verb + ended.reason);
}

void Progress::remove_peer(std::int64_t id, std::function<void()> then) {
    Peer& removed = peer(id);
    removed.forget = true;
    if (removed.gone) {
        peers_.erase(id);
        then();
        return;
    }
    removed.when_gone.push_back(std::move(then));
    begin_ending(removed, Ending::removed, "it was removed");
}

PeerReport Progress::report(std::int64_t id) {
    Peer& asked = peer(id);
    const std::int64_t now = boottime_ns();
    PeerReport report;
    report.name = asked.arguments.name;
    report.state = name(asked.state);
    report.reason = asked.reason;
    report.cma = asked.cma;
    report.silent_s = 1e-9 * static_cast<double>(asked.liveness.silent_ns(now));
    const bool alive = asked.state == PeerState::established && asked.ending == Ending::none;
    report.lease_left_s = alive ? 1e-9 * static_cast<double>(asked.liveness.lease_left_ns(now)) : 0.0;
    report.num_queued = static_cast<std::int64_t>(asked.queue.size() + asked.unacknowledged.size());
    report.num_outstanding = asked.num_operations + asked.num_sends;
    if (!alive) return report;
    ucp_transport_entry_t entries[16] = {};
    ucp_ep_attr_t attributes{};
    attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
    attributes.transports = {entries, 16, sizeof(entries[0])};
    if (ucx_.ucp_ep_query(asked.endpoint, &attributes) == UCS_OK) {
        for (unsigned i = 0; i < attributes.transports.num_entries; ++i) {
            report.transports.push_back(std::string(entries[i].transport_name) + "/" + entries[i].device_name);
        }
    }
    return report;
}

std::shared_ptr<Remote> Progress::import_remote(std::int64_t peer_id, const RemoteKey& key, std::uint64_t address,
                                                std::uint64_t size_bytes) {
    Peer& owner = peer(peer_id);
    if (owner.ending != Ending::none) {
        throw UcxError("peer '" + owner.arguments.name + "' is lost: " + owner.reason);
    }
    LLMSYS_CHECK(owner.endpoint != nullptr, "peer '" << owner.arguments.name << "' is not connected yet");
    LLMSYS_CHECK(key.engine == owner.arguments.address.engine,
                 "the remote key was made by another engine than that of peer '" << owner.arguments.name << "'");
    auto remote = std::make_shared<Remote>();
    remote->peer_id = peer_id;
    remote->address = address;
    remote->size_bytes = size_bytes;
    remote->cuda = key.cuda;
    ucx_.check(ucx_.ucp_ep_rkey_unpack(owner.endpoint, key.ucx_key.data(), &remote->key),
               "reading a remote key of peer '" + owner.arguments.name + "'");
    void* mapped = nullptr;
    // Without a probe the peer is on another host, where the name of a segment may be that of another one here.
    const bool may_map = !key.cuda && options_.shm && owner.arguments.probe;
    if (may_map && ucx_.ucp_rkey_ptr(remote->key, address, &mapped) == UCS_OK) {
        remote->path = Path::shm;
        remote->mapped = reinterpret_cast<std::uint64_t>(mapped);
    } else if (!key.cuda && owner.cma) {
        remote->path = Path::cma;
    }
    owner.remotes.push_back(remote);
    return remote;
}

void Progress::destroy_remote(const std::shared_ptr<Remote>& remote) {
    if (remote->key != nullptr) ucx_.ucp_rkey_destroy(std::exchange(remote->key, nullptr));
    const auto owner = peers_.find(remote->peer_id);
    if (owner != peers_.end()) std::erase(owner->second->remotes, remote);
}

}  // namespace llmsys::comm
