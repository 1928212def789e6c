"""Generates text with a language model: greedy or beam search by `transformers`, in batches padded on the left."""

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
    """The tokens that the model generates after each prompt, without the end of text.

    model:          a model of transformers; it is put into evaluation mode.
    end:            the end-of-text token.
    beams:          1 is greedy search; more is beam search with this many beams.
    new_tokens:     the most tokens of a text.
    length_penalty: of beam search; above 0 it favours longer texts.
    no_repeat:      n-grams of this length occur at most once; 0 turns the rule off.
    Raises ValueError if the model cannot generate, or if prompts and new tokens exceed its positions.
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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths need less padding
    texts: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = _padded([prompts[i] for i in rows], end)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), eos_token_id=end, pad_token_id=end, **search
        )
        for i, text in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
            texts[i] = text[: text.index(end)] if end in text else text
    return [texts[i] for i in range(len(prompts))]


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask (N, longest) int64, padded on the left, so that all prompts end in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def answers(
    task: Any, params: Tree, dataset: Any, *, first: int | None = None, device: torch.device | str = "cpu",
    **search: Any,
) -> tuple[list[str], list[tuple[str, ...]]]:  # fmt: skip
    """(the text that the model with these params generates for each distinct test prompt, the references of each).

    first: how many prompts; None for all.  search: arguments of `generate`.
    Merges adapters into a copy of the model first.  Raises ValueError if the data set has no prompts.
    """
    from lilliput.data.tokenizer import tokenizer
    from lilliput.models import merged

    prompts = dataset.prompts[:first]
    if not prompts:
        raise ValueError(f"{dataset.name} has no prompts to answer; generation is for data such as e2e and webnlg")
    library = tokenizer(dataset.tokenizer)
    model = merged(task.resident(params, role="evaluate", device=device))
    texts = generate(model, [prompt for prompt, _ in prompts], end=library.eos_token_id, **search)
    return [library.decode(ids).strip() for ids in texts], [references for _, references in prompts]
