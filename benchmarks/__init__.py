"""Runners, tables and data that measure quantization methods."""
