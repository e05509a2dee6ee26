#include "rts/gguf.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>
#include <variant>

namespace rts {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr std::uint32_t kOldestVersion = 2;
constexpr std::uint32_t kNewestVersion = 3;
constexpr std::string_view kAlignmentKey = "general.alignment";

// The least that one can take up, so that a count can be checked before anything is made for it.
constexpr std::size_t kStringBytes = sizeof(std::uint64_t);
constexpr std::size_t kEntryBytes = kStringBytes + sizeof(std::uint32_t) + sizeof(std::uint8_t);
constexpr std::size_t kTensorBytes = kStringBytes + 2 * sizeof(std::uint32_t) + sizeof(std::uint64_t);

// Names come from the file, messages are one line of ASCII.
std::string quoted(std::string_view name) {
  constexpr std::size_t kShown = 80;
  std::string out = "'";
  for (const char c : name.substr(0, kShown)) out += c >= ' ' && c <= '~' ? c : '?';
  return out + (name.size() > kShown ? "...'" : "'");
}

// Reads a file's tables from start to end. Throws GgufCorrupt; where() then says where it was.
class Parser {
 public:
  explicit Parser(std::span<const std::byte> bytes) : bytes_(bytes), from_(bytes) {}

  std::string where() const {
    if (kind_ == nullptr) return "";
    std::string place = std::string(kind_) + " ";
    place += name_ ? quoted(*name_) : std::to_string(index_ + 1) + " of " + std::to_string(count_);
    return place + ": ";
  }

  std::uint32_t version() {
    if (bytes_.size() < kMagic.size() || std::memcmp(bytes_.data(), kMagic.data(), kMagic.size()) != 0) {
      throw GgufCorrupt{"not a GGUF file: it does not begin with 'GGUF'"};
    }
    from_.take_bytes(kMagic.size());
    const auto version = from_.take<std::uint32_t>();
    if (version != 0 && (version & 0xFFFFU) == 0) {
      throw GgufCorrupt{"the file is big-endian; convert it to little-endian"};
    }
    if (version < kOldestVersion || version > kNewestVersion) {
      throw GgufCorrupt{"GGUF version " + std::to_string(version) + " is not supported; versions 2 and 3 are"};
    }
    return version;
  }

  void counts() {
    tensor_count_ = from_.take<std::uint64_t>();
    entry_count_ = from_.take<std::uint64_t>();
    check_count(entry_count_, kEntryBytes, " metadata entries");
    check_count(tensor_count_, kTensorBytes, " tensors");
  }

  std::vector<GgufEntry> entries() {
    std::vector<GgufEntry> entries;
    for (std::size_t i = 0; i < entry_count_; ++i) {
      enter("metadata entry", i, entry_count_);
      const std::string_view name = enter_named("metadata key");
      const auto type = from_.take<GgufValueType>();
      entries.push_back({name, take_gguf_value(from_, type)});
    }
    leave();
    return entries;
  }

  // Their bytes lie behind the last one's description, each tensor's at its offset.
  std::vector<GgufTensor> tensors(std::size_t alignment) {
    std::vector<GgufTensor> tensors;
    std::vector<std::size_t> offsets;
    for (std::size_t i = 0; i < tensor_count_; ++i) {
      enter("tensor", i, tensor_count_);
      GgufTensor& tensor = tensors.emplace_back();
      tensor.name = enter_named("tensor");
      take_shape(tensor);
      take_type(tensor);
      offsets.push_back(from_.take<std::uint64_t>());
      if (offsets.back() % alignment != 0) {
        throw GgufCorrupt{"its offset " + std::to_string(offsets.back()) + " is no multiple of the alignment " +
                          std::to_string(alignment)};
      }
    }
    const std::size_t padding = (alignment - from_.at() % alignment) % alignment;
    const auto data = bytes_.subspan(std::min(from_.at() + padding, bytes_.size()));
    for (std::size_t i = 0; i < tensors.size(); ++i) place(tensors[i], offsets[i], data);
    leave();
    return tensors;
  }

 private:
  void enter(const char* kind, std::size_t index, std::size_t count) {
    kind_ = kind;
    name_.reset();
    index_ = index;
    count_ = count;
  }
  // As named by what comes next.
  std::string_view enter_named(const char* kind) {
    const std::string_view name = from_.take_string();
    kind_ = kind;
    name_ = name;
    return name;
  }
  void leave() { kind_ = nullptr; }

  void check_count(std::size_t count, std::size_t least_bytes, const char* what) const {
    if (count > from_.left() / least_bytes) {
      throw GgufCorrupt{"it claims " + std::to_string(count) + what + ", more than the " +
                        std::to_string(from_.left()) + " bytes behind its header can hold"};
    }
  }

  void take_shape(GgufTensor& tensor) {
    const auto rank = from_.take<std::uint32_t>();
    if (rank > GgufTensor::kMaxRank) {
      throw GgufCorrupt{"it has " + std::to_string(rank) + " dimensions; at most " +
                        std::to_string(GgufTensor::kMaxRank) + " are supported"};
    }
    tensor.rank = rank;
    for (std::size_t i = rank; i-- > 0;) {
      const auto dim = from_.take<std::uint64_t>();
      if (dim == 0) throw GgufCorrupt{"a dimension is 0"};
      // Also what its values take up, 8 bytes each at most, then is a number that can be had.
      if (dim > std::numeric_limits<std::size_t>::max() / 8 / tensor.values) {
        throw GgufCorrupt{"the product of its dimensions overflows"};
      }
      tensor.dims[i] = dim;
      tensor.values *= dim;
    }
  }

