"""What each of two processes does for test_distributed.py: train by DDP and FSDP2, and leave the results in files.

python two_processes.py FOLDER
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lilliput import optim

STEPS, RESUMED_AFTER, WORLD = 6, 3, 2
CASES = {
    "adamw-std": (optim.GaLoreAdamW, {"weight_decay": 0.1}, {}),
    "adamw-fira-rotated": (optim.GaLoreAdamW, {}, {"update": "fira", "rotate": True}),
    "adamw-seeded": (optim.GaLoreAdamW, {"states": "bf16"}, {"proj_type": "seeded"}),
    "adamw8bit-continuous": (optim.GaLoreAdamW8bit, {}, {"proj_type": "continuous"}),
    "adafactor-left": (optim.GaLoreAdafactor, {"scale_parameter": True}, {"proj_type": "left"}),
    "lion-std": (optim.GaLoreLion, {}, {}),
}


def build(case: str, shard=lambda model: model):
    """A model none of whose sides divide by two, and its optimizer."""
    make, options, subspace = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 9), nn.LayerNorm(9), nn.Linear(9, 5))
    model = shard(model)
    inner = getattr(model, "module", model)
    groups = optim.param_groups(inner, rank=3, update_proj_gap=2, scale=1.0, **subspace)
    return model, make(groups, lr=0.01, **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The doubled batch of a step: 8 examples, of which each of two processes takes 4."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 7, generator=generator), torch.randn(8, 5, generator=generator)


def train(model, optimizer, steps, part=slice(None)) -> None:
    for step in steps:
        x, y = batch(step)
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_per_layer(model, optimizer, accumulate, part=slice(None), processes=None) -> None:
    """The same in backward passes, `accumulate` of them for the batch."""
    layers = optim.per_layer(optimizer, accumulate, processes=processes)
    for step in range(STEPS):
        x, y = batch(step)
        for some in zip(x[part].chunk(accumulate), y[part].chunk(accumulate), strict=True):
            (nn.functional.mse_loss(model(some[0]), some[1]) / accumulate).backward()
        layers.complete()
    layers.remove()


class Branches(nn.Module):
    """Two branches, of which an example takes one, after a layer of all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = nn.Linear(7, 11), nn.Linear(11, 5), nn.Linear(11, 5)

    def forward(self, x, right: bool):
        return (self.right if right else self.left)(self.first(x).tanh())


def train_branches(layers, model, passes) -> None:
    """passes: of each step, the pairs (examples, whether they take the right branch) of this process."""
    for step in range(STEPS):
        x, y = (z.double() for z in batch(step))
        for part, right in passes(step):
            nn.functional.mse_loss(model(x[part], right), y[part], reduction="sum").backward()
        layers.complete()


def branches():
    """The model, and an optimizer that sees its layers in subspaces that stay after the first step.

    Their rank is no higher than that of the gradients, of at least two examples: the rest would be arbitrary.
    """
    model = Branches().double()
    groups = optim.param_groups(model, rank=2, update_proj_gap=100, scale=1.0)
    return model, optim.GaLoreAdamW(groups, lr=0.01, weight_decay=0.1)


# Where two processes go: apart in every third step, at first together, at times one alone in a pass.
LEFT, RIGHT = slice(0, 4), slice(4, 8)
ROUTES = {
    0: lambda step: [(slice(0, 2), step % 3 == 1), (slice(2, 4), False)],
    1: lambda step: [(slice(4, 6), False), (slice(6, 8), step % 3 == 2)],
}


def whole(model) -> list[torch.Tensor]:
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in full]


def refusal(refused) -> str:
    """What `per_layer` says of an optimizer, or a function says."""
    try:
        refused() if callable(refused) else optim.per_layer(refused)
    except ValueError as error:
        return str(error)
    return ""


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh, mine, found = init_device_mesh("cpu", (WORLD,)), slice(rank * 4, rank * 4 + 4), {}
    for case in CASES:
        ddp, optimizer = build(case, nn.parallel.DistributedDataParallel)
        train(ddp, optimizer, range(STEPS), mine)
        found[f"ddp {case}"] = whole(ddp)

        sharded, optimizer = build(case, lambda m: fully_shard(m, mesh=mesh))
        train(sharded, optimizer, range(RESUMED_AFTER), mine)
        weights, state = get_state_dict(sharded, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{case}.dcp")
        found[f"middle {case}"] = (whole(sharded), copy.deepcopy(optimizer.state_dict()))
        train(sharded, optimizer, range(RESUMED_AFTER, STEPS), mine)
        found[f"fsdp {case}"] = whole(sharded)
        found[f"owned {case}"] = sum(
            x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)
        )

        weights, state = torch.load(folder / f"{case}.pt", weights_only=True)
        resumed, optimizer = build(case, lambda m: fully_shard(m, mesh=mesh))
        for p, w in zip(resumed.parameters(), weights, strict=True):
            p.detach().to_local().copy_(distribute_tensor(w, mesh, p.placements).to_local())
        optimizer.load_state_dict(state)
        train(resumed, optimizer, range(RESUMED_AFTER, STEPS), mine)
        found[f"resumed {case}"] = whole(resumed)

    for case in CASES:
        for accumulate in (1, 2):
            model, optimizer = build(case)
            train_per_layer(model, optimizer, accumulate, mine, optim.Processes(mean=True))
            found[f"per-layer {accumulate} {case}"] = whole(model)
            sharded, optimizer = build(case, lambda m: fully_shard(m, mesh=mesh))
            train_per_layer(sharded, optimizer, accumulate, mine)
            found[f"per-layer fsdp {accumulate} {case}"] = whole(sharded)

    model, optimizer = branches()
    train_branches(optim.per_layer(optimizer, 2, processes=optim.Processes()), model, ROUTES[rank])
    found["branches"] = whole(model)

    ddp, optimizer = build("adamw-std", nn.parallel.DistributedDataParallel)
    found["refused"] = refusal(optimizer)
    early, optimizer = build("adamw-std")
    groups = [{"params": list(early.parameters())}]
    fully_shard(early, mesh=mesh)
    found["made too early"] = refusal(optimizer.step)
    found["groups made too early"] = refusal(lambda: optim.GaLoreAdamW(groups))
    inner, optimizer = build("adamw-std")
    layers = optim.per_layer(optimizer)
    x, y = batch(0)
    later = nn.parallel.DistributedDataParallel(inner)
    found["refused later"] = refusal(lambda: later(x).sum().backward())
    layers.remove()

    broken, optimizer = build("adamw-std", lambda m: fully_shard(m, mesh=mesh))
    x, y = batch(0)
    bad = x[mine] * (float("nan") if rank else 1.0)
    before = whole(broken)
    nn.functional.mse_loss(broken(bad), y[mine]).backward()
    optimizer.step()
    found["skipped"] = [group["skipped"] for group in optimizer.param_groups]
    found["unmoved"] = all(torch.equal(a, b) for a, b in zip(before, whole(broken), strict=True))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(process, (Path(sys.argv[1]),), WORLD)
