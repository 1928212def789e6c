"""The product of ways in which two processes take a step together; each leaves the weights that it came to in a file.

python product_processes.py FOLDER NUMBER...
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small import SMALL
from torch import Tensor

import lilliput
from lilliput.core.labels import IGNORED
from lilliput.pretraining import network
from lilliput.pretraining.parallel import Sums, World
from lilliput.pretraining.run import Run
from lilliput.training.passes import separate

WORLD = 2
EPS = {"eps": 0.01}  # so large that a gradient of another size moves weights otherwise
RANK = {"rank": 2, "update_proj_gap": 2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9}, "torch.optim:Adagrad": EPS, "adamw": EPS, "adamw8bit": EPS, "adafactor": {}, "lion": {},
    "galore_adamw": {**RANK, **EPS}, "fira": {**RANK, **EPS}, "apollo": {**RANK, **EPS},
    "galore_adafactor": RANK, "online_subspace_adamw": {**RANK, **EPS},
}  # fmt: skip
SILENT = "x"  # documents that begin with it have no labels that count


def cases() -> list[dict[str, Any]]:
    """All that is not refused."""
    found = []
    for optimizer, parallel, per_layer, accumulate, clip in product(
        OPTIMIZERS, ("ddp", "fsdp"), (False, True), (1, 2), (None, 0.05)
    ):
        foreign = optimizer in ("sgd", "torch.optim:Adagrad") and (per_layer or parallel == "fsdp")
        if not foreign and not (per_layer and clip and parallel == "fsdp"):
            found.append({"optimizer": optimizer, "parallel": parallel, "per_layer": per_layer,
                          "accumulate": accumulate, "clip": clip})  # fmt: skip
    return found


def plainly(case: dict[str, Any]) -> dict[str, Any]:
    """The same step at its simplest: one process, one pass, and all updates after it, but that clip is each layer's."""
    return {**case, "parallel": "ddp", "accumulate": 1, "per_layer": case["per_layer"] and case["clip"] is not None}


def trained(folder: Path, case: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    """The weights after four steps."""
    options = OPTIMIZERS[case["optimizer"]]
    same = {"packing": False, "shuffle": 0, "warmup": 0, "steps": 4, "lr": 0.02, "eval_tokens": 1}
    given = {"data": text(folder), "validation": text(folder), "optimizer_options": options}
    return network.tensors(lilliput.pretrain(**{**SMALL, **same, **given, **case, **more}).model)


def text(folder: Path) -> str:
    """Documents of 1 to 30 letters: even ones go to the first process, odd ones, many of them silent, to the other."""
    file = folder / "uneven.jsonl"
    if not file.exists():
        rows = [(SILENT if n % 2 and n % 8 > 3 else "a") + "split slice train wire round client"[: 7 * n % 31]
                for n in range(64)]  # fmt: skip
        file.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return str(file)


def silenced(seen: list[int]) -> None:
    """Let labels of silent documents not count; `seen` gets how many do, by pass."""
    part = Run._part

    def _part(run: Run) -> Any:
        batch, _ = part(run)
        batch["labels"][batch["input_ids"][:, 0] == ord(SILENT) + 3] = IGNORED
        seen.append(int((batch["labels"] != IGNORED).sum()))
        return batch, seen[-1]

    Run._part = _part  # type: ignore[method-assign]


def in_one_memory(world: World, passes: int) -> list[Tensor]:
    """The summed gradients of some passes of a loss times 1 and times 2, for weights whose views are added."""
    a, b = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    sums = Sums([a, b], world)
    for left in reversed(range(passes)):
        sums.begin(left)
        ((a.view(2, 2) + b.view(2, 2)) * (world.rank + 1)).sum().backward()
        if left:
            separate([a, b])
    sums.complete()
    return [p.grad for p in (a, b)]  # type: ignore[misc]


def process(rank: int, folder: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    silenced(seen := [])
    found = {str(n): trained(folder, cases()[n]) for n in numbers}
    shared = [in_one_memory(World(rank, WORLD), passes) for passes in (1, 2)]
    torch.save({"weights": found, "seen": seen, "shared": shared}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.multiprocessing.spawn(process, (Path(sys.argv[1]), [int(n) for n in sys.argv[2:]]), WORLD)
