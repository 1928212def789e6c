"""The settings of a pre-training run: the only description of them; command line, files and help are read off it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lilliput.data.corpus import count
from lilliput.optim.factory import settled
from lilliput.training.settings import check_step, warmup_rounds


@dataclass(frozen=True)
class Pretrain:
    """How a language model is trained on one owner's text; the comments are what `lilliput pretrain --help` says."""

    model: str = "llama_9m"  # llama_9m to llama_7b, a folder, a config.json, a name on the hub, or mine.py:Net
    model_options: dict[str, Any] = field(
        default_factory=dict
    )  # of its configuration: model.hidden=256, model.layers=4
    data: str | list[str] = "stdlib"  # c4 (streamed), stdlib, or files and folders: .txt, .jsonl, .json.gz, .parquet
    validation: str | list[str] | None = None  # validation text; by default the data's own, else a share held out
    held_out: float = 0.05  # the share of documents held out where there is no other validation text
    text_key: str = "text"  # the field or column that holds the text
    tokenizer: str = "bytes"  # a folder, a tokenizer.json, a name on the hub, or bytes
    max_length: int = 256  # tokens of a sequence
    packing: bool = True  # documents end to end; false pads or cuts each to one sequence, as published
    shuffle: int = 10_000  # documents of a block that is shuffled; 0 keeps their order
    prefetch: int = 2  # batches that a thread prepares ahead; 0 prepares each when it is needed
    steps: int | None = None  # optimizer steps; 1,000 unless `tokens` is given
    tokens: str | int | float | None = None  # a budget of tokens instead of steps: 1.1B, 500M
    batch_size: int = 16  # sequences of a step, over all processes
    accumulate: int = 1  # passes that each process cuts its share of a batch into
    optimizer: str = "adamw"  # adamw, galore_adamw, online_subspace_adamw, fira, ..., or torch.optim:RMSprop
    optimizer_options: dict[str, Any] = field(default_factory=dict)  # its own: optimizer.rank=128, optimizer.scale=0.25
    lora: int | None = None  # instead of the linear layers' weights, train adapters of this rank beside them (LoRA)
    lr: float = 1e-3  # the largest learning rate
    weight_decay: float = 0.0  # pull of the optimizer towards zero
    schedule: Literal["cosine", "linear", "cosine_restarts", "constant"] = "cosine"  # of lr after the warm-up
    warmup: int | float = 0.1  # steps in which lr rises from zero, or, below 1, their share of all
    min_lr_ratio: float = 0.1  # of the largest learning rate, where the schedule ends
    restart_every: int | None = None  # steps between restarts of cosine_restarts
    restart_warmup: int = 100  # steps in which lr rises again after a restart
    clip: float | None = None  # the largest norm of a step's gradient (of each parameter's with per_layer)
    dtype: Literal["float32", "bf16"] = "float32"  # of the weights
    precision: Literal["float32", "bf16"] = "float32"  # of the products: bf16 is autocast over float32 weights
    checkpointing: bool = False  # recompute each block's activations in the backward pass instead of keeping them
    per_layer: bool = False  # update each parameter in the backward pass, so that one gradient lives at a time
    lean: bool = True  # layers that save less for the backward pass, and the loss in chunks; the same results
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: whole models side by side, or one in shards (FSDP2)
    seed: int = 0  # decides every draw of the run
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU where there is one
    memory: str | None = None  # what there is, such as 24GB; by default what the device has
    init: str | None = None  # weights to start from: a run's folder, or a .safetensors, .pt or .pth file
    continue_from: str | None = None  # a run to go on from in a new folder: weights, optimizer, schedule and position
    eval_every: int = 1000  # steps between evaluations; there is one at the end
    eval_tokens: str | int | float = "10M"  # validation tokens of an evaluation, or all if there are fewer
    log_every: int = 10  # steps of a line of metrics.jsonl
    save_every: int | None = None  # steps between checkpoints; by default as often as they are cheap
    name: str | None = None  # the run's folder below `folder`; else pretrain/<model>/<data>/<time>
    folder: str = "runs"  # where runs are kept
    tensorboard: bool = True  # write TensorBoard events, where tensorboard is installed
    wandb: bool = False  # report to Weights & Biases
    tags: list[str] = field(default_factory=list)  # words to find the run by

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "accumulate", "lr", "eval_every", "log_every"):
            _positive(name, getattr(self, name))
        for name in ("steps", "lora", "clip", "restart_every", "save_every"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("warmup", "restart_warmup", "shuffle", "prefetch", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}; it is a share of lr, from 0 to 1")
        self._check_combinations()
        count(self.eval_tokens, "eval_tokens")

    def _check_combinations(self) -> None:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens both say how long to train; give one of them")
        check_step(self.batch_size, self.accumulate, self.dtype, self.precision)
        settled(self.optimizer, self.optimizer_options, self.weight_decay)
        if (self.schedule == "cosine_restarts") != (self.restart_every is not None):
            raise ValueError("restart_every and schedule=cosine_restarts belong together; give both or neither")
        if self.init is not None and self.continue_from is not None:
            raise ValueError("init takes weights alone and continue_from all of a run; give one of them")
        if self.per_layer and self.parallel == "fsdp" and self.clip is not None:
            raise ValueError("clip with per_layer needs whole gradients, which shards are not; use parallel=ddp")
        if self.lora is not None and self.parallel == "fsdp":
            raise ValueError("adapters are not sharded: use lora with parallel=ddp, or a subspace optimizer with fsdp")
        if self.total_steps <= self.warmup_steps:
            raise ValueError(f"warmup={self.warmup} leaves none of {self.total_steps} steps; shorten it")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run.  Raises ValueError for a budget that is not one step."""
        if self.tokens is None:
            return 1000 if self.steps is None else self.steps
        budget, step = count(self.tokens, "tokens"), self.batch_size * self.max_length
        if budget < step:
            raise ValueError(
                f"tokens={self.tokens} is below one step of {step:,} tokens; lower batch_size, or raise it"
            )
        return budget // step

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return warmup_rounds(self.warmup, self.total_steps)

    def share(self, world: int) -> int:
        """Sequences of one pass of one process.  Raises ValueError if the batch does not divide."""
        if self.batch_size % (world * self.accumulate):
            raise ValueError(
                f"batch_size={self.batch_size} does not divide among {world} processes of accumulate={self.accumulate} "
                f"passes; choose a multiple of {world * self.accumulate}"
            )
        return self.batch_size // (world * self.accumulate)

    def as_dict(self) -> dict[str, Any]:
        """The settings as `config.yaml` holds them; `program` tells them from those of `lilliput run`."""
        return {"program": "pretrain"} | {f.name: getattr(self, f.name) for f in fields(self)}


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")
