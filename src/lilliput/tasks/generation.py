"""Writing texts with a language model: greedy or beam search by `transformers`, over batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core.tree import Tree


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, end: int, beams: int = 1, new_tokens: int = 64,
    batch_size: int = 16, length_penalty: float = 1.0, no_repeat: int = 0,
) -> list[list[int]]:  # fmt: skip
    """The tokens that the model writes after each prompt, without the end of text.

    model:          of transformers, in whatever mode; it is put to evaluation.
    end:            the token at which a text ends.
    beams:          1 is greedy; more keep that many texts in sight.
    new_tokens:     how many tokens a text has at most.
    length_penalty: of beam search; above 0 longer texts are favoured.
    no_repeat:      n-grams of this length occur once; 0 for no such rule.
    Raises ValueError for a model that writes nothing, and for prompts that leave no room in its positions.
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} cannot write text; generation is for causal models of transformers")
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if most is not None and longest + new_tokens > most:
        raise ValueError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's {most} positions; "
            f"choose at most {most - longest} new tokens"
        )
    device = next(model.parameters()).device
    search: dict[str, Any] = {"num_beams": beams, "do_sample": False, "max_new_tokens": new_tokens, "use_cache": True}
    search |= {"length_penalty": length_penalty} if beams > 1 else {}
    search |= {"no_repeat_ngram_size": no_repeat} if no_repeat else {}
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: less padding
    said: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = _padded([prompts[i] for i in rows], end)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), eos_token_id=end, pad_token_id=end, **search
        )
        for i, text in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
            said[i] = text[: text.index(end)] if end in text else text
    return [said[i] for i in range(len(prompts))]


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask (N, longest) int64, padded on the left, so that all prompts end at the same place."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def answers(
    task: Any, params: Tree, dataset: Any, *, first: int | None = None, device: torch.device | str = "cpu",
    **search: Any,
) -> tuple[list[str], list[tuple[str, ...]]]:  # fmt: skip
    """(what the model with these params says to each distinct prompt of the test set, what may be said).

    first: how many prompts; all for None.  search: as for `generate`.
    Adapters are merged into a copy of the model before it writes.
    """
    from lilliput.data.tokenizer import tokenizer
    from lilliput.models import merged

    prompts = dataset.prompts[:first]
    if not prompts:
        raise ValueError(f"{dataset.name} has no prompts to answer; generation is for data such as e2e and webnlg")
    library = tokenizer(dataset.tokenizer)
    model = merged(task.resident(params, role="evaluate", device=device))
    said = generate(model, [prompt for prompt, _ in prompts], end=library.eos_token_id, **search)
    return [library.decode(ids).strip() for ids in said], [references for _, references in prompts]
