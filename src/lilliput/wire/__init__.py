"""Messages as bytes: the image of a body, its exact size, and the store of bodies between rounds."""

from lilliput.wire.image import Size, WireError, decode, encode, kinds, nbytes

__all__ = ["Size", "WireError", "decode", "encode", "kinds", "nbytes"]
