"""A training step of a language model that keeps less and takes less: the same results, by `patch` and `loss`."""

from lilliput.lean.modules import patch, patched, unpatch
from lilliput.lean.step import activations, loss
from lilliput.lean.tokens import cross_entropy

__all__ = ["activations", "cross_entropy", "loss", "patch", "patched", "unpatch"]
