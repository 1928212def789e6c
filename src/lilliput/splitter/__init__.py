"""Cutting any model in two: the device's part, the server's, and an auxiliary head that stands in for the server's."""

from lilliput.splitter.budget import Budget, bytes_per_round, memory
from lilliput.splitter.cutting import split
from lilliput.splitter.heads import auxiliary, check_auxiliary
from lilliput.splitter.parts import Client, Part, Payload, Server
from lilliput.splitter.places import middle
from lilliput.splitter.task import Split
from lilliput.splitter.trace import calls

__all__ = [
    "Budget", "Client", "Part", "Payload", "Server", "Split",
    "auxiliary", "bytes_per_round", "calls", "check_auxiliary", "memory", "middle", "split",
]  # fmt: skip
