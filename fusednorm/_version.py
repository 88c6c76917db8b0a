"""The version, in one place: setup.py hands it to the C code."""

__version__ = "0.1.0"
