"""Executors: one file a place where cells are measured."""
