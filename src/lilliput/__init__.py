"""lilliput trains one model across devices too small for it."""

__version__ = "0.1.0"
