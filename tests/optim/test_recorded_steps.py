"""Steps that the published programs took, replayed in official mode: weights and projections to 1e-5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lilliput import optim
from lilliput.optim.lowbit import codebook, dequantise, quantise

CLASSES = {
    "AdamW": optim.GaLoreAdamW,
    "Adafactor": optim.GaLoreAdafactor,
    "GaLoreLion": optim.GaLoreLion,
    "GaLoreAdamW8bit": optim.GaLoreAdamW8bit,
}
FILES = [
    "galore_adamw_std", "galore_adamw_left", "galore_adafactor_std", "galore_adamw8bit_std",
    "osd_adamw_continuous", "osd_adamw_continuous_sgd", "osd_adafactor_continuous", "osd_lion_continuous",
]  # fmt: skip


class Recording:
    """One recorded run, its parameters and our optimizer for them."""

    def __init__(self, path: Path):
        self.data = load_file(path)
        with safe_open(path, "pt") as file:
            self.meta = file.metadata()
        self.params = {k[:-3]: torch.nn.Parameter(x.clone()) for k, x in self.data.items() if k.endswith(".w0")}
        self.projected = [k for k in self.params if f"{k}.P" in self.data]
        self.steps = int(self.meta["steps"])
        self.optimizer = self._optimizer()

    def _optimizer(self):
        meta = self.meta
        names = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str}
        group = {"params": [self.params[k] for k in self.projected], **{k: f(meta[k]) for k, f in names.items()}}
        rest = [p for k, p in self.params.items() if k not in self.projected]
        extra = (
            json.loads(meta["extra"])
            if "extra" in meta
            else {k: json.loads(meta[k]) for k in ("betas", "eps", "weight_decay")}
        )
        lr = float(meta.get("base_lr") or meta["lr"])
        return CLASSES[meta["optimizer"]](
            [group, *([{"params": rest}] if rest else [])], lr=lr, compat="official", **extra
        )

    def step(self, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.data["lr"][t]) if "lr" in self.data else group["lr"]
        for k, p in self.params.items():
            p.grad = self.data[f"{k}.grads"][t].clone()
        self.optimizer.step()

    def state(self, k: str) -> dict:
        return self.optimizer.state[self.params[k]]

    def error(self, t: int) -> float:
        return max(float((p.detach() - self.data[f"{k}.w"][t]).abs().max()) for k, p in self.params.items())


@pytest.fixture(params=FILES)
def recording(request, shared) -> Recording:
    return Recording(shared / "golden/subspace" / f"{request.param}.safetensors")


def force_state(run: Recording, k: str, t: int) -> None:
    """The recorded projection of step t and, for 8-bit states, the codes after step t - 1."""
    run.state(k)["P"] = run.data[f"{k}.P"][t].clone()
    if t and f"{k}.state1" in run.data:
        for name, i in (("exp_avg", 1), ("exp_avg_sq", 2)):
            run.state(k)[name] = run.data[f"{k}.state{i}"][t - 1].clone()
            run.state(k)[f"{name}_absmax"] = run.data[f"{k}.absmax{i}"][t - 1].clone()


def test_weights_and_projections_follow_the_recorded_ones(recording):
    for t in range(recording.steps):
        for k in recording.projected:
            force_state(recording, k, t)
        recording.step(t)
        assert recording.error(t) < 1e-5
        for k in recording.projected:
            if f"{k}.P_final" in recording.data:
                after = recording.data[f"{k}.P"][t + 1] if t + 1 < recording.steps else recording.data[f"{k}.P_final"]
                assert (recording.state(k)["P"] - after).abs().max() < 1e-5


def test_moments_follow_the_recorded_ones(recording):
    for t in range(recording.steps):
        for k in recording.projected:
            force_state(recording, k, t)
        recording.step(t)
        for k in recording.params:
            for name in ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
                if f"{k}.{name}" in recording.data:
                    torch.testing.assert_close(
                        recording.state(k)[name], recording.data[f"{k}.{name}"][t], atol=1e-5, rtol=1e-5
                    )


@pytest.mark.parametrize("name", [f for f in FILES if f.startswith("osd_")])
def test_online_pca_runs_freely_as_recorded(name, shared):
    """P starts at the decomposition of the first gradient and learns by itself; signs of rows are free."""
    run = Recording(shared / "golden/subspace" / f"{name}.safetensors")
    for t in range(run.steps):
        run.step(t)
        for k in run.projected:
            if t == 0:
                ours, recorded = run.state(k)["P"].clone(), run.data[f"{k}.P"][0]
                rows = 1 if ours.shape[0] == 4 else 0
                assert ((ours * recorded).sum(rows).abs() - 1).abs().max() < 1e-4
        assert run.error(t) < 1e-5


def test_a_refresh_by_svd_spans_the_recorded_subspace(shared):
    run = Recording(shared / "golden/subspace/galore_adamw_std.safetensors")
    for t in range(run.steps):
        run.step(t)
        for k in run.projected:
            ours, recorded = run.state(k)["P"], run.data[f"{k}.P"][t]
            ours, recorded = (x if x.shape[0] == 4 else x.mT for x in (ours, recorded))
            assert torch.linalg.matrix_norm(ours.mT @ ours - recorded.mT @ recorded) < 1e-4


def test_eight_bit_blocks_are_the_recorded_format(shared):
    data = load_file(shared / "golden/subspace/blockwise8bit.safetensors")
    for signed, x, suffix in ((True, "x", ""), (False, "x_pos", "_pos")):
        torch.testing.assert_close(
            codebook(signed), data[f"codebook_{'signed' if signed else 'unsigned'}"], atol=1e-7, rtol=1e-6
        )
        codes, absmax = quantise(data[x], signed)
        torch.testing.assert_close(absmax, data[f"absmax{suffix}"], atol=0, rtol=0)
        torch.testing.assert_close(
            dequantise(data[f"q{suffix}"], absmax, signed), data[f"deq{suffix}"], atol=1e-7, rtol=1e-6
        )
        apart = (codes.int() - data[f"q{suffix}"].int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02
