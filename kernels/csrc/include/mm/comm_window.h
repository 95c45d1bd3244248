// The memory that each rank of a group offers the others, as one-sided exchanges lay it out. Standard library only.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) && !defined(MM_EMU)
#define MM_ANYWHERE __host__ __device__ __forceinline__
#else
#define MM_ANYWHERE inline
#endif

namespace mm {

inline constexpr int kTileRows = 32;  // rows of one (peer, expert) that one flag is for
inline constexpr int kMaxPeers = 32;

// Addresses inside the windows of all ranks, all of which have the same layout. Everything that is written in an exchange
// is there twice: exchange n uses buffer n mod 2. `from` is the rank that writes, E = P * L.
//
//   counts   int32 [2, P, E]         rows that rank `from` has for each expert
//   arrived  uint32 [P]              the last exchange whose counts are there
//   done     uint32 [P]              exchanges whose rows rank `from` has read
//   claimed  uint32                  not 0: this rank has given up waiting
//   flags    uint32 [2, P, L, tiles] rows of each tile since the beginning
//   values   8 bytes [2, R]          beside each row
//   rows     row_bytes [2, R]        by expert, then by rank, without gaps; R = E * C
struct Window {
  int ranks, me, experts, capacity;  // P, own place, L, C
  std::int64_t row_bytes;            // a multiple of 16
  std::int64_t arrived_at, done_at, claimed_at, flags_at, values_at, rows_at, bytes;
  char* of[kMaxPeers];

  MM_ANYWHERE int all_experts() const { return ranks * experts; }
  MM_ANYWHERE int tiles() const { return (capacity + kTileRows - 1) / kTileRows; }
  MM_ANYWHERE int all_tiles() const { return all_experts() * tiles(); }
  MM_ANYWHERE std::int64_t rows() const { return std::int64_t{all_experts()} * capacity; }

  MM_ANYWHERE int* counts(int at, int buffer, int from) const {
    return reinterpret_cast<int*>(of[at]) + (std::int64_t{buffer} * ranks + from) * all_experts();
  }
  MM_ANYWHERE unsigned* arrived(int at, int from) const { return word(at, arrived_at) + from; }
  MM_ANYWHERE unsigned* done(int at, int from) const { return word(at, done_at) + from; }
  MM_ANYWHERE unsigned* claimed() const { return word(me, claimed_at); }
  // tile: of the [L, tiles] of one writer.
  MM_ANYWHERE unsigned* flag(int at, int buffer, int from, int tile) const {
    return word(at, flags_at) + (std::int64_t{buffer} * ranks + from) * experts * tiles() + tile;
  }
  MM_ANYWHERE char* value(int at, int buffer, std::int64_t row) const {
    return of[at] + values_at + (buffer * rows() + row) * 8;
  }
  MM_ANYWHERE char* row(int at, int buffer, std::int64_t row) const {
    return of[at] + rows_at + (buffer * rows() + row) * row_bytes;
  }

 private:
  MM_ANYWHERE unsigned* word(int at, std::int64_t offset) const { return reinterpret_cast<unsigned*>(of[at] + offset); }
};

// Without addresses.
inline Window lay_out(int ranks, int me, int experts, int capacity, std::int64_t row_bytes) {
  constexpr std::int64_t kApart = 128;  // parts begin on lines of their own
  Window window{ranks, me, experts, capacity, row_bytes, 0, 0, 0, 0, 0, 0, 0, {}};
  std::int64_t end = 0;
  const auto part = [&end](std::int64_t bytes) {
    const std::int64_t begin = end;
    end = (end + bytes + kApart - 1) / kApart * kApart;
    return begin;
  };
  part(std::int64_t{2} * ranks * window.all_experts() * 4);  // counts, at 0
  window.arrived_at = part(std::int64_t{ranks} * 4);
  window.done_at = part(std::int64_t{ranks} * 4);
  window.claimed_at = part(4);
  window.flags_at = part(std::int64_t{2} * window.all_tiles() * 4);
  window.values_at = part(2 * window.rows() * 8);
  window.rows_at = part(2 * window.rows() * row_bytes);
  window.bytes = end;
  return window;
}

// Rows of one tile, where `count` rows begin with tile 0.
MM_ANYWHERE int rows_of_tile(int count, int tile) {
  const int left = count - tile * kTileRows;
  return left < 0 ? 0 : left < kTileRows ? left : kTileRows;
}

}  // namespace mm