  void take_type(GgufTensor& tensor) {
    const auto id = from_.take<std::uint32_t>();
    tensor.type = find_gguf_type(id);
    if (tensor.type == nullptr) throw GgufCorrupt{"its type " + std::to_string(id) + " is unknown"};
    const std::size_t row = tensor.rank == 0 ? 1 : tensor.dims[tensor.rank - 1];
    if (row % tensor.type->block_values != 0) {
      throw GgufCorrupt{"its rows have " + std::to_string(row) + " values, no multiple of the " +
                        std::to_string(tensor.type->block_values) + " in a block of " + std::string(tensor.type->name)};
    }
  }

  void place(GgufTensor& tensor, std::size_t offset, std::span<const std::byte> data) {
    kind_ = "tensor";
    name_ = tensor.name;
    const std::size_t bytes = tensor.values / tensor.type->block_values * tensor.type->block_bytes;
    if (offset > data.size() || bytes > data.size() - offset) {
      throw GgufCorrupt{"its " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                        " go past the end of the file, which has " + std::to_string(data.size()) + " bytes of data"};
    }
    tensor.bytes = data.subspan(offset, bytes);
  }

  std::span<const std::byte> bytes_;
  GgufCursor from_;
  std::size_t entry_count_ = 0;
  std::size_t tensor_count_ = 0;

  const char* kind_ = nullptr;  // of what is being read
  std::optional<std::string_view> name_;
  std::size_t index_ = 0;
  std::size_t count_ = 0;
};

std::size_t alignment_of(const GgufValue& value) {
  const auto* const alignment = std::get_if<std::uint32_t>(&value);
  if (alignment == nullptr) throw GgufCorrupt{"general.alignment is no uint32"};
  if (!std::has_single_bit(*alignment)) {
    throw GgufCorrupt{"general.alignment is " + std::to_string(*alignment) + ", not a power of two"};
  }
  return *alignment;
}

// A sorted index rather than a hash table: no choice of names makes it slow.
template <typename Named>
std::vector<std::size_t> sorted_by_name(const std::vector<Named>& items, const char* kind) {
  std::vector<std::size_t> order(items.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto name = [&](std::size_t i) { return items[i].name; };
  std::ranges::sort(order, {}, name);
  const auto twin = std::ranges::adjacent_find(order, {}, name);
  if (twin != order.end()) throw GgufCorrupt{std::string(kind) + " " + quoted(name(*twin)) + " occurs twice"};
  return order;
}

template <typename Named>
const Named* find_by_name(const std::vector<Named>& items, const std::vector<std::size_t>& order,
                          std::string_view name) {
  const auto found = std::ranges::lower_bound(order, name, {}, [&](std::size_t i) { return items[i].name; });
  return found != order.end() && items[*found].name == name ? &items[*found] : nullptr;
}

void check_apart(const std::vector<GgufTensor>& tensors) {
  std::vector<const GgufTensor*> order(tensors.size());
  std::ranges::transform(tensors, order.begin(), [](const GgufTensor& tensor) { return &tensor; });
  std::ranges::stable_sort(order, {}, [](const GgufTensor* tensor) { return tensor->bytes.data(); });
  const auto twin = std::ranges::adjacent_find(order, [](const GgufTensor* first, const GgufTensor* second) {
    return second->bytes.data() < first->bytes.data() + first->bytes.size();
  });
  if (twin != order.end()) {
    throw GgufCorrupt{"tensors " + quoted(twin[0]->name) + " and " + quoted(twin[1]->name) + " overlap"};
  }
}

}  // namespace

GgufFile::GgufFile(std::string path) : path_(std::move(path)), mapped_(path_) {
  parse(mapped_.bytes());
}

GgufFile::GgufFile(std::string path, std::span<const std::byte> bytes) : path_(std::move(path)) {
  parse(bytes);
}

void GgufFile::parse(std::span<const std::byte> bytes) {
  Parser parser(bytes);
  try {
    version_ = parser.version();
    parser.counts();
    metadata_ = parser.entries();
    metadata_by_name_ = sorted_by_name(metadata_, "metadata key");
    if (const GgufValue* const alignment = find(kAlignmentKey)) alignment_ = alignment_of(*alignment);
    tensors_ = parser.tensors(alignment_);
    tensors_by_name_ = sorted_by_name(tensors_, "tensor");
    check_apart(tensors_);
  } catch (const GgufCorrupt& corrupt) {
    throw std::runtime_error(path_ + ": " + parser.where() + corrupt.what);
  }
}

const GgufValue* GgufFile::find(std::string_view key) const noexcept {
  const GgufEntry* const entry = find_by_name(metadata_, metadata_by_name_, key);
  return entry == nullptr ? nullptr : &entry->value;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const noexcept {
  return find_by_name(tensors_, tensors_by_name_, name);
}

void GgufFile::dequantize(const GgufTensor& tensor, std::span<float> out) const {
  if (tensor.type->dequantize == nullptr) {
    throw std::runtime_error(path_ + ": tensor " + quoted(tensor.name) + ": its type " +
                             std::string(tensor.type->name) + " cannot be decoded; supported: " + decoded_gguf_types());
  }
  if (out.size() != tensor.values) {
    throw std::invalid_argument("tensor " + quoted(tensor.name) + " has " + std::to_string(tensor.values) +
                                " values, not " + std::to_string(out.size()));
  }
  tensor.type->dequantize(tensor.bytes.data(), tensor.values / tensor.type->block_values, out.data());
}

}  // namespace rts
