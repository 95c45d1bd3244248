"""Checkpoints looked at, checked and written anew, without an engine."""
