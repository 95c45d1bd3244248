"""Studies: several arms trained over several seeds with equal tokens, compared in pairs of the same seed."""
