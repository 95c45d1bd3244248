// What the one-sided exchange's ops have in common on every device: their arguments.
#pragma once

#include "mm/comm_flags.h"
#include "mm/tensor.h"

namespace mm {

// Of box, int64 [4 + P] on the CPU: own place, L, C, bytes of a row, then the address of every rank's memory.
inline Window window_of(const char* op, const Tensor& box) {
  Argument{op, "box", box}.dtype({ScalarType::Long}).shape({-1}).contiguous();
  constexpr int64_t kBefore = 4;
  const int64_t ranks = box.numel() - kBefore;
  MM_CHECK(box.is_cpu() && ranks >= 1 && ranks <= kMaxPeers, op, "box",
           text(ranks, " ranks, on ", device_text(box)), text("1 to ", kMaxPeers, ", on cpu"));
  const int64_t* const about = in<int64_t>(box);
  const bool whole = about[0] >= 0 && about[0] < ranks && about[1] >= 1 && about[2] >= 1 && about[3] >= 16 &&
                     about[3] % 16 == 0 && ranks * ranks * about[1] * (about[2] + kTileRows) < int64_t{1} << 31;
  MM_CHECK(whole, op, "box", text("place ", about[0], ", L ", about[1], ", C ", about[2], ", ", about[3], " bytes"),
           "a place below P, L and C above 0, a multiple of 16 bytes, and P * E * C below 2^31");
  Window window = lay_out(static_cast<int>(ranks), static_cast<int>(about[0]), static_cast<int>(about[1]),
                          static_cast<int>(about[2]), about[3]);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    window.of[rank] = reinterpret_cast<char*>(about[kBefore + rank]);
  }
  return window;
}

inline int64_t window_bytes(const Tensor& box) { return window_of("window_bytes", box).bytes; }

// How long an op waits, and where it says what for.
inline Patience patience_of(const char* op, const Window& window, double seconds, const Tensor& report) {
  Argument{op, "report", report}.dtype({ScalarType::Int}).shape({8}).contiguous();
  MM_CHECK(report.is_cpu(), op, "report", "a tensor on " + device_text(report), "one on cpu, which the host reads");
  MM_CHECK(seconds > 0 && seconds < 1e9, op, "limit", text(seconds, " s"), "a time above 0");
  return {static_cast<int64_t>(seconds * 1e9), window.claimed(), out<int32_t>(report)};
}

// counts, first: int32 [P, E] on the device of `rows`.
inline void check_tables(const char* op, const Window& window, const Tensor& counts, const Tensor& first,
                         const Tensor& rows) {
  const int64_t experts = window.all_experts();
  Argument{op, "counts", counts}.dtype({ScalarType::Int}).shape({window.ranks, experts}).contiguous().on(rows);
  Argument{op, "first", first}.dtype({ScalarType::Int}).shape({window.ranks, experts}).contiguous().on(rows);
}

inline void check_seen(const char* op, const Window& window, const Tensor& seen, const Tensor& rows) {
  Argument{op, "seen", seen}.dtype({ScalarType::Int}).shape({2, window.all_tiles()}).contiguous().on(rows);
}

// Rows [N, D] that go through the window.
inline void check_width(const char* op, const char* argument, const Window& window, const Tensor& rows) {
  Argument{op, argument, rows}.rows();
  const int64_t bytes = rows.size(1) * rows.element_size();
  MM_CHECK(bytes <= window.row_bytes, op, argument, text(bytes, " bytes in a row"),
           text("at most ", window.row_bytes, ", for which the window was made"));
}

}  // namespace mm
