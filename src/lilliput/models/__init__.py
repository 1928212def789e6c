"""Models by name: one file per architecture, each with a plain `nn.Module` that maps a batch to logits.

>>> build("cnn", shape=(3, 32, 32), classes=10)
"""

from lilliput.models.adapters import lora, merged
from lilliput.models.llama import LLAMA
from lilliput.models.registry import MODELS, build, names
from lilliput.models.transformers import check_language, pretrained
from lilliput.models.weights import load_weights

__all__ = ["LLAMA", "MODELS", "build", "check_language", "load_weights", "lora", "merged", "names", "pretrained"]
