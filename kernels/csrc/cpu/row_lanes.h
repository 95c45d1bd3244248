// Rows that are worked on eight columns at a time, their last columns with zeros beside them.
#pragma once

#include "lanes.h"

namespace mm {

// At most eight of the `count` elements that are left of a row. What an element becomes does not depend on where it
// stands: a row's end goes through the same instructions.
template <typename T>
inline Lanes<Wide<T>> load_up_to(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_first(from, count);
}

template <typename T>
inline void store_up_to(T* to, const Lanes<Wide<T>>& lanes, int64_t count) {
  count >= kLanes ? store(to, lanes) : store_first(to, lanes, count);
}

// How many rows of this width are worth a thread: about 32 thousand elements.
inline int64_t rows_per_task(int64_t width) { return width < 32768 ? 32768 / (width > 0 ? width : 1) : 1; }

}  // namespace mm
