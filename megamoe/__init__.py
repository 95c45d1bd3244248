"""megamoe: trains and fine-tunes Mixture-of-Experts language models whose experts choose well."""

__version__ = "0.1.0"
