"""Configuration: settings from `key=value` words, files and Python, read against the dataclasses they configure."""

from lilliput.config.layers import flat, from_file, words
from lilliput.config.reader import changed, expanded, settings
from lilliput.config.settings import Settings

__all__ = ["Settings", "changed", "expanded", "flat", "from_file", "settings", "words"]
