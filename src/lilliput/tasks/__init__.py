"""Tasks: a model, its loss and its metrics."""

from lilliput.tasks.recompute import checkpointed, frozen_norms
from lilliput.tasks.supervised import Derived, Supervised, accuracy, cross_entropy, perplexity

__all__ = ["Derived", "Supervised", "accuracy", "checkpointed", "cross_entropy", "frozen_norms", "perplexity"]
