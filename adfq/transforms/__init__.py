"""Exact rewrites of a network: the function in full precision stays."""
