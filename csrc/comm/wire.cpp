#include "comm/wire.h"

#include <array>
#include <cstring>

#include "common/check.h"

namespace llmsys::comm {

namespace {

constexpr std::uint32_t kKeyMagic = 0x4b4c4c43;
constexpr std::uint32_t kAddressMagic = 0x414c4c43;
constexpr std::uint16_t kVersion = 1;

struct EnvelopeHeader {
    std::uint32_t magic = 0;
    std::uint16_t version = kVersion;
    std::uint16_t cuda = 0;
    std::uint16_t ucx_major = 0;
    std::uint16_t ucx_minor = 0;
    std::uint32_t checksum = 0;  // of the whole envelope with this field 0
    std::uint64_t engine = 0;
    std::uint64_t address = 0;
    std::uint64_t size_bytes = 0;
    std::uint64_t body_bytes = 0;
};
static_assert(sizeof(EnvelopeHeader) == 48);

constexpr std::array<std::uint32_t, 256> make_crc_table() {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        std::uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = (value & 1) ? 0xedb88320u ^ (value >> 1) : value >> 1;
        table[i] = value;
    }
    return table;
}

std::string seal(EnvelopeHeader header, const std::string& body, UcxVersion version) {
    header.ucx_major = static_cast<std::uint16_t>(version.major);
    header.ucx_minor = static_cast<std::uint16_t>(version.minor);
    header.body_bytes = body.size();
    std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
    bytes += body;
    header.checksum = crc32(bytes);
    std::memcpy(bytes.data(), &header, sizeof(header));
    return bytes;
}

EnvelopeHeader unseal(std::string_view bytes, std::uint32_t magic, const char* name, UcxVersion version) {
    LLMSYS_CHECK(bytes.size() > sizeof(EnvelopeHeader),
                 "a " << name << " has more than " << sizeof(EnvelopeHeader) << " bytes, got " << bytes.size());
    EnvelopeHeader header;
    std::memcpy(&header, bytes.data(), sizeof(header));
    LLMSYS_CHECK(header.magic == magic, "these " << bytes.size() << " bytes are no " << name);
    LLMSYS_CHECK(header.version == kVersion,
                 "the " << name << " has format version " << header.version << ", this library reads " << kVersion);
    LLMSYS_CHECK(header.body_bytes == bytes.size() - sizeof(header),
                 "the " << name << " is cut: it announces " << header.body_bytes << " bytes after its header, got "
                        << bytes.size() - sizeof(header));
    std::string copy(bytes);
    EnvelopeHeader blank = header;
    blank.checksum = 0;
    std::memcpy(copy.data(), &blank, sizeof(blank));
    LLMSYS_CHECK(crc32(copy) == header.checksum, "the " << name << " is damaged: its checksum is wrong");
    LLMSYS_CHECK(header.ucx_major == version.major && header.ucx_minor == version.minor,
                 "the " << name << " was made by UCX " << header.ucx_major << "." << header.ucx_minor
                        << ", here UCX is " << version.major << "." << version.minor << ": load the same on both");
    return header;
}

}  // namespace

std::uint32_t crc32(std::string_view bytes) {
    static constexpr std::array<std::uint32_t, 256> kTable = make_crc_table();
    std::uint32_t value = 0xffffffffu;
    for (const char c : bytes) value = kTable[(value ^ static_cast<std::uint8_t>(c)) & 0xff] ^ (value >> 8);
    return value ^ 0xffffffffu;
}

std::string pack(const RemoteKey& key, UcxVersion version) {
    EnvelopeHeader header;
    header.magic = kKeyMagic;
    header.cuda = key.cuda ? 1 : 0;
    header.engine = key.engine;
    header.address = key.address;
    header.size_bytes = key.size_bytes;
    return seal(header, key.ucx_key, version);
}

std::string pack(const WorkerAddress& address, UcxVersion version) {
    EnvelopeHeader header;
    header.magic = kAddressMagic;
    header.engine = address.engine;
    return seal(header, address.ucx_address, version);
}

RemoteKey unpack_remote_key(std::string_view bytes, UcxVersion version) {
    const EnvelopeHeader header = unseal(bytes, kKeyMagic, "remote key", version);
    return {header.engine, header.address, header.size_bytes, header.cuda != 0,
            std::string(bytes.substr(sizeof(EnvelopeHeader)))};
}

WorkerAddress unpack_worker_address(std::string_view bytes, UcxVersion version) {
    const EnvelopeHeader header = unseal(bytes, kAddressMagic, "worker address", version);
    return {header.engine, std::string(bytes.substr(sizeof(EnvelopeHeader)))};
}

}  // namespace llmsys::comm
