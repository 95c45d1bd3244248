"""Measurements of megamoe beside other implementations: one layer, and whole training steps.

Contestants take turns, round after round, so that whatever else the machine does meets all of them; what is compared
are the ratios of each round, and their median is the result.
"""
