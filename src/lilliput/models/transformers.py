"""Models of Hugging Face `transformers`: by our name, a folder, a config.json or a name on the hub.

The modules are the library's own, with its names of parameters.  Their forward returns a mapping with `logits`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lilliput.core.registry import nearest, normal
from lilliput.core.sources import line, quiet, transformers
from lilliput.lean import patch as made_lean
from lilliput.models.hub import configured, filled
from lilliput.models.images import image_shape
from lilliput.models.llama import LLAMA

# The configuration of each of our names; all else is the library's default, which is the smallest published size.
NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "gpt2_medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2_large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2_xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    **{f"llama_{size}": {"model_type": "llama", **numbers} for size, numbers in LLAMA.items()},
    "bert": {"model_type": "bert"},
    "roberta": {"model_type": "roberta"},
    "distilbert": {"model_type": "distilbert"},
    "t5_encoder": {"model_type": "t5"},
    "vit": {"model_type": "vit"},
}
FAMILIES = {
    "gpt2": "GPT-2 {size}, a causal language model with random weights, to train from scratch; {parameters} parameters",
    "llama": "LLaMA with {num_hidden_layers} blocks of width {hidden_size}, a causal language model to pre-train; "
    "about {size} parameters",
    "bert": "BERT-base, a text classifier with random weights; 110M parameters",
    "roberta": "RoBERTa-base, a text classifier with random weights and a larger vocabulary than BERT; 125M parameters",
    "distilbert": "DistilBERT, a text classifier with random weights and half of BERT-base's blocks; 67M parameters",
    "t5": "T5-small's encoder under a linear classifier of texts, with random weights; 35M parameters",
    "vit": "ViT-base, an image classifier over patches, with random weights; 86M parameters",
}
# What a family is used for.  For others, the architecture in their config.json decides.
USES = {
    "gpt2": "CausalLM", "llama": "CausalLM", "vit": "ImageClassification", "t5": "TextEncoding",
    **dict.fromkeys(("bert", "roberta", "distilbert"), "SequenceClassification"),
}  # fmt: skip
# Our options, and the names that the families have for each; `dropout` sets all of a family's.
WORDS = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "mlp": ("intermediate_size", "n_inner", "hidden_dim", "d_ff"),
    "heads": ("num_attention_heads",),
    "positions": ("max_position_embeddings",),
    "patch": ("patch_size",),
    "vocabulary": ("vocab_size",),
    "classes": ("num_labels",),
    "dropout": (
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout",
        "attention_dropout", "dropout_rate",
    ),
}  # fmt: skip
# sdpa uses flash kernels too: on a GPU, in bf16 or fp16, without padding.  flash_attention_2 needs the package
# flash-attn, and handles padding as well.
Attention = Literal["sdpa", "eager", "flash_attention_2"]
PADDING = 128  # published vocabularies are padded to a multiple of this at most
PARAMETERS = {
    "gpt2": "124M",
    "gpt2_medium": "355M",
    "gpt2_large": "774M",
    "gpt2_xl": "1.6B",
}  # with published vocabulary


def summary(name: str) -> str:
    """One line about one of `NAMES`: what it is, what it is for, and its size."""
    values, size = NAMES[name], name.partition("_")[2] or "small"
    shown = size.upper() if size[0].isdigit() else size
    return FAMILIES[values["model_type"]].format(**{**values, "size": shown, "parameters": PARAMETERS.get(name)})


class EncoderClassifier(nn.Module):
    """A linear classifier over the mean of an encoder's last hidden states."""

    def __init__(self, encoder: nn.Module, hidden: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Tokens (N, L) int64 and their mask (N, L), 1 for real tokens, to `logits` (N, classes)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h_nlw = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        share_nl1 = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(h_nlw)
        return {"logits": self.classifier((h_nlw * share_nl1).sum(1))}


def pretrained(source: str, *, attention: str = "sdpa", **options: Any) -> nn.Module:
    """The model of a source with its weights, if it has any, else freshly initialised by torch's global generator.

    source:    one of `NAMES`, a folder with config.json, such a file, or a name on the hub.
    attention: the library's implementation; `eager` can be differentiated twice.
    options:   values of its configuration, by the library's names or by our `WORDS`.
    Raises ValueError if the source cannot be loaded, an option is unknown, or the weights do not fill the model.
    """
    raw, place = _source(source)
    return _made(source, _configured(source, raw, options), place, attention)


def empty(source: str, *, attention: str = "sdpa", **options: Any) -> nn.Module:
    """The model of a source on the meta device: shapes without values, for any size."""
    raw, _ = _source(source)
    with torch.device("meta"):
        return _made(source, _configured(source, raw, options), None, attention)


def for_data(
    source: str, *, shape: Sequence[int], classes: int, layers: int | None = None, hidden: int | None = None,
    mlp: int | None = None, heads: int | None = None, positions: int | None = None, patch: int | None = None,
    dropout: float | None = None, attention: Attention = "sdpa", lean: bool = False,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:  # fmt: skip
    """A model of Hugging Face transformers that fits the data; freshly initialised unless its source has weights.

    layers: number of blocks
    hidden: width of the residual stream
    mlp: width inside the feed-forward layers
    heads: attention heads
    positions: the longest sequence
    patch: side of an image's patches, in pixels
    dropout: every dropout rate of the model
    attention: sdpa uses the fastest of torch's own kernels; eager can be differentiated twice
    lean: trains in less memory with the same results: keeps less for the backward pass and never all logits
    config: anything else in the library's own configuration, by its name there
    """
    given = {
        "layers": layers, "hidden": hidden, "mlp": mlp, "heads": heads, "positions": positions, "patch": patch,
        "dropout": dropout,
    }  # fmt: skip
    raw, place = _source(source)
    own = {key: value for key, value in given.items() if value is not None} | dict(config)
    if normal(source) in map(normal, NAMES):
        raw.pop("vocab_size", None)  # the data's tokenizer decides
    values = _configured(source, raw, own)
    values = _configured(source, values, _facts(source, values, shape, classes, fixed=place is not None))
    model = _made(source, values, place, attention)
    return made_lean(model) if lean else model


def from_source(
    *, shape: Sequence[int], classes: int, source: str = "", dropout: float | None = None,
    attention: Attention = "sdpa", lean: bool = False, config: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:  # fmt: skip
    """Any model of Hugging Face transformers from a folder or the hub, with its trained weights: for fine-tuning.

    source: a folder with config.json, such a file, or a name on the hub
    dropout: every dropout rate of the model
    attention: sdpa uses the fastest of torch's own kernels; eager can be differentiated twice
    lean: trains in less memory with the same results: keeps less for the backward pass and never all logits
    config: anything else in the library's own configuration, by its name there
    """
    if not source:
        raise ValueError("model=pretrained needs pretrained.source: a folder, a config.json or a name on the hub")
    own: dict[str, Any] = {"dropout": dropout, "attention": attention, "lean": lean, "config": config}
    return for_data(source, shape=shape, classes=classes, **own)


def check_language(name: str, model: nn.Module) -> None:
    """Raise ValueError unless the model takes tokens and gives logits at every one of them.

    Skips models on the meta device, because transformers looks at the values of masks.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    logits = torch.empty(0)
    if "input_ids" in inspect.signature(model.forward).parameters:
        training, two = model.training, torch.zeros(1, 2, dtype=torch.int64)
        with torch.no_grad():
            logits = model.eval()(input_ids=two, attention_mask=torch.ones_like(two))["logits"]
        model.train(training)
    if logits.dim() != 3:
        raise ValueError(
            f"model={name} does not give logits at every token; choose a causal model, such as gpt2 or llama_9m"
        )


def _source(source: str) -> tuple[dict[str, Any], str | None]:
    """(the configuration, the place of the weights or None)."""
    ours = next((values for name, values in NAMES.items() if normal(name) == normal(source)), None)
    return configured(source) if ours is None else (dict(ours), None)


def _configured(source: str, raw: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with options, under the library's own names.  Raises ValueError if an option is unknown."""
    library = transformers()
    try:
        kind = library.CONFIG_MAPPING[raw["model_type"]]
    except KeyError:
        raise ValueError(f"{source}: transformers {library.__version__} has no {raw['model_type']!r} models") from None
    known = {*kind().to_dict(), *kind.attribute_map, "num_labels"}
    changes: dict[str, Any] = {}
    for key, value in options.items():
        names = [name for name in WORDS.get(key, (key,)) if name in known]
        if not names:
            words = [word for word, own in WORDS.items() if known & {*own}]
            close = nearest(key, [*words, *known])
            hint = close if close.startswith("did you mean") else nearest(key, words)
            raise ValueError(f"model {source!r} has no option {key!r}; {hint}")
        changes |= {kind.attribute_map.get(name, name): value for name in names}
    return {key: value for key, value in raw.items() if key not in _stale(raw, changes)} | changes


def _stale(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> set[str]:
    """The keys whose values were derived from those that change."""
    stale = {"head_dim"} if changes.keys() & {"hidden_size", "num_attention_heads"} else set()
    heads, shared = changes.get("num_attention_heads"), raw.get("num_key_value_heads")
    if heads and shared and (shared == raw.get("num_attention_heads") or heads % shared):
        stale.add("num_key_value_heads")
    return stale


def _facts(source: str, raw: Mapping[str, Any], shape: Sequence[int], classes: int, fixed: bool) -> dict[str, Any]:
    """The options that the data decide.  Raises ValueError if they do not fit; a model with weights is `fixed`."""
    use, config = _use(source, raw), _config(source, raw)
    if use == "ImageClassification":
        channels, height, width = image_shape(source, shape, least=1 if fixed else config.patch_size)
        side: Any = height if height == width else (height, width)
        if fixed and (config.image_size, config.num_channels) != (side, channels):
            own = f"{config.num_channels} x {config.image_size} x {config.image_size}"
            raise ValueError(f"{source} was trained on images of {own}, not {tuple(shape)}; resize the data")
        return {"classes": classes, "num_channels": channels, "image_size": side}
    if len(shape) != 1:
        raise ValueError(f"{source} takes texts (length,), not shape {tuple(shape)}; try vit, cnn or mlp")
    offset = 2 if raw["model_type"] == "roberta" else 0  # its positions start after that of the padding
    most = (getattr(config, "max_position_embeddings", None) or shape[0] + offset) - offset
    if shape[0] > most:
        raise ValueError(
            f"sequences of {shape[0]} tokens exceed the {most} positions of {source}; cut the data's length to {most}"
            + ("" if fixed else f", or set positions={shape[0] + offset}")
        )
    if use != "CausalLM":
        return {"classes": classes}
    stated = "vocab_size" in raw or fixed
    if stated and not classes <= config.vocab_size < classes + PADDING:
        raise ValueError(
            f"the tokenizer has {classes} tokens and {source} has vocab_size={config.vocab_size}; "
            "give the data the tokenizer that belongs to the model"
        )
    return {} if stated else {"vocabulary": classes}


def _use(source: str, raw: Mapping[str, Any]) -> str:
    """What a model is used for: the part of its class's name after `For`."""
    use = USES.get(raw["model_type"])
    for architecture in () if use else raw.get("architectures") or ():
        use = architecture.partition("For")[2] or ("CausalLM" if architecture.endswith("LMHeadModel") else None)
    if use is None:
        raise ValueError(f"{source}: a {raw['model_type']!r} configuration must name `architectures` with logits")
    return use


def _config(source: str, raw: Mapping[str, Any]) -> Any:
    """The library's configuration object."""
    library = transformers()
    values = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        with quiet():
            config = library.CONFIG_MAPPING[raw["model_type"]](**values)
    except Exception as error:  # the library's checks raise errors of their own
        raise ValueError(f"{source} cannot be configured like this: {line(error)}") from error
    hidden, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 1)
    if not heads or hidden % heads:
        raise ValueError(f"hidden={hidden} does not divide into heads={heads} of {source}; choose a divisor")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache helps only generation, and would be an output in training
    for name in ("bos_token_id", "eos_token_id"):  # ids of the published vocabulary may exceed a smaller one
        if isinstance(own := getattr(config, name, None), int) and own >= getattr(config, "vocab_size", own + 1):
            setattr(config, name, None)
    return config


def _made(source: str, raw: Mapping[str, Any], place: str | None, attention: str) -> nn.Module:
    library = transformers()
    use, config = _use(source, raw), _config(source, raw)
    auto = getattr(library, f"AutoModelFor{use}", None)
    if auto is None:
        raise ValueError(f"{source}: transformers {library.__version__} has no AutoModelFor{use}")
    if place is None:
        try:
            model = auto.from_config(config, attn_implementation=attention)
        except ImportError as error:
            raise ValueError(f"attention={attention} is not available ({line(error)}); use attention=sdpa") from error
    else:
        model = filled(source, auto, config, place, attention)
    return EncoderClassifier(model, config.hidden_size, config.num_labels) if use == "TextEncoding" else model
