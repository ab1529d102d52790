"""Data and models that ship with the project."""
