#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <span>
#include <stdexcept>

#include "rts/atomics.hpp"
#include "rts/cache_line.hpp"

namespace rts {

// How far one side of a ring has come since it was made. Both counts run freely and wrap.
struct RingPosition {
  std::uint32_t bytes = 0;  // a multiple of SpscRing's kAlignment
  std::uint32_t records = 0;
};

// Both sides of a ring know its shape by themselves: what lies in shared memory is no authority on it.
struct SpscRingShape {
  std::uint32_t bytes = 0;                                            // a power of two
  std::uint32_t records = std::numeric_limits<std::uint32_t>::max();  // how many it may hold at once
};

// What lies at the start of a ring's memory; the records follow. A side writes its own cache line only.
template <class Atomics>
struct SpscRingHeader {
  using Word = typename Atomics::template atomic<std::uint64_t>;
  alignas(kCacheLine) Word tail{0};  // the RingPosition up to which the producer has published
  alignas(kCacheLine) Word head{0};  // the RingPosition up to which the consumer has given back
};

// A ring of byte records, each of its own length, from one producer to one consumer, which may be another process: all
// that is shared lies in memory that the caller gives, without a pointer in it. Zeroed memory is an empty ring.
//
// A record is its size (u32) and its payload, padded to 8 bytes, and never wraps: where one does not fit in front of
// the end, a skip marker goes there and the record to the start. So a reader has each payload as one piece, four bytes
// behind a multiple of eight.
//
// A side trusts nothing that the other one can write. Whatever a broken peer stores, neither side reads or writes
// outside the ring's memory or loops; a consumer that sees something impossible is corrupt() and finds nothing more.
//
// Memory orders, by number:
//   (1) the tail's release store in publish(): the record's bytes are visible to whoever reads this tail (2)
//   (2) the tail's acquire loads of the consumer
//   (3) the head's release store in release(): the consumer has read what lies before this head (4)
//   (4) the head's acquire loads of the producer, before it writes over what lay there
template <class Atomics = StdAtomics>
class SpscRing {
 public:
  using Header = SpscRingHeader<Atomics>;
  class Producer;
  class Consumer;

  static constexpr std::uint32_t kAlignment = 8;

  static constexpr std::size_t bytes_needed(const SpscRingShape& shape) { return sizeof(Header) + shape.bytes; }
  // Half the ring: a larger one could find no place in an empty ring, for it would not fit on either side of the
  // position that both have come to.
  static constexpr std::uint32_t max_record_bytes(const SpscRingShape& shape) { return shape.bytes / 2 - kSizeBytes; }

  // `memory` is aligned to a cache line and stays where it is. Throws std::invalid_argument for a shape that no ring
  // can have.
  SpscRing(std::byte* memory, const SpscRingShape& shape) : memory_(memory), shape_(shape) {
    if (!std::has_single_bit(shape.bytes) || shape.bytes < kCacheLine || shape.records == 0) {
      throw std::invalid_argument("a ring's bytes must be a power of two of 64 or more, its records 1 or more");
    }
  }

  // Makes the ring empty. Only while neither side is there.
  void clear(RingPosition start = {}) {
    start.bytes &= ~(kAlignment - 1);
    const auto word = std::bit_cast<std::uint64_t>(start);
    new (memory_) Header{.tail{word}, .head{word}};
  }

  // A side goes on where the last one of its kind stopped: what that one had claimed and not published, or read and not
  // released, is as if it had not been.
  Producer producer() const { return {memory_, shape_}; }
  Consumer consumer() const { return {memory_, shape_}; }

 private:
  using Word = typename Header::Word;
  static_assert(Word::is_always_lock_free && sizeof(Word) == sizeof(RingPosition));
  static_assert(offsetof(Header, tail) == 0 && offsetof(Header, head) == kCacheLine);
  static_assert(sizeof(Header) == 2 * kCacheLine);

  static constexpr std::uint32_t kSizeBytes = sizeof(std::uint32_t);
  static constexpr std::uint32_t kSkip = std::numeric_limits<std::uint32_t>::max();

