"""What each of two processes does for test_parallel.py: train in several ways and leave the losses in files.

python pretraining_processes.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small import SMALL, text, without_clock

import lilliput
from lilliput.pretraining import Pretrain

WORLD = 2
GALORE = {"optimizer": "galore_adamw", "optimizer_options": {"rank": 4, "update_proj_gap": 3}}
CASES = {
    "side by side": {**GALORE, "clip": 0.5, "accumulate": 2},
    "per-layer": {**GALORE, "per_layer": True},
    "per-layer in passes": {**GALORE, "per_layer": True, "accumulate": 2},
    "per-layer in passes, clipped": {"optimizer": "lion", "lr": 1e-3, "per_layer": True, "accumulate": 2, "clip": 0.1},
    "sharded per-layer": {**GALORE, "parallel": "fsdp", "per_layer": True, "accumulate": 2},
    "sharded": {**GALORE, "parallel": "fsdp", "clip": 0.5, "accumulate": 2},
    "sharded adamw": {"parallel": "fsdp", "checkpointing": True},
}


def settings(folder: Path, case: str, **more) -> Pretrain:
    """Documents alone: their stream does not depend on the number of processes."""
    return Pretrain(**{**SMALL, "data": text(folder), "packing": False, "schedule": "constant", **CASES[case], **more})


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found = {}
    for case in CASES:
        found[case] = without_clock(lilliput.pretrain(settings(folder, case), to=folder / case).rows)
        lilliput.pretrain(settings(folder, case, steps=5), to=folder / f"{case} again")
        again = lilliput.pretrain(settings(folder, case), to=folder / f"{case} again", resume=True)
        found[f"{case} again"] = without_clock(again.rows)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.multiprocessing.spawn(process, (Path(sys.argv[1]),), WORLD)
