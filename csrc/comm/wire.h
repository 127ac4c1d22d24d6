#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

namespace llmsys::comm {

static_assert(std::endian::native == std::endian::little, "what is sent is little-endian");

// Control socket: fixed frames in both directions.
enum class FrameKind : std::uint16_t { heartbeat = 1, ack = 2, bye = 3, endpoints = 4 };

struct Frame {
    static constexpr std::uint32_t kMagic = 0x4d4c4c43;
    static constexpr std::uint16_t kVersion = 2;

    std::uint32_t magic = kMagic;
    FrameKind kind = FrameKind::heartbeat;
    std::uint16_t version = kVersion;
    std::uint64_t token = 0;
    std::uint64_t sequence = 0;   // of a heartbeat, also in the answer to it; or how many endpoints were made before
    std::uint64_t delivered = 0;  // last notification that has been delivered here: an acknowledgement that gets
                                  // through also where the sender leaves right after it
};
static_assert(sizeof(Frame) == 32);

// Header of every UCX active message.
enum class MessageKind : std::uint16_t { notification = 1, acknowledgement = 2 };

struct MessageHeader {
    static constexpr std::uint32_t kMagic = 0x4d4c4c41;
    static constexpr std::uint16_t kVersion = 1;

    std::uint32_t magic = kMagic;
    MessageKind kind = MessageKind::notification;
    std::uint16_t version = kVersion;
    std::uint64_t token = 0;
    std::uint64_t id = 0;  // of a notification; an acknowledgement is for all up to it
    std::uint64_t payload_bytes = 0;
};
static_assert(sizeof(MessageHeader) == 32);

// What a peer must know of a region. UCX reads keys and addresses without checking them, so both travel in an envelope
// with a checksum, the version of UCX, and the identity of the engine that made them.
struct RemoteKey {
    std::uint64_t engine = 0;
    std::uint64_t address = 0;
    std::uint64_t size_bytes = 0;
    bool cuda = false;
    std::string ucx_key;
};

struct WorkerAddress {
    std::uint64_t engine = 0;
    std::string ucx_address;
};

struct UcxVersion {
    unsigned major = 0;
    unsigned minor = 0;
};

std::string pack(const RemoteKey& key, UcxVersion version);
std::string pack(const WorkerAddress& address, UcxVersion version);

// Throw std::invalid_argument, saying what is wrong, for anything that `pack` did not make.
RemoteKey unpack_remote_key(std::string_view bytes, UcxVersion version);
WorkerAddress unpack_worker_address(std::string_view bytes, UcxVersion version);

std::uint32_t crc32(std::string_view bytes);

}  // namespace llmsys::comm