  static constexpr std::uint32_t stride(std::uint32_t payload_bytes) {
    return static_cast<std::uint32_t>(align_up(std::size_t{kSizeBytes} + payload_bytes, kAlignment));
  }
  static RingPosition load(const Word& word, std::memory_order order) {
    return std::bit_cast<RingPosition>(word.load(order));
  }
  // Where a side that attaches begins. Peers cannot misalign it: a marker could then lie across the ring's end.
  static RingPosition start(const Word& word, std::memory_order order) {
    RingPosition position = load(word, order);
    position.bytes &= ~(kAlignment - 1);
    return position;
  }

  std::byte* memory_;
  SpscRingShape shape_;
};

// The producer's side. One thread at a time uses it; each operation is wait-free.
template <class Atomics>
class SpscRing<Atomics>::Producer {
 public:
  Producer() = default;
  Producer(std::byte* memory, const SpscRingShape& shape)
      : header_(reinterpret_cast<Header*>(memory)),
        data_(memory + sizeof(Header)),
        shape_(shape),
        position_(start(header_->tail, std::memory_order_relaxed)),
        released_(start(header_->head, std::memory_order_acquire)) {}  // (4)
  Producer(Producer&&) = default;
  Producer& operator=(Producer&&) = default;

  // Room for a record of `bytes` > 0, to be written and then published; nullptr: the ring is full, or the record too
  // large for it. A claim that is not published is given up by the next one.
  std::byte* claim(std::uint32_t bytes) noexcept {
    if (bytes == 0 || bytes > max_record_bytes(shape_)) return nullptr;
    const std::uint32_t needed = stride(bytes);
    const std::uint32_t skipped = needed <= contiguous() ? 0 : contiguous();
    if (!has_room(1, skipped + needed)) return nullptr;
    if (skipped != 0) write_size(position_.bytes, kSkip);
    claimed_ = skipped + needed;
    return write_size(position_.bytes + skipped, bytes);
  }

  // Lets the consumer have the record that was claimed.
  void publish() noexcept {
    position_.bytes += claimed_;
    position_.records += 1;
    claimed_ = 0;
    header_->tail.store(std::bit_cast<std::uint64_t>(position_), std::memory_order_release);  // (1)
  }

  // Publishes one record of all the parts. False: as claim().
  template <class... Parts>
  bool push(const Parts&... parts) noexcept {
    const std::size_t bytes = (std::as_bytes(std::span(parts)).size() + ...);
    if (bytes > max_record_bytes(shape_)) return false;
    std::byte* out = claim(static_cast<std::uint32_t>(bytes));
    if (out == nullptr) return false;
    ((out = std::ranges::copy(std::as_bytes(std::span(parts)), out).out), ...);
    publish();
    return true;
  }

  // Whether `records` records of `bytes` together can be claimed, however the bytes are spread over them; none of them
  // larger than max_record_bytes().
  bool can_claim(std::uint32_t records, std::uint32_t bytes) noexcept {
    const std::uint64_t padding = std::uint64_t{records} * (kSizeBytes + kAlignment - 1);
    std::uint64_t needed = align_up(bytes + padding, kAlignment);
    if (needed > contiguous()) needed += contiguous();  // where the first record is one that does not fit there
    return needed <= shape_.bytes && has_room(records, static_cast<std::uint32_t>(needed));
  }

 private:
  std::uint32_t contiguous() const { return shape_.bytes - (position_.bytes & (shape_.bytes - 1)); }

  bool has_room(std::uint32_t records, std::uint32_t bytes) {
    if (fits(records, bytes)) return true;
    released_ = load(header_->head, std::memory_order_acquire);  // (4)
    return fits(records, bytes);
  }
  bool fits(std::uint32_t records, std::uint32_t bytes) const {
    const std::uint32_t used_bytes = position_.bytes - released_.bytes;
    const std::uint32_t used_records = position_.records - released_.records;
    return used_bytes <= shape_.bytes && bytes <= shape_.bytes - used_bytes &&  //
           used_records <= shape_.records && records <= shape_.records - used_records;
  }

  // The place behind it.
  std::byte* write_size(std::uint32_t position, std::uint32_t size) {
    std::byte* at = data_ + (position & (shape_.bytes - 1));
    std::memcpy(at, &size, kSizeBytes);
    return at + kSizeBytes;
  }

