"""Auxiliary heads: small stand-ins for the server's part, that give a device gradients without asking the server.

Of a server of blocks that keep the shape (transformers) the first `depth` blocks stay, with its last norm and head; of
any other its first `depth` stages, an average over places and a linear layer, as in FSL-SAGE (Nair et al., ICML 2025).
Aligning a head differentiates through its gradient: attention can do that with `sdpa_kernel(SDPBackend.MATH)` only.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lilliput.splitter.last import check_auxiliary, dry_logits, dry_run, set_last
from lilliput.splitter.parts import Client, Payload, Server, core
from lilliput.splitter.valueless import Undecided, on_meta


def auxiliary(
    server: nn.Module,
    depth: int = 1,
    *,
    classes: int | None = None,
    weights: Literal["fresh", "server"] = "fresh",
    head: Literal["full", "low_rank", "frozen"] = "full",
    rank: int = 64,
) -> nn.Module:
    """A head that takes what the server's part takes, and returns what it returns, or logits of it.

    depth:   how many of the server's blocks or stages it has; 0 for a linear layer alone.
    classes: width of its output; the server's for None.
    weights: freshly initialised, as published: by the model's own rule for those of `transformers`, by each layer's
             `reset_parameters` otherwise; or copies of the server's, for models that were trained before.
    head:    the last linear layer, which for a large vocabulary is most of the head's bytes: `full`, width x classes
             numbers; `low_rank`, rank x (width + classes); `frozen`, the server's own, which is never trained and so
             is in no traffic (where it is tied to an embedding, the device has it anyway).

    Raises ValueError for a part that was not made by `split`, or one whose payload no linear layer can follow.
    """
    if not isinstance(server, Server) or isinstance(server.whole[0], Client):
        raise ValueError("an auxiliary head is derived from the last part that split(model, at) returns, not from this")
    if depth < 0:
        raise ValueError(f"depth is {depth}; it is how many of the server's blocks the head has, 0 or more")
    made = (_shortened(server, depth) if depth else None) or _staged(server, depth)
    if weights == "fresh":
        _initialise(made, server)
    elif weights != "server":
        raise ValueError(f"weights is {weights!r}; choose fresh or server")
    set_last(made, server, classes, head, rank)
    check_auxiliary(server, made, classes=classes)
    return made


def _shortened(server: Server, depth: int) -> Server | None:
    """The server's part with the blocks beyond the first `depth` left out; None if they are not blocks of one shape."""
    name, _, local = server.at.rpartition(".")
    blocks = core(server).get_submodule(name)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not local.isdigit():
        return None
    kind, first = type(server.cut), int(local)
    after = [m for m in server.modules() if type(m) is kind and next(m.parameters(), None) is not None]
    if len(after) != sum(type(m) is kind for m in list(blocks)[first:]):
        return None  # there are more of them elsewhere: stages
    made = copy.deepcopy(server)
    own: Any = core(made).get_submodule(name)
    beyond = [i for i, m in enumerate(own) if type(m) is kind and i >= first + depth]
    for i in reversed(beyond):
        del own[i]
    try:
        same = dry_logits(made, server.dry()).shape == dry_logits(server, server.dry()).shape
    except Exception:  # whatever the model's code does when its blocks do not fit
        return None
    return made if same else None


class Staged(nn.Module):
    """Some modules one after another, an average over places, and a linear layer.

    It takes the payload; of several tensors, the first.  Images (N, C, H, W) and vectors (N, C) give (N, classes); a
    sequence (N, L, C) gives (N, L, classes) where the server's part does, and (N, classes) otherwise.
    """

    def __init__(self, stages: list[nn.Module], width: int, classes: int, sequence: bool):
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)
        self.sequence = sequence

    def forward(self, payload: Payload) -> Tensor:
        x = self.stages(payload if isinstance(payload, Tensor) else next(iter(payload.values())))
        if x.dim() == 4:
            x = x.mean((2, 3))
        elif x.dim() == 3 and not self.sequence:
            x = x.mean(1)
        return self.head(x)


def _staged(server: Server, depth: int) -> nn.Module:
    """The server's first stages and a linear layer; all of the server if it has no more."""
    given = server.dry()
    seen, logits = dry_run(server, given)
    names = _stages(server, seen)
    counted = [n for n in names if any(True for _ in server.get_submodule(n).parameters())]
    if depth >= len(counted):
        return copy.deepcopy(server)
    kept = names[: names.index(counted[depth])] if depth else []
    stages = [copy.deepcopy(server.get_submodule(name)) for name in kept]
    with torch.no_grad(), Undecided():
        x = on_meta(nn.Sequential(*stages))(given if isinstance(given, Tensor) else next(iter(given.values())))
    width = x.shape[1] if x.dim() == 4 else x.shape[-1]
    like = next(p for p in server.parameters())
    return Staged(stages, width, logits.shape[-1], sequence=logits.dim() == 3).to(like.device, like.dtype)


def _stages(server: Server, seen: list[tuple[str, bool]]) -> list[str]:
    """The outermost modules that run from the cut on."""
    start = seen.index((server.at, True))
    depth, names = 0, []
    for name, entered in seen[start:]:
        if entered and depth == 0:
            names.append(name)
        depth += 1 if entered else -1
        depth = max(depth, 0)  # what was running at the cut returns too
    return names


def _initialise(made: nn.Module, server: Server) -> None:
    """Fresh weights, all of them to be trained: nothing of an untrained layer is worth freezing."""
    own: Any = next((m._init_weights for m in (core(server), *server.modules()) if hasattr(m, "_init_weights")), None)
    module: Any
    for module in (core(made), *made.modules()):
        module.__dict__.pop("_is_hf_initialized", None)
        for p in module.parameters(recurse=False):
            p.__dict__.pop("_is_hf_initialized", None)
            p.requires_grad_(p.is_floating_point())
        if own is not None:
            own(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
