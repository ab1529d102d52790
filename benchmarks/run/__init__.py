"""Measurement of cells: one cell, its cost, a schedule of cells, and the store of records."""
