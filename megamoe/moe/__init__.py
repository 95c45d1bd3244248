"""The Mixture-of-Experts layer: route, dispatch, compute, combine."""
