"""Two processes that go on with a run whose log is damaged: each leaves in a file how it ended.

python refusing_processes.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small import SMALL, text

import lilliput
from lilliput.pretraining import Pretrain


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    settings = Pretrain(**{**SMALL, "data": text(folder), "steps": 5})
    lilliput.pretrain(settings, to=folder / "run")
    dist.barrier()
    log = folder / "run" / "metrics.jsonl"
    if rank == 0:
        first, _, *rest = log.read_text().splitlines(keepends=True)
        log.write_text("".join([first, "nonsense\n", *rest]))
    dist.barrier()
    try:
        lilliput.pretrain(Pretrain(**{**SMALL, "data": text(folder), "steps": 8}), to=folder / "run", resume=True)
        ended = "trained"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    (folder / f"ended{rank}").write_text(ended)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.multiprocessing.spawn(process, (Path(sys.argv[1]),), 2)
