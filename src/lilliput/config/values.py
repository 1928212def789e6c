"""What may stand on either side of the `=` of a setting: names, and values by the type of their field.

The grammar is the part of Hydra's that needs no sweep, as OmegaConf reads it: `null`, `true`, numbers, text,
'quoted text', [lists] and {keys: values}.  A comma outside brackets and quotes would be a sweep and is refused here.
"""

from __future__ import annotations

import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_visitor import GrammarVisitor

from lilliput.core.registry import normal

_MARKS = r"""\[\]{},'\""""
# What the grammar reads in quotes alone, and we without: ~/data, accuracy>=0.9, Straße.
_ODD = re.compile(rf"[^\w \t/\\+.$%*@?|:{_MARKS}-]", re.ASCII)
_WORD = re.compile(rf"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s{_MARKS}]+""", re.DOTALL)


def is_one(text: str) -> bool:
    """Whether commas are part of a single value: numbers after a name and a colon (cuda:0,1)."""
    return re.fullmatch(r"\s*[A-Za-z_]\w*:[\d.,:eE+-]+\s*", text) is not None


def parse(text: str) -> Any:
    """The value that a text on the right of `=` stands for.  Raises ValueError for a sweep or unbalanced brackets."""
    text = text.strip()
    if not text or is_one(text) or (_ODD.search(text) and not re.search(f"[{_MARKS}]", text)):
        return text
    values = _several(_WORD.sub(lambda word: _odd_quoted(word[0]), text), text)
    if len(values) > 1:
        raise ValueError(f"{text!r} is several values, which is a sweep; add -m, or write [{text}] for a list")
    return values[0]


def _several(readable: str, text: str) -> list[Any]:
    """The values between the commas of a text in the grammar's words."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", readable)  # nothing is interpolated
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a comma without a value
            tree = grammar_parser.parse(f"[{literal}]", parser_rule="singleElement", lexer_mode="VALUE_MODE")
            return _VISITOR.visit(tree)
    except (GrammarParseError, UserWarning):
        raise ValueError(
            f"{text!r} is no value: close brackets and quotes, write [item, item] and {{key: value}}, and quote text "
            "that holds any of their marks, 'a, b'"
        ) from None


def _no_interpolation(*args: Any, **options: Any) -> Any:
    raise GrammarParseError


_VISITOR = GrammarVisitor(_no_interpolation, _no_interpolation, memo=None)


def _odd_quoted(word: str) -> str:
    """A word, in quotes if the grammar does not read it without."""
    return _quoted(word) if word[0] not in "'\"" and _ODD.search(word) else word


def _quoted(text: str) -> str:
    """Text in quotes; backslashes are doubled where they would escape one."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text) + "'"


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value as its field's type wants it.  `value` comes from `parse`, a YAML file or Python.

    Raises ValueError naming the key, the value and what it must be.
    """
    for option in members(hint):
        try:
            return _as(value, option)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"{key}={show(value)} must be {describe(hint)}")


def members(hint: Any) -> list[Any]:
    """The members of a union, None and literals first: `none` as a literal is no number, and text takes all."""
    members = list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]
    order = {type(None): 0, bool: 2, int: 3, float: 4, str: 9}
    return sorted(members, key=lambda m: 1 if typing.get_origin(m) is Literal else order.get(m, 5))


def _as(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is type(None):
        if value is not None and value != "none":
            raise ValueError
        return None
    if origin is Literal:
        return _literal(value, typing.get_args(hint))
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    if (origin or hint) in (list, tuple, dict) or _is(origin, Iterable):
        return _container(value, origin or hint, typing.get_args(hint))
    return value  # a type we know nothing of: its owner checks it


def _is(origin: Any, kind: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice or (isinstance(choice, str) and normal(str(value)) == normal(choice)):
            return choice
    raise ValueError


def _container(value: Any, origin: type, args: tuple[Any, ...]) -> Any:
    if _is(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError
        key, item = args if len(args) == 2 else (Any, Any)
        return {str(k) if key is str else k: v if item is Any else _as(v, item) for k, v in value.items()}
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError
    item = args[0] if args else Any
    items = [convert(v, item, "") if item is not Any else v for v in value]
    return tuple(items) if origin is tuple else items


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if word not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise ValueError
    return word in ("true", "yes", "on", "1")


def _int(value: Any) -> int:
    number = _number(value)
    if number % 1 != 0:
        raise ValueError
    return int(number)


def _float(value: Any) -> float:
    return float(_number(value))


def _number(value: Any) -> int | float:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return value


def _str(value: Any) -> str:
    if value is None or isinstance(value, list | tuple | Mapping):
        raise ValueError
    return str(value)


_SCALARS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str, Path: lambda v: Path(_str(v))}
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_WORDS[type(None)] = "null"


def describe(hint: Any) -> str:
    """A type in words: `a whole number or null`, `one of server, clients, both`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        shown = [a for a in args if a is not int or float not in args]
        return " or ".join(describe(a) for a in sorted(shown, key=lambda a: a is type(None)))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args)
    if (origin or hint) in (list, tuple):
        return "a [list]"
    if (origin or hint) is dict or _is(origin, Mapping):
        return "{key: value}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def show(value: Any) -> str:
    """A value as one types it: the inverse of `parse`."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    if not isinstance(value, str):
        return str(value)
    plain = re.fullmatch(r"[\w/+.$%*@?|:-]+", value, re.ASCII) and parse(value) == value
    return value if plain else _quoted(value)
