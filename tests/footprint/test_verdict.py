"""What to change where memory is too little."""

import pytest
import torch

from lilliput import footprint
from lilliput.footprint.sizes import available, show

pytest.importorskip("transformers")

LLAMA = {"model_options": {"layers": 4, "hidden": 128, "mlp": 344, "vocabulary": 2000}, "max_length": 128}


def advice(memory: object, **settings: object) -> str:
    return footprint.advice("llama_9m", memory, **{**LLAMA, **settings})


def test_what_fits_is_said_to_fit():
    found = footprint.estimate("llama_9m", **LLAMA)
    assert advice(found.peak) == (
        f"llama_9m with adamw needs {show(found.peak)} and there are {show(found.peak)}: it fits, with 0 B to spare"
    )


def test_each_option_that_helps_is_named_with_what_it_would_need():
    stock = footprint.estimate("llama_9m", **LLAMA, lean=False).peak
    lean = footprint.estimate("llama_9m", **LLAMA).peak
    told = advice(lean, lean=False)
    assert f"{show(stock - lean)} too few" in told
    assert f"lean=true ({show(lean)})" in told and told.endswith("would make it fit")


def test_options_join_where_none_is_enough():
    both = footprint.estimate("llama_9m", **LLAMA, optimizer="galore_adamw8bit", optimizer_options={"rank": 16},
                              dtype="bf16", batch_size=1, per_layer=True).peak  # fmt: skip
    told = advice(both, optimizer="galore_adamw", optimizer_options={"rank": 16})
    assert " or " not in told and told.endswith("would make it fit")
    assert {"dtype=bf16", "batch_size=1"} <= set(told.split())


def test_sometimes_nothing_helps():
    assert "none of the options makes it fit: take a smaller model" in advice("1MB")


def test_a_check_refuses_before_anything_is_allocated():
    with pytest.raises(ValueError, match=r"llama_3b with adamw needs .* GB and there are 8.00 GB, .* too few"):
        footprint.check("llama_3b", "8GB", dtype="bf16", batch_size=1, checkpointing=True, lean=True)
    assert footprint.check("llama_9m", "10GB", **LLAMA) == footprint.estimate("llama_9m", **LLAMA)


def test_weights_that_are_there_are_not_needed_again(monkeypatch):
    model = torch.nn.Linear(1000, 1000)
    need = footprint.estimate(model, shape=(1000,), device="cpu", batch_size=1).peak
    monkeypatch.setattr(footprint, "available", lambda device: need - 4_004_000)
    assert footprint.check(model, shape=(1000,), device="cpu", batch_size=1) is not None
    monkeypatch.setattr(footprint, "available", lambda device: need - 4_004_001)
    with pytest.raises(ValueError, match="Linear with adamw needs"):
        footprint.check(model, shape=(1000,), device="cpu", batch_size=1)


def test_an_estimate_that_fails_warns(monkeypatch):
    class Odd(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.detach().numpy().shape[0]  # a step without numbers has no array of them

    with pytest.warns(UserWarning, match="how much memory Odd needs cannot be told beforehand"):
        assert footprint.check(Odd(8, 4), "1GB", shape=(8,), device="cpu", batch_size=1) is None


def test_this_machine_has_memory():
    assert available("cpu") > 0
    assert available("meta") is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 0}, "batch_size is 0; give a whole number above 0"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size=8 does not divide into accumulate=3 passes"),
        ({"dtype": "bf16", "precision": "bf16"}, "precision=bf16 does nothing to bf16 weights"),
        ({"optimizer": "galore_adam"}, "unknown optimizer 'galore_adam'; did you mean 'galore_adamw'"),
        ({"optimizer_options": {"rank": 3}}, "optimizer adamw has no option 'rank'"),
        ({"max_length": 4096}, "max_length=4096 exceeds the 1024 positions of the model"),
        ({"optimizer": "galore_adamw", "optimizer_options": {"rank": 4096}}, "lower the rank"),
        ({"optimizer": "sgd", "per_layer": True}, "per_layer=true works with our own optimizers, not SGD"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        footprint.estimate("llama_9m", **settings)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'24 apples' is no size"):
        footprint.estimate("llama_9m", **LLAMA).fits("24 apples")
