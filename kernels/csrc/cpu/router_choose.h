// The experts of a token's largest scores.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace mm {

// Scores of one row as integers of the same order: -0 as 0, and every NaN above all numbers, as torch's topk has it.
// The least integer is no score, so it can stand for one that was taken.
template <typename A>
class Chooser {
  using Key = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  static constexpr Key kTaken = std::numeric_limits<Key>::min(), kNaN = std::numeric_limits<Key>::max(),
                       kInfinity = sizeof(A) == 4 ? Key(0x7f800000) : static_cast<Key>(0x7ff0000000000000);

 public:
  explicit Chooser(int64_t experts) : keys_(experts) {}

  // The k <= experts largest, largest first; of equal ones the lower expert first.
  void choose(const A* scores, int64_t k, int32_t* chosen) {
    if (k == 0) {
      return;
    }
    const auto experts = static_cast<Key>(keys_.size());
    Key* keys = keys_.data();
    for (Key e = 0; e < experts; ++e) {
      const Key word = bits<Key>(scores[e] + A(0)), ordered = word < 0 ? word ^ kNaN : word;
      keys[e] = (word & kNaN) > kInfinity ? kNaN : ordered;
    }
    for (int64_t i = 0; i < k; ++i) {
      Key largest = kTaken, first = experts;
      for (Key e = 0; e < experts; ++e) {
        largest = keys[e] > largest ? keys[e] : largest;
      }
      for (Key e = 0; e < experts; ++e) {
        const Key here = keys[e] == largest ? e : experts;
        first = here < first ? here : first;
      }
      keys[first] = kTaken;
      chosen[i] = static_cast<int32_t>(first);
    }
  }

 private:
  std::vector<Key> keys_;
};

}  // namespace mm
