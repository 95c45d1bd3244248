"""What tests and benchmarks share: functions run on gloo ranks, and comparisons that say where they fail."""

from megamoe.testing.ranks import RankError, RankTimeout, run_ranks
from megamoe.testing.tolerance import assert_close, assert_equal_bits, max_rel_error

__all__ = ["RankError", "RankTimeout", "assert_close", "assert_equal_bits", "max_rel_error", "run_ranks"]
