"""Training: set-up, engine, loop, checkpoints."""
