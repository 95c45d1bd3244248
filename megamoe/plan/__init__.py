"""Predictions of step time: an event model of one MoE layer and of one optimizer step, and its pictures. No torch."""
