#include <cstring>
#include <exception>
#include <utility>

#include "comm/progress.h"

namespace llmsys::comm {

namespace {

constexpr unsigned kAmId = 1;
// More notifications that overtook others than a peer may send ahead: it does not keep to the protocol.
constexpr std::size_t kMaxEarly = 256;

}  // namespace

// An active message in flight: UCX reads header and payload until its callback.
struct Progress::Message {
    Peer& peer;
    MessageHeader header;
    std::string payload;
};

void Progress::send_notification(Peer& peer, std::unique_ptr<Transaction> transaction) {
    auto message = std::make_unique<Message>(Message{peer, {}, std::move(transaction->payload)});
    message->header.kind = MessageKind::notification;
    message->header.token = peer.arguments.token_out;
    message->header.id = ++peer.last_sent;
    message->header.payload_bytes = message->payload.size();
    transaction->request->started_ns = monotonic_ns();
    peer.about_to_post();
    peer.unacknowledged.push_back(std::move(transaction));
    counters_.num_notifications_sent.fetch_add(1, std::memory_order_relaxed);
    send_message(std::move(message));
}

// One for all notifications up to the last: they are counted through.
void Progress::send_acknowledgement(Peer& peer) {
    auto message = std::make_unique<Message>(Message{peer, {}, {}});
    message->header.kind = MessageKind::acknowledgement;
    message->header.token = peer.arguments.token_out;
    message->header.id = peer.last_delivered;
    peer.last_acknowledged = peer.last_delivered;
    peer.acknowledging = true;
    send_message(std::move(message));
}

void Progress::send_message(std::unique_ptr<Message> owned) {
    Message* message = owned.release();
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
    param.cb.send = &Progress::on_sent;
    param.user_data = message;
    // A rendezvous would need the receiver to answer and order would be lost.
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    message->peer.about_to_post();
    ++message->peer.num_sends;
    void* request = ucx_.ucp_am_send_nbx(message->peer.endpoint, kAmId, &message->header, sizeof(message->header),
                                         message->payload.data(), message->payload.size(), &param);
    if (!UCS_PTR_IS_PTR(request)) on_sent(nullptr, UCS_PTR_STATUS(request), message);
}

void Progress::on_sent(void* request, ucs_status_t status, void* argument) noexcept {
    const std::unique_ptr<Message> message(static_cast<Message*>(argument));
    Peer& peer = message->peer;
    --peer.num_sends;
    peer.moved(boottime_ns());
    if (message->header.kind == MessageKind::acknowledgement) peer.acknowledging = false;
    if (request != nullptr) peer.ucx.ucp_request_free(request);
    if (status != UCS_OK) on_endpoint_error(&peer, nullptr, status);
}

void Progress::acknowledged(Peer& peer, std::uint64_t id) {
    while (!peer.unacknowledged.empty() && peer.first_unacknowledged <= id) {
        peer.moved(boottime_ns());
        auto transaction = std::move(peer.unacknowledged.front());
        peer.unacknowledged.pop_front();
        ++peer.first_unacknowledged;
        transaction->finish(ErrorKind::none, "");
    }
}

ucs_status_t Progress::on_message(void* argument, const void* header, std::size_t header_bytes, void* data,
                                  std::size_t size_bytes, const ucp_am_recv_param_t* param) noexcept {
    Progress& progress = *static_cast<Progress*>(argument);
    MessageHeader parsed;
    const bool complete = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
    if (header_bytes == sizeof(parsed)) std::memcpy(&parsed, header, sizeof(parsed));
    const bool valid = complete && header_bytes == sizeof(parsed) && parsed.magic == MessageHeader::kMagic &&
                       parsed.version == MessageHeader::kVersion && parsed.payload_bytes == size_bytes;
    const auto found = valid ? progress.by_token_.find(parsed.token) : progress.by_token_.end();
    if (found == progress.by_token_.end()) {
        progress.counters_.num_dropped_messages.fetch_add(1, std::memory_order_relaxed);
        return UCS_OK;
    }
    try {
        progress.receive(*found->second, parsed, std::string(static_cast<const char*>(data), size_bytes));
    } catch (const std::exception&) {
        // Out of memory. Going on would leave a hole in the sequence: the connection ends instead.
        on_endpoint_error(found->second, nullptr, UCS_ERR_NO_MEMORY);
    }
    return UCS_OK;
}

void Progress::receive(Peer& peer, const MessageHeader& header, std::string payload) {
    if (header.kind == MessageKind::acknowledgement) {
        acknowledged(peer, header.id);
        return;
    }
    const bool known = header.kind == MessageKind::notification && header.id > peer.last_delivered &&
                       header.payload_bytes <= static_cast<std::uint64_t>(options_.max_message_bytes) &&
                       peer.early.size() < kMaxEarly;
    if (!known || !peer.early.emplace(header.id, std::move(payload)).second) {
        counters_.num_dropped_messages.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    deliver_in_order(peer);
}

// The event that a connection is established comes before its first notification.
void Progress::deliver_in_order(Peer& peer) {
    if (peer.state != PeerState::established) return;
    while (!peer.early.empty() && peer.early.begin()->first == peer.last_delivered + 1) {
        auto first = peer.early.extract(peer.early.begin());
        ++peer.last_delivered;
        counters_.num_notifications_received.fetch_add(1, std::memory_order_relaxed);
        events_->push(NotificationEvent{peer.id, first.key(), std::move(first.mapped())});
    }
}

}  // namespace llmsys::comm
