"""Data and models that ship with the project."""

#: Data set specification of the images that ship with the project.
BUNDLED = "bundled"
