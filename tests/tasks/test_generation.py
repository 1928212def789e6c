"""Generation: greedy search is argmax, batches change nothing, beams find likelier texts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from lilliput.models import pretrained
from lilliput.tasks.generation import generate

pytest.importorskip("transformers")
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [3]]
END = 49


@pytest.fixture(params=["gpt2", "llama_9m"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = pretrained(request.param, layers=2, hidden=32, heads=2, mlp=64, vocabulary=50, positions=40)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3) if p.dim() > 1 else None  # so that what comes next depends on what came before
    return made.eval()


def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long())["logits"][0]


def likelihood(model: nn.Module, prompt: list[int], said: list[int]) -> float:
    whole = [*prompt, *said, END]
    each = logits(model, whole).log_softmax(-1)[range(len(whole) - 1), whole[1:]]
    return float(each[len(prompt) - 1 : len(prompt) - 1 + len(said)].sum())


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_greedy_is_the_likeliest_token_each_time(model: nn.Module, batch_size: int) -> None:
    found = generate(model, PROMPTS, end=END, new_tokens=6, batch_size=batch_size)
    for prompt, said in zip(PROMPTS, found, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and (best := int(logits(model, [*prompt, *expected])[-1].argmax())) != END:
            expected.append(best)
        assert said == expected


def test_beams_find_likelier_texts(model: nn.Module) -> None:
    greedy, beams = (generate(model, PROMPTS, end=END, new_tokens=4, beams=k) for k in (1, 8))
    gains = [
        likelihood(model, prompt, wide) - likelihood(model, prompt, narrow)
        for prompt, wide, narrow in zip(PROMPTS, beams, greedy, strict=True)
        if len(wide) == len(narrow) == 4
    ]
    assert min(gains) > -1e-4
    assert max(gains) > 1e-3


def test_a_text_ends_at_its_end(model: nn.Module) -> None:
    first = generate(model, PROMPTS[:1], end=END, new_tokens=3)[0]
    assert generate(model, PROMPTS[:1], end=first[0], new_tokens=3) == [[]]


def test_no_repeat_repeats_no_pair(model: nn.Module) -> None:
    said = generate(model, [[1]], end=END, new_tokens=20, no_repeat=2)[0]
    pairs = list(pairwise(said))
    assert len(set(pairs)) == len(pairs)


def test_what_cannot_be_written_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="5 tokens and 36 new ones exceed the model's 40 positions; choose at most 35"):
        generate(model, PROMPTS, end=END, new_tokens=36)
    with pytest.raises(ValueError, match="Linear cannot write text"):
        generate(nn.Linear(1, 1), PROMPTS, end=END)
