"""Calling a network: forward, layers and hooks, the graph and its cut, the guard of its state, ART classifiers."""
