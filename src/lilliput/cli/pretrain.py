"""`lilliput pretrain`: train a language model on one owner's text."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.cli import folder as folders
from lilliput.cli import pretrain_recipe as recipes
from lilliput.cli.arguments import Line
from lilliput.cli.pretrain_recipe import settings
from lilliput.config.layers import given
from lilliput.pretraining import Pretrain, Result, parallel, pretrain

HELP = """usage: lilliput pretrain [--config FILE] [--cfg] [--check] [--plain] [key=value ...]

Trains a language model on one owner's text.  Each setting has a default: `lilliput pretrain` alone trains a small
LLaMA on the source of Python's standard library.  What a model or an optimizer has of its own stands under its key.

  lilliput pretrain data=text.jsonl tokenizer=gpt2 model.vocab_size=50304 steps=500
  lilliput pretrain optimizer=galore_adamw optimizer.rank=64 lr=0.01
  lilliput pretrain recipe=galore/llama_60m case=GaLore accumulate=8
  torchrun --nproc_per_node 8 -m lilliput pretrain recipe=galore/llama_1b case=GaLore parallel=fsdp
  lilliput resume runs/pretrain/llama_9m/stdlib/2026-01-31_12-00-00 steps=2000

flags
  --config FILE  settings from a YAML file, below those that are typed; a run's config.yaml repeats it
  --cfg          print the settings and stop
  --check        of a recipe: hold its finished runs against what was published
  --plain        a line per row instead of the live table

settings
{settings}

Names: `lilliput list models`; optimizers: {optimizers}.
The keys of the published script work too: model_config, total_batch_size, max_train_tokens, galore_scale, ..."""

_LINE = Line("--cfg", "--check", "--plain", config="a file")


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    if {"-h", "--help"} & set(argv):
        print(_help())
        return 0
    flags, typed = _LINE.parse(argv)
    layers = given(typed, flags["config"])
    if flags["check"]:
        name = next((str(layer["recipe"]) for layer in reversed(layers) if "recipe" in layer), None)
        if name is None:
            raise ValueError("--check compares with what was published; add recipe=..., see `lilliput list recipes`")
        return recipes.check(name, layers)
    c = settings(layers)
    if flags["cfg"]:
        print(folders.as_yaml(c), end="")
        return 0
    with parallel.joined(c.device) as world:
        made = _folder(c, world)
        _run(c, made.path, world, made, plain=flags["plain"])
        if world.first:
            print(made.path)
    return 0


def go_on(place: Path, changes: Mapping[str, Any], plain: bool = False) -> Result:
    """Continue the run in a folder where it stopped, with some settings changed."""
    layers: list[Mapping[str, Any]] = [folders.layer_of(place)]
    for one, other in (("steps", "tokens"), ("tokens", "steps")):
        if one in changes:
            layers.append({other: None})
    c = settings([*layers, changes])
    with parallel.joined(c.device) as world:
        return _run(c, place, world, None, plain=plain)


def _run(c: Pretrain, place: Path, world: parallel.World, made: folders.Made | None, plain: bool) -> Result:
    """made: the folder of a new run; None goes on with the run that is there."""
    if not world.first:
        return pretrain(c, to=place, resume=made is None)
    noting = folders.Noting(place, c, _facts)
    with folders.held(place):
        try:
            reporters = [*_reporters(c, place, plain), noting]
            result = pretrain(c, to=place, resume=made is None, reporters=reporters)
        except BaseException as error:
            removed = made is not None and made.undo()
            if noting.begun and not removed:
                error.lilliput_folder = place  # type: ignore[attr-defined]
            raise
        folders.note(place, {"finished": _now()})
        return result


def _facts(run: Any) -> dict[str, Any]:
    """What environment.json says from the start."""
    from lilliput.cli.machine import environment

    data = {"data": run.texts[0].fingerprint(), "validation": run.parted}
    return {"started": _now(), "finished": None, "command": sys.argv, **environment(), **data}


def _folder(c: Pretrain, world: parallel.World) -> folders.Made:
    """The folder of a new run, made by the first process and known to all."""
    made = None
    if world.first:
        place = _place(c)
        if c.name is not None:
            folders.refuse_full(place)
        made = folders.reserve(place, named=c.name is not None)
    return world.gathered(made)[0]


def _place(c: Pretrain) -> Path:
    """The name, or pretrain/<model>/<data>/<time>, below `folder`."""
    root = Path(c.folder)
    if c.name is not None:
        return root / c.name
    data = [c.data] if isinstance(c.data, str) else c.data
    text = "+".join(Path(name).name for name in data)
    return root / "pretrain" / Path(c.model).name / text / time.strftime("%Y-%m-%d_%H-%M-%S")


def _reporters(c: Pretrain, place: Path, plain: bool) -> list[Any]:
    from lilliput.config.checks import installed
    from lilliput.report import TensorBoard, WandB
    from lilliput.report.steps import live_steps

    found: list[Any] = [live_steps(plain=plain)]
    if c.tensorboard and installed("tensorboard"):
        found.append(TensorBoard(place / "tb"))
    if c.wandb:
        found.append(WandB(place, config=c.as_dict()))
    return found


def _help() -> str:
    from lilliput.cli.help import setting_lines
    from lilliput.config.facts import told
    from lilliput.config.fields import docs, fields_of
    from lilliput.pretraining.optimizers import NAMES

    shown = [f for f in fields_of(Pretrain).values() if not f.name.endswith("_options")]
    return HELP.format(settings="\n".join(setting_lines(told(shown, docs(Pretrain)))), optimizers=", ".join(NAMES))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
