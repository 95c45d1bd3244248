"""The decoder-only transformer."""
