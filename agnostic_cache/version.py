"""The version, which the build reads from here: a program needs no installed metadata to know it."""

__version__ = "0.1.0"
