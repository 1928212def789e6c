"""The sizes of LLaMA (Touvron et al., 2023) on which papers compare low-rank training, as arguments of `LlamaConfig`.

They come from the published programs of GaLore, Online Subspace Descent and FedSub.  All other arguments are the
library's defaults: RMSNorm with 1e-6, weights normal with std 0.02, an untied output layer.
"""

from __future__ import annotations


def _size(
    hidden: int, mlp: int, layers: int, heads: int, vocabulary: int = 32000, positions: int = 1024
) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocabulary, "max_position_embeddings": positions,
    }  # fmt: skip


LLAMA: dict[str, dict[str, int]] = {
    "9m": _size(128, 352, 4, 4),
    "20m": _size(256, 688, 4, 4),
    "35m": _size(384, 1024, 6, 8),
    "40m": _size(416, 1024, 8, 8),
    "60m": _size(512, 1376, 8, 8),
    "71m": _size(512, 1368, 12, 8),
    "100m": _size(640, 1708, 12, 10, vocabulary=32100),
    "130m": _size(768, 2048, 12, 12),
    "250m": _size(768, 2560, 24, 16),
    "350m": _size(1024, 2736, 24, 16),
    "1b": _size(2048, 5461, 24, 32),
    "3b": _size(2560, 6848, 32, 32),
    "7b": _size(4096, 11008, 32, 32, positions=2048),
}
