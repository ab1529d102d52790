"""Measuring: one cell, its cost, a schedule of cells, where records are kept."""
