// In which order a block computes its channels.
#pragma once

#include <bit>

#include "block.h"

namespace sbf {

// In which order the channels of a block's chunks are computed: those with the most links first, so
// that neighbouring threads, which compute neighbouring channels of the order, have as much to do.
// A byte for each channel: first its number of links (127: or more), then its place in the order.
class ChannelOrder {
 public:
  C10_HOST_DEVICE ChannelOrder(char* shared, const Tiling& tiling, int begin, int end)
      : links_(reinterpret_cast<uint8_t*>(shared)),
        order_(links_ + bytes(tiling.chunks_each(), tiling.chunk) / 2),
        chunk_(tiling.chunk),
        begin_(begin),
        size_((end - begin) * tiling.chunk) {}

  static C10_HOST_DEVICE int bytes(int chunks, int chunk) { return 2 * chunks * chunk; }

  template <typename Wiring>
  C10_HOST_DEVICE void count(const Wiring& wiring, int outputs, Thread thread) const {
    for (int i = thread.index; i < size_; i += thread.count) {
      const int channel = begin_ * chunk_ + i;
      int64_t count = 0;
      if (channel < outputs) {
        const ChannelLinks links = wiring.links_of(channel);
        count = links.last - links.first;
      }
      links_[i] = static_cast<uint8_t>(count < 127 ? count : 127);
    }
  }

  C10_HOST_DEVICE void sort(Thread thread) const {
    for (int i = thread.index; i < size_; i += thread.count) {
      const int first = i / chunk_ * chunk_;
      order_[first + rank(links_ + first, i - first)] = static_cast<uint8_t>(i - first);
    }
  }

  // The i-th channel of a chunk, within it.
  C10_HOST_DEVICE int channel(int chunk, int i) const {
    return order_[(chunk - begin_) * chunk_ + i];
  }

  // How many channels of a chunk have links.
  C10_HOST_DEVICE int linked(int chunk) const {
    return at_least(links_ + (chunk - begin_) * chunk_, chunk_, 1, 1, 0);
  }

 private:
  // How many of the first `place` bytes are at least `before`, plus how many of the others are at
  // least `after`. Bytes are below 128: with their top bit set, none borrows from the next.
  static C10_HOST_DEVICE int at_least(const uint8_t* bytes, int size, uint32_t before,
                                      uint32_t after, int place) {
    constexpr uint32_t kOnes = 0x01010101u, kTops = 0x80808080u;
    int count = 0;
    for (int i = 0; i < size; i += 4) {
      const uint32_t word = reinterpret_cast<const Single<uint32_t>*>(bytes + i)->word;
      const int low = place - i;  // bytes of this word that are before the place
      const uint32_t mask = low >= 4 ? ~0u : low <= 0 ? 0u : (1u << 8 * low) - 1;
      const uint32_t limit = (before * kOnes & mask) | (after * kOnes & ~mask);
      const uint32_t found = ((word | kTops) - limit) & kTops;
#ifdef __CUDA_ARCH__
      count += __popc(found);
#else
      count += std::popcount(found);
#endif
    }
    return count;
  }

  C10_HOST_DEVICE int rank(const uint8_t* links, int i) const {
    return at_least(links, chunk_, links[i], links[i] + 1, i);
  }

  uint8_t* links_;
  uint8_t* order_;
  int chunk_, begin_, size_;
};

}  // namespace sbf
