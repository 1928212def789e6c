"""A model of one piece, cut for the split methods: its names, its tied tensors, its adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches, network
from torch import nn

import lilliput
from lilliput import models
from lilliput.algorithms import CseFsl, FedAvg, FslSage, SplitFedV1, SplitFedV2
from lilliput.splitter import Split


def run(algorithm: Any, on: Any, data: Any, rounds: int = 2, **options: Any) -> Any:
    return lilliput.Experiment(algorithm, on, data, rounds=rounds, **options).run("sequential")


def gpt2(layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": layers, "n_head": 2}
    quiet = {f"{kind}_pdrop": 0.0 for kind in ("resid", "embd", "attn")}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet, **ends))


def sentences(clients: int = 2) -> dict[int, list[dict[str, torch.Tensor]]]:
    """Each client's two batches, of different length, the first word counting for nothing."""
    rng = torch.Generator().manual_seed(1)

    def batch(length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(20, (2, length + 1), generator=rng)
        labels = ids[:, 1:].clone()
        labels[:, 0] = -100
        return {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(labels), "labels": labels}

    return {c: [batch(4), batch(5 + c)] for c in range(clients)}


def cut(model: Any = None, **options: Any) -> Split:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Split.of(gpt2() if model is None else model, "transformer.h.1", **options)


def test_parameters_are_called_as_in_the_model() -> None:
    model = network()
    on = Split.of(model, "2", example=torch.randn(4, 6))
    assert on.init()["params"].keys() == dict(model.named_parameters()).keys()
    parts = [set(part.init()["params"]) for part in (on.client_part, on.server_part)]
    assert parts == [{"0.weight", "0.bias", "1.weight", "1.bias"}, {"3.weight", "3.bias"}]
    settings = {"lr": 0.1, "local_epochs": 2}
    a, b = (run(method(**settings), on, batches()) for method in (SplitFedV1, FedAvg))
    assert_same_state(a.state, b.state)


def test_a_pair_of_places_is_a_u_shape() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    on = Split.of(model, ("1", "4"), example=torch.randn(4, 6))
    assert on.tail_part is not None and set(on.tail_part.init()["params"]) == {"4.weight", "4.bias"}
    a, b = (run(method(lr=0.1), on, batches()) for method in (SplitFedV1, FedAvg))
    assert_same_state(a.state, b.state)


def test_untied_tensors_are_two_for_every_method() -> None:
    on = cut(tied="untie")
    assert {"lm_head.weight", "transformer.wte.weight"} <= on.init()["params"].keys()
    a, b = (run(method(lr=0.1), on, sentences()) for method in (SplitFedV1, FedAvg))
    assert_same_state(a.state, b.state)


def test_frozen_tied_tensors_are_in_no_traffic() -> None:
    on = cut(tied="frozen")
    assert not {"lm_head.weight", "transformer.wte.weight"} & on.init()["params"].keys()
    assert_same_state(*(run(method(lr=0.1), on, sentences()).state for method in (SplitFedV1, FedAvg)))


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("method", [SplitFedV1, SplitFedV2])
def test_synchronised_tensors_take_the_sum_of_both_changes(method: type, decay: float, tmp_path: Path) -> None:
    """One step of SGD: the sum of the two gradients is the tied tensor's, so the round is FedAvg's; it decays once."""
    on, data = cut(tied="sync"), {0: sentences()[0]}
    settings = {"lr": 0.1, "local_steps": 1, "weight_decay": decay}
    a = run(method(**settings), on, data, rounds=1, folder=tmp_path)
    b = run(FedAvg(**settings), on, data, rounds=1)
    assert a.state["params"].keys() == b.state["params"].keys()
    for name, x in b.state["params"].items():
        torch.testing.assert_close(a.state["params"][name], x, atol=1e-7, rtol=0)
    calls = json.loads((tmp_path / "ledger.jsonl").read_text())["calls"]
    table = 4 * 20 * 8
    assert sum(c["down"].get("tied", 0) for c in calls) == sum(c["up"].get("tied_delta", 0) for c in calls) == table
    params = 4 * sum(x.numel() for n, x in on.client_part.init()["params"].items() if n != "transformer.wte.weight")
    assert sum(c["down"].get("params", 0) for c in calls) == params


@pytest.mark.parametrize("method", [CseFsl, FslSage])
def test_methods_without_a_common_gradient_refuse_to_synchronise(method: type) -> None:
    with pytest.raises(ValueError, match="no common gradient; cut with tied='untie' or 'frozen'"):
        run(method(), cut(tied="sync", auxiliary=Head()), sentences())


def test_a_norm_over_tied_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="at both ends; cut with tied='untie' or 'frozen', or use no clip"):
        run(SplitFedV1(clip=1.0), cut(tied="sync"), sentences())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 20)

    def forward(self, payload: Any) -> torch.Tensor:
        return self.out(payload["hidden_states"] if isinstance(payload, dict) else payload)


@pytest.mark.parametrize("method", [SplitFedV1, SplitFedV2, CseFsl, FslSage])
def test_adapters_alone_travel(method: type, tmp_path: Path) -> None:
    """2 x clients x adapter bytes a round: rank 2 on the fused projection of 8 x 24 of one block on the device."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    on = cut(peft.get_peft_model(gpt2(), config), auxiliary=Head(), tied="frozen")
    assert all("lora" in name for name in on.init()["params"])
    run(method(lr=0.1), on, sentences(), folder=tmp_path)
    adapters = 4 * (2 * 8 + 24 * 2)
    for line in (tmp_path / "ledger.jsonl").read_text().splitlines():
        calls = json.loads(line)["calls"]
        model = [("down", "params"), ("down", "buffers"), ("up", "delta"), ("up", "buffer_delta")]
        assert sum(c[way].get(kind, 0) for c in calls for way, kind in model) == 2 * 2 * adapters


def test_a_head_derived_from_the_server_trains() -> None:
    on = cut(auxiliary=1, tied="frozen")
    assert on.auxiliary_part is not None
    assert all(name.startswith("auxiliary.") for name in on.auxiliary_part.init()["params"])
    history = run(FslSage(lr=0.1, align_epochs=2), on, sentences())
    assert "auxiliary" in history.state and history.rows[-1]["dropped"] == 0


def test_frozen_weights_are_one_in_memory_and_trained_ones_are_not() -> None:
    on = cut(tied="frozen")
    params = on.server_part.init()["params"]
    a, b = (dict(on.server_part.resident(params, role=role).named_parameters()) for role in ("a", "b"))
    assert a["lm_head.weight"].data_ptr() == b["lm_head.weight"].data_ptr()
    assert all(a[name].data_ptr() != b[name].data_ptr() for name in params)


def test_a_resnet_cut_by_name_trains_as_a_whole_to_the_last_bit() -> None:
    """Convolutions in channels_last and BatchNorm on both sides of the cut, running statistics included."""
    on = Split.of(models.build("resnet10", shape=(3, 8, 8), classes=3, width=4, stem="cifar"), "layer2")
    rng = torch.Generator().manual_seed(0)
    batch = lambda: (torch.randn(4, 3, 8, 8, generator=rng), torch.randint(3, (4,), generator=rng))  # noqa: E731
    data = {c: [batch() for _ in range(1 + c)] for c in range(2)}
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "optimizer_state": "keep"}
    assert_same_state(*(run(method(**settings), on, data).state for method in (SplitFedV1, FedAvg)))
