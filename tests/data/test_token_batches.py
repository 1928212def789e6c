"""Token batches: dynamic padding, labels of the next token, exact epochs that a generator decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.data.batches import pooled
from lilliput.data.token_batches import IGNORED, TokenBatches


def columns(n: int = 23, longest: int = 9) -> tuple[Tensor, Tensor]:
    """Sequences of 3 to `longest` tokens: example i begins with token i + 1, and its second half counts."""
    lengths = torch.randint(3, longest + 1, (n,), generator=torch.Generator().manual_seed(0))
    lengths[-1] = longest
    tokens = torch.arange(1, n + 1)[:, None] + 100 * torch.arange(longest)
    tokens = tokens.masked_fill(torch.arange(longest) >= lengths[:, None], 0)
    return tokens.int(), torch.stack([lengths // 2, lengths], dim=1).int()


def test_a_batch_is_padded_to_its_own_longest_and_labels_are_the_next_tokens() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 0, 0], [1, 2, 3, 0, 0, 0], [9, 9, 9, 9, 9, 9]], dtype=torch.int32)
    spans = torch.tensor([[2, 4], [1, 3], [5, 6]], dtype=torch.int32)
    first, last = TokenBatches((tokens, spans), 2).epoch(None)
    assert {name: x.tolist() for name, x in first.items()} == {
        "input_ids": [[5, 6, 7], [1, 2, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[IGNORED, 7, 8], [2, 3, IGNORED]],
    }
    assert last["labels"].tolist() == [[IGNORED] * 4 + [9]]
    assert all(x.dtype == torch.int64 for x in first.values())


@pytest.mark.parametrize("bucket", [1, 2, 100])
def test_an_epoch_has_every_example_once_in_an_order_of_the_generator(bucket: int) -> None:
    batches = TokenBatches(columns(), 4, bucket=bucket)

    def epoch(seed: int | None) -> list[Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [batch["input_ids"][:, 0] for batch in batches.epoch(generator)]

    drawn = epoch(7)
    assert len(drawn) == len(batches) == 6
    assert torch.cat(drawn).sort().values.tolist() == list(range(1, 24))
    assert all(torch.equal(a, b) for a, b in zip(drawn, epoch(7), strict=True))
    assert torch.cat(drawn).tolist() != torch.cat(epoch(8)).tolist()
    if bucket == 1:
        assert torch.cat(epoch(None)).tolist() == list(range(1, 24))


def test_buckets_pad_less() -> None:
    def padding(bucket: int) -> int:
        drawn = TokenBatches(columns(200, 60), 4, bucket=bucket).epoch(torch.Generator().manual_seed(0))
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in drawn)

    assert padding(50) < padding(5) / 2 < padding(1) / 3


def test_centralised_data_are_shuffled_together() -> None:
    parts = [TokenBatches(columns(), 4, index=torch.arange(i, 23, 2)) for i in range(2)]
    whole = pooled(parts)
    assert isinstance(whole, TokenBatches)
    first = next(iter(whole.epoch(torch.Generator().manual_seed(0))))["input_ids"][:, 0]
    assert whole.examples == 23
    assert len({int(i) % 2 for i in first}) == 2


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "bucket": 0}])
def test_sizes_are_positive(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is 0; it must be at least 1"):
        TokenBatches(columns(), **options)


def test_clients_of_one_data_set_share_its_columns() -> None:
    """What is pooled of them is their rows, and never a copy of the columns."""
    both = columns()
    parts = [TokenBatches(both, 4, index=index) for index in (torch.tensor([3, 5]), torch.tensor([0, 1, 22]))]
    whole = pooled(parts)
    assert isinstance(whole, TokenBatches) and whole._columns[0] is both[0] and whole.examples == 5
    assert [b["input_ids"][:, 0].tolist() for b in whole.epoch(None)] == [[4, 6, 1, 2], [23]]
    apart = pooled([parts[0], TokenBatches([x.clone() for x in both], 4, index=torch.tensor([0, 1, 22]))])
    assert [b["input_ids"].tolist() for b in apart.epoch(None)] == [b["input_ids"].tolist() for b in whole.epoch(None)]
