#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "comm/wire.h"

namespace llmsys::comm {

// Nanoseconds of CLOCK_BOOTTIME, which goes on while the machine sleeps, as the clock of the peer does.
std::int64_t boottime_ns();

// Who may believe what about whom, without a clock in common.
//
// A peer that hears nothing for its lease takes this process for dead and uses its memory for something else. It last
// heard a heartbeat at or after the time that heartbeat was sent. So: (time of sending the last heartbeat that it has
// answered) + (its lease) is never later than its own deadline, and until then its memory may be touched.
class Liveness {
  public:
    // Both leases in nanoseconds.
    Liveness(std::int64_t lease_ns, std::int64_t peer_lease_ns, std::int64_t now_ns);

    // Number of the heartbeat that is sent now.
    std::uint64_t next_heartbeat(std::int64_t now_ns);
    void heard(std::int64_t now_ns) { last_heard_ns_ = now_ns; }
    // Whether this answer is the first one.
    bool answered(std::uint64_t sequence);

    bool may_touch(std::int64_t now_ns) const { return now_ns < touch_until_ns_; }
    bool silent(std::int64_t now_ns) const { return now_ns >= last_heard_ns_ + lease_ns_; }
    // From when on the peer touches nothing here: it last had a heartbeat answered that it sent before it was heard.
    std::int64_t peer_touches_until_ns() const { return last_heard_ns_ + lease_ns_; }
    // When one of the two changes, unless something arrives.
    std::int64_t next_deadline_ns() const;
    std::int64_t silent_ns(std::int64_t now_ns) const { return now_ns - last_heard_ns_; }
    std::int64_t lease_left_ns(std::int64_t now_ns) const { return touch_until_ns_ - now_ns; }

  private:
    struct Sent {
        std::uint64_t sequence;
        std::int64_t time_ns;
    };

    const std::int64_t lease_ns_;
    const std::int64_t peer_lease_ns_;
    std::int64_t last_heard_ns_;
    std::int64_t touch_until_ns_ = 0;
    std::uint64_t last_sequence_ = 0;
    std::deque<Sent> unanswered_;
};

// The control connection. Owns the descriptor and never blocks.
class ControlSocket {
  public:
    // Takes `fd` over, also when it throws.
    explicit ControlSocket(int fd);
    ~ControlSocket();
    ControlSocket(ControlSocket&& other) noexcept;
    ControlSocket(const ControlSocket&) = delete;
    ControlSocket& operator=(const ControlSocket&) = delete;

    int fd() const { return fd_; }
    // Heartbeats and answers are dropped while the peer takes none: it would not learn from old ones.
    void send(const Frame& frame);
    bool wants_to_write() const { return !unsent_.empty(); }
    void flush();

    // Appends what has arrived. False, with the reason in `reason`, where the connection has ended or carries anything
    // but frames with `token`; frames before that are still appended.
    bool receive(std::uint64_t token, std::vector<Frame>& frames, std::string& reason);
    // No more to send: what was sent still arrives.
    void close();

  private:
    int fd_;
    std::string unsent_;
    std::string partial_;
};

}  // namespace llmsys::comm
