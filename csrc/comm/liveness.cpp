#include "comm/liveness.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/check.h"

namespace llmsys::comm {

namespace {

constexpr std::size_t kMaxUnsentBytes = 64 * sizeof(Frame);
constexpr std::size_t kMaxUnanswered = 4096;

}  // namespace

std::int64_t boottime_ns() {
    timespec now{};
    clock_gettime(CLOCK_BOOTTIME, &now);
    return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

Liveness::Liveness(std::int64_t lease_ns, std::int64_t peer_lease_ns, std::int64_t now_ns)
    : lease_ns_(lease_ns),
      // Clocks of two machines run at slightly different rates.
      peer_lease_ns_(peer_lease_ns - peer_lease_ns / 100),
      last_heard_ns_(now_ns) {}

std::uint64_t Liveness::next_heartbeat(std::int64_t now_ns) {
    ++last_sequence_;
    if (unanswered_.size() < kMaxUnanswered) unanswered_.push_back({last_sequence_, now_ns});
    return last_sequence_;
}

bool Liveness::answered(std::uint64_t sequence) {
    const bool first = touch_until_ns_ == 0;
    while (!unanswered_.empty() && unanswered_.front().sequence <= sequence) {
        touch_until_ns_ = std::max(touch_until_ns_, unanswered_.front().time_ns + peer_lease_ns_);
        unanswered_.pop_front();
    }
    return first && touch_until_ns_ != 0;
}

std::int64_t Liveness::next_deadline_ns() const {
    const std::int64_t silent_at = last_heard_ns_ + lease_ns_;
    return touch_until_ns_ == 0 ? silent_at : std::min(silent_at, touch_until_ns_);
}

ControlSocket::ControlSocket(int fd) : fd_(fd) {
    int type = 0;
    socklen_t size = sizeof(type);
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_STREAM) {
        if (fd >= 0) ::close(fd);
        LLMSYS_CHECK(false, "fd must be a connected stream socket, got " << fd);
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    const int on = 1;
    // Fails on a Unix socket, which never delays anyway.
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

ControlSocket::ControlSocket(ControlSocket&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), unsent_(std::move(other.unsent_)), partial_(std::move(other.partial_)) {}

ControlSocket::~ControlSocket() { close(); }

void ControlSocket::send(const Frame& frame) {
    if (fd_ < 0) return;
    if (unsent_.size() >= kMaxUnsentBytes && frame.kind != FrameKind::bye) return;
    unsent_.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
    flush();
}

void ControlSocket::flush() {
    while (fd_ >= 0 && !unsent_.empty()) {
        const ssize_t sent = ::send(fd_, unsent_.data(), unsent_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (sent < 0) {
            // `receive` finds out why, after what the peer still had to say.
            unsent_.clear();
            return;
        }
        unsent_.erase(0, static_cast<std::size_t>(sent));
    }
}

bool ControlSocket::receive(std::uint64_t token, std::vector<Frame>& frames, std::string& reason) {
    std::array<char, 64 * sizeof(Frame)> buffer;
    while (true) {
        const ssize_t got = ::recv(fd_, buffer.data(), buffer.size(), MSG_DONTWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        if (got <= 0) {
            reason = "it closed its connection";
            // A reset is what a process that dies with unread bytes leaves behind.
            if (got < 0) reason += std::string(" (") + strerror(errno) + ")";
            return false;
        }
        partial_.append(buffer.data(), static_cast<std::size_t>(got));
        std::size_t used = 0;
        for (; partial_.size() - used >= sizeof(Frame); used += sizeof(Frame)) {
            Frame frame;
            std::memcpy(&frame, partial_.data() + used, sizeof(frame));
            if (frame.magic != Frame::kMagic || frame.version != Frame::kVersion || frame.token != token) {
                reason = "its control connection carries something else than frames for this connection";
                return false;
            }
            frames.push_back(frame);
        }
        partial_.erase(0, used);
    }
}

void ControlSocket::close() {
    if (fd_ < 0) return;
    ::shutdown(fd_, SHUT_WR);
    // Closing with unread bytes would reset the connection, and the peer might not see the last frame.
    std::array<char, 4096> ignored;
    for (int i = 0; i < 64 && ::recv(fd_, ignored.data(), ignored.size(), MSG_DONTWAIT) > 0; ++i) {
    }
    ::close(fd_);
    fd_ = -1;
}

}  // namespace llmsys::comm