  Header* header_ = nullptr;
  std::byte* data_ = nullptr;
  SpscRingShape shape_;
  RingPosition position_;
  RingPosition released_;  // the head as last read
  std::uint32_t claimed_ = 0;
};

// The consumer's side. One thread at a time uses it; each operation is wait-free.
template <class Atomics>
class SpscRing<Atomics>::Consumer {
 public:
  Consumer() = default;
  Consumer(std::byte* memory, const SpscRingShape& shape)
      : header_(reinterpret_cast<Header*>(memory)),
        data_(memory + sizeof(Header)),
        shape_(shape),
        position_(start(header_->head, std::memory_order_relaxed)),
        published_(position_),
        released_(position_.bytes) {}
  Consumer(Consumer&&) = default;
  Consumer& operator=(Consumer&&) = default;

  // The next record; empty: none is published. It can be read until release(), though the producer, if it is broken,
  // may change it meanwhile. The tail is read only where all that was seen published has been popped, and a producer
  // gets no room back before release(): so front() and pop() until there is no more ends within one ring's content.
  std::span<const std::byte> front() noexcept {
    if (front_bytes_ == 0 && !find_front()) return {};
    return {data_ + (position_.bytes & (shape_.bytes - 1)) + kSizeBytes, front_bytes_};
  }

  // Goes past the record that front() gave.
  void pop() noexcept {
    position_.bytes += stride(front_bytes_);
    position_.records += 1;
    front_bytes_ = 0;
  }

  // Gives the room of what was popped back to the producer.
  void release() noexcept {
    if (released_ == position_.bytes) return;
    released_ = position_.bytes;
    header_->head.store(std::bit_cast<std::uint64_t>(position_), std::memory_order_release);  // (3)
  }

  bool empty() const noexcept { return corrupt_ || load_tail().bytes == position_.bytes; }
  // How many are published and not popped.
  std::uint32_t records() const noexcept {
    return corrupt_ ? 0 : std::min(load_tail().records - position_.records, shape_.records);
  }
  bool corrupt() const noexcept { return corrupt_; }

 private:
  RingPosition load_tail() const { return load(header_->tail, std::memory_order_acquire); }  // (2)

  bool find_front() {
    if (position_.bytes == published_.bytes && !look_for_more()) return false;
    std::uint32_t size = read_size();
    if (size == kSkip) {
      const std::uint32_t skipped = shape_.bytes - (position_.bytes & (shape_.bytes - 1));
      if (skipped >= published_.bytes - position_.bytes) return fail();
      position_.bytes += skipped;
      size = read_size();
    }
    if (size == 0 || size > max_record_bytes(shape_)) return fail();
    const std::uint32_t end = (position_.bytes & (shape_.bytes - 1)) + stride(size);
    if (stride(size) > published_.bytes - position_.bytes || end > shape_.bytes) return fail();
    front_bytes_ = size;
    return true;
  }

  bool look_for_more() {
    if (corrupt_) return false;
    const RingPosition tail = load_tail();
    if (tail.bytes == position_.bytes) return false;
    // Counted from what was given back, an honest producer is at most a ring ahead, and we are not ahead of it.
    const std::uint32_t ahead = tail.bytes - released_;
    if (ahead > shape_.bytes || ahead < position_.bytes - released_ || ahead % kAlignment != 0) return fail();
    published_ = tail;
    return true;
  }

  // Volatile: read once. The producer could change it after it was checked.
  std::uint32_t read_size() const {
    return *reinterpret_cast<const volatile std::uint32_t*>(data_ + (position_.bytes & (shape_.bytes - 1)));
  }

  bool fail() {
    corrupt_ = true;
    published_ = position_;
    return false;
  }

  Header* header_ = nullptr;
  std::byte* data_ = nullptr;
  SpscRingShape shape_;
  RingPosition position_;
  RingPosition published_;         // the tail as last read
  std::uint32_t released_ = 0;     // the head's bytes
  std::uint32_t front_bytes_ = 0;  // the payload of the record at position_; 0: not looked at yet
  bool corrupt_ = false;
};

}  // namespace rts
