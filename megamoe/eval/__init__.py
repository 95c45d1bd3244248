"""Measuring trained models, and letting them write."""
