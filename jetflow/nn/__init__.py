"""Transformer nets: the bidirectional encoder of Jet and the causal, cached one of TarFlow."""
