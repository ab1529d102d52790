"""Executors, one file for each place where cells are measured."""
