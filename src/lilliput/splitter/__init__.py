"""Cutting any model in two: the device's part, the server's, and an auxiliary head that stands in for the server's."""

from lilliput.splitter.cutting import split
from lilliput.splitter.parts import Client, Part, Payload, Server
from lilliput.splitter.trace import calls

__all__ = ["Client", "Part", "Payload", "Server", "calls", "split"]
