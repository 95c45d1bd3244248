"""Other implementations of the same permutation, one file each. Run one: `python -m kernels.bench.peers.run NAME`."""
