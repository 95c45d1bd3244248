"""Checkpoints: complete or invisible."""
