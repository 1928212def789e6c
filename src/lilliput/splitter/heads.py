"""Auxiliary heads: small stand-ins for the server's part that give a device gradients without asking the server.

Of a server of blocks that keep the shape (transformers) the first `depth` blocks stay, with its last norm and head; of
any other its first `depth` stages, an average over places and a linear layer, as in FSL-SAGE (Nair et al., ICML 2025).
Aligning a head differentiates through its gradient: attention can do that with `sdpa_kernel(SDPBackend.MATH)` only.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lilliput.core.layers import is_linear, sides
from lilliput.fake import Fake, like
from lilliput.splitter.names import mapped_tensors, states, tensors
from lilliput.splitter.parts import Client, Part, Payload, Server, core, on_meta
from lilliput.splitter.trace import events

LARGE = 10_000_000  # bytes of a last layer that is worth a warning


def auxiliary(
    server: nn.Module,
    depth: int = 1,
    *,
    classes: int | None = None,
    weights: Literal["fresh", "server"] = "fresh",
    head: Literal["full", "low_rank", "frozen"] = "full",
    rank: int = 64,
) -> nn.Module:
    """A head that takes the server part's payload, and returns what the server's part returns, or logits.

    depth:   how many of the server's blocks or stages it has; 0 for a linear layer alone.
    classes: width of its output; None takes the server's.
    weights: `fresh` initialises them, as published: by the model's own rule for models of `transformers`, by each
             layer's `reset_parameters` otherwise.  `server` copies the server's, for models that are already trained.
    head:    the last linear layer, which for a large vocabulary is most of the head's bytes: `full`, width x classes
             numbers; `low_rank`, rank x (width + classes); `frozen`, the server's own, which is never trained and so
             never sent (where it is tied to an embedding, the device has it anyway).

    Raises ValueError for a part that `split` did not make, or if no linear layer can follow its payload.
    """
    if not isinstance(server, Server) or isinstance(server.whole[0], Client):
        raise ValueError("an auxiliary head is derived from the last part that split(model, at) returns, not from this")
    if depth < 0:
        raise ValueError(f"depth is {depth}; it is how many of the server's blocks the head has, 0 or more")
    aux = (_shortened(server, depth) if depth else None) or _staged(server, depth)
    if weights == "fresh":
        _initialise(aux, server)
    elif weights != "server":
        raise ValueError(f"weights is {weights!r}; choose fresh or server")
    set_last(aux, server, classes, head, rank)
    check_auxiliary(server, aux, classes=classes)
    return aux


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
    aux = copy.deepcopy(server)
    aux_blocks: Any = core(aux).get_submodule(name)
    beyond = [i for i, m in enumerate(aux_blocks) if type(m) is kind and i >= first + depth]
    for i in reversed(beyond):
        del aux_blocks[i]
    payload = server.meta_payload()
    try:
        same = logits_on_meta(aux, payload).shape == logits_on_meta(server, payload).shape
    except Exception:  # whatever the model's code does when its blocks do not fit
        return None
    return aux if same else None


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
    payload = server.meta_payload()
    seen, logits = run_on_meta(server, payload)
    names = _stages(server, seen)
    counted = [n for n in names if any(True for _ in server.get_submodule(n).parameters())]
    if depth >= len(counted):
        return copy.deepcopy(server)
    first = names[: names.index(counted[depth])] if depth else []
    stages = [copy.deepcopy(server.get_submodule(name)) for name in first]
    with torch.no_grad(), Fake(value=0):
        x = on_meta(nn.Sequential(*stages))(payload if isinstance(payload, Tensor) else next(iter(payload.values())))
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


def _initialise(aux: nn.Module, server: Server) -> None:
    """Fresh weights, all of them to be trained: nothing of an untrained layer is worth freezing."""
    rule: Any = next((m._init_weights for m in (core(server), *server.modules()) if hasattr(m, "_init_weights")), None)
    module: Any
    for module in (core(aux), *aux.modules()):
        module.__dict__.pop("_is_hf_initialised", None)
        for p in module.parameters(recurse=False):
            p.__dict__.pop("_is_hf_initialised", None)
            p.requires_grad_(p.is_floating_point())
        if rule is not None:
            rule(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


def check_auxiliary(
    payload: Payload | Part, head: nn.Module, server: nn.Module | None = None, classes: int | None = None
) -> None:
    """Raise ValueError unless a head takes a payload and gives as many outputs as the server, or as there are classes.

    payload: a payload, or a part that `split` made; the server's part is also taken for `server`.
    """
    server = payload if isinstance(payload, Server) else server
    bare = payload.meta_payload() if isinstance(payload, Part) else mapped_tensors(payload, like)
    shapes = ", ".join(f"{n} {tuple(x.shape)}" if n else f"{tuple(x.shape)}" for n, x in tensors(bare).items())
    try:
        logits = logits_on_meta(head, bare)
    except Exception as error:
        raise ValueError(
            f"the auxiliary head cannot take what the device sends, {shapes}: {error}; give it an input of that width"
        ) from error
    wanted = classes or (None if server is None else logits_on_meta(server, bare).shape[-1])
    if wanted is not None and logits.shape[-1] != wanted:
        raise ValueError(
            f"the auxiliary head gives {logits.shape[-1]} outputs where {wanted} are needed; change its last layer"
        )


def logits_on_meta(module: nn.Module, payload: Payload) -> Tensor:
    """The output of a module for a payload, on the meta device: of several tensors the logits, or the first."""
    return run_on_meta(module, payload)[1]


def run_on_meta(module: nn.Module, payload: Payload) -> tuple[list[tuple[str, bool]], Tensor]:
    """The modules that are called and return on the way (see `events`), and the same output."""
    with torch.no_grad(), Fake(value=0):
        bare = on_meta(module)
        with events(bare) as seen:
            outputs = tensors(bare(payload))
    return seen, outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))


def set_last(aux: nn.Module, server: Server, classes: int | None, kind: str, rank: int) -> None:
    """Replace the last linear layer of a head in place: for another number of classes, of low rank, or frozen.

    Raises ValueError for an unknown kind, and if the head does not end in a linear layer.
    """
    if kind not in ("full", "low_rank", "frozen"):
        raise ValueError(f"head is {kind!r}; choose full, low_rank or frozen")
    name = _last_linear(aux, server.meta_payload())
    if name is None:
        if kind != "full" or classes is not None:
            raise ValueError("the head has no linear layer at its end to change; leave head and classes as they are")
        return
    linear = aux.get_submodule(name)
    width, before = sides(linear)
    outputs, bias, weight = classes or before, linear.bias is not None, linear.get_parameter("weight")
    like_it: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if kind == "low_rank":
        low = min(rank, width, outputs)
        new: nn.Module = nn.Sequential(
            nn.Linear(width, low, bias=False, **like_it), nn.Linear(low, outputs, bias, **like_it)
        )
    elif kind == "frozen":
        new = _frozen(server, name, outputs)
    else:
        new = linear if outputs == before else nn.Linear(width, outputs, bias, **like_it)
        _warn_if_large(aux, weight.element_size(), width, outputs, rank)
    parent, _, local = name.rpartition(".")
    setattr(aux.get_submodule(parent), local, new)


def _last_linear(aux: nn.Module, payload: Payload) -> str | None:
    """The linear layer that runs last and is as wide as the output."""
    seen, logits = run_on_meta(aux, payload)
    linears = {name: m for name, m in aux.named_modules() if is_linear(m)}
    last = next((name for name, entered in reversed(seen) if entered and name in linears), None)
    return last if last is not None and sides(linears[last])[1] == logits.shape[-1] else None


def _frozen(server: Server, name: str, outputs: int) -> nn.Module:
    last = dict(server.named_modules()).get(name)
    if last is None or not is_linear(last) or sides(last)[1] != outputs:
        raise ValueError(
            "head='frozen' takes the server's last linear layer as it is, and none fits here; choose full or low_rank"
        )
    return copy.deepcopy(last).requires_grad_(False)


def _warn_if_large(aux: nn.Module, itemsize: int, width: int, outputs: int, rank: int) -> None:
    size, whole = width * outputs * itemsize, sum(x.nbytes for _, x, *_ in states(aux))
    if size > LARGE and 2 * size > whole:
        small = rank * (width + outputs) * itemsize
        warnings.warn(
            f"the auxiliary's last layer has {size:,} of its {whole:,} bytes; head='low_rank' has {small:,} with "
            f"rank={rank}, and head='frozen' does not travel",
            stacklevel=4,
        )
