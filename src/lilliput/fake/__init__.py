"""Tensors without values: what a model computes, what it allocates and what it sends, at no cost of memory.

There are three kinds, each for what the one before cannot do:

meta:        torch's own, on the device "meta".  Enough where a model is only asked for shapes.
fake:        torch's `FakeTensor`: says that it is on a device, and computes beside real tensors under the mode `Fake`.
             For whole runs of real code, whose bytes, FLOPs and memory are wanted.
placeholder: needs no mode, is copied and pickled, and knows what it depends on.  For what a part of a model lacks.
"""

from lilliput.fake.mode import Fake
from lilliput.fake.placeholder import Placeholder
from lilliput.fake.tensors import Copies, copied, is_fake, like, meta

__all__ = ["Copies", "Fake", "Placeholder", "copied", "is_fake", "like", "meta"]
