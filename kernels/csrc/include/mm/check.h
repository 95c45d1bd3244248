// Errors of the ops. Standard library only, so that the emulator's programs can use it too.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mm {

// Everything that can be streamed, in one string: text("int32 [", rows, "]").
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Torch hands a std::runtime_error to Python as RuntimeError, with this text and nothing added.
[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& got, const std::string& expected) {
  throw std::runtime_error(
      text("megamoe::", op, ": argument ", argument, " cannot be used.\n  got: ", got, "\n  expected: ", expected));
}

}  // namespace mm

// MM_CHECK(k >= 1, "plan", "experts", mm::text(k, " choices"), "at least one"): `got` and `expected` are strings, made
// only when the condition does not hold.
#define MM_CHECK(condition, op, argument, got, expected)  \
  do {                                                    \
    if (!(condition)) [[unlikely]] {                      \
      ::mm::fail(op, argument, got, expected);            \
    }                                                     \
  } while (false)
