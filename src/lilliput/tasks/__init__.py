"""Tasks: a model, its loss and its metrics."""

from lilliput.tasks.recompute import checkpointed, frozen_norms
from lilliput.tasks.split import Split
from lilliput.tasks.supervised import Supervised, accuracy, cross_entropy

__all__ = ["Split", "Supervised", "accuracy", "checkpointed", "cross_entropy", "frozen_norms"]
