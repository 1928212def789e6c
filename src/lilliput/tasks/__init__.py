"""Tasks: a model, its loss and its metrics."""

from lilliput.tasks.recompute import checkpointed, frozen_norms
from lilliput.tasks.supervised import Supervised, accuracy, cross_entropy

__all__ = ["Supervised", "accuracy", "checkpointed", "cross_entropy", "frozen_norms"]
