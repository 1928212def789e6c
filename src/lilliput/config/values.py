"""What may stand on either side of the `=` of a setting: names, and values by the type of their field.

The grammar is the part of Hydra's that needs no sweep: `null`, `true`, numbers, text, 'quoted text', [lists] and
{keys: values}.  A comma outside brackets and quotes would be a sweep and is refused here.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from lilliput.core.registry import normal

_ESCAPED = r"\\[\\()\[\]{}:=, \t]"  # what Hydra escapes in text without quotes
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_TOKEN = re.compile(rf"""\s*(?:(?P<quoted>{_QUOTED})|(?P<mark>[\[\]{{}},])|(?P<bare>(?:{_ESCAPED}|[^\[\]{{}},'"])+))""")
_INT = re.compile(r"[+-]?\d+(_\d+)*")
_FLOAT = re.compile(r"[+-]?((\d+(_\d+)*(\.\d*)?|\.\d+)(e[+-]?\d+)?|inf|nan)", re.IGNORECASE)


def scalar(text: str) -> Any:
    """The value of an unquoted word: None, a truth value, a number or the text itself."""
    text = text.strip()
    if text.lower() in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def is_one(text: str) -> bool:
    """Whether commas are part of a single value: numbers after a name and a colon (cuda:0,1)."""
    return re.fullmatch(r"\s*[A-Za-z_]\w*:[\d.,:eE+-]+\s*", text) is not None


def parse(text: str) -> Any:
    """The value that a text on the right of `=` stands for.  Raises ValueError for a sweep or unbalanced brackets."""
    if not text.strip():
        return ""
    if is_one(text):
        return text.strip()
    tokens = _tokens(text)
    value, rest = _value(tokens, text)
    if not rest:
        return value
    if rest[0] == ("mark", ","):
        raise ValueError(f"{text!r} is several values, which is a sweep; add -m, or write [{text}] for a list")
    raise ValueError(f"{text!r} does not end where it should; quote text that holds brackets or quotes")


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text!r} has an unclosed quote")
        found.append((str(match.lastgroup), match[str(match.lastgroup)]))
        at = match.end()
    return found


def _value(tokens: list[tuple[str, str]], text: str) -> tuple[Any, list[tuple[str, str]]]:
    """The first value of the tokens, and the tokens after it."""
    if not tokens:
        raise ValueError(f"{text!r} ends too early; close its brackets")
    (kind, word), rest = tokens[0], tokens[1:]
    if kind == "quoted":
        return re.sub(r"\\(.)", r"\1", word[1:-1]), rest
    if kind == "bare":
        return _bare(word), rest
    if word == "[":
        return _list(rest, text)
    if word == "{":
        return _dict(rest, text)
    raise ValueError(f"{text!r} has {word!r} where a value should stand")


def _bare(word: str) -> Any:
    """An unquoted word, in which a backslash makes text of what would be grammar."""
    plain = re.sub(_ESCAPED, lambda escaped: escaped[0][1], word.strip())
    return scalar(plain) if plain == word.strip() else plain


def _list(tokens: list[tuple[str, str]], text: str) -> tuple[list[Any], list[tuple[str, str]]]:
    items: list[Any] = []
    while tokens and tokens[0] != ("mark", "]"):
        item, tokens = _value(tokens, text)
        items.append(item)
        tokens = _after_item(tokens, "]", text)
    return items, _closed(tokens, text)


def _dict(tokens: list[tuple[str, str]], text: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    items: dict[str, Any] = {}
    while tokens and tokens[0] != ("mark", "}"):
        key, colon, word = tokens[0][1].partition(":")
        if tokens[0][0] != "bare" or not colon:
            raise ValueError(f"{text!r}: write {{key: value}}")
        tokens = [("bare", word), *tokens[1:]] if word.strip() else tokens[1:]
        items[key.strip()], tokens = _value(tokens, text)
        tokens = _after_item(tokens, "}", text)
    return items, _closed(tokens, text)


def _after_item(tokens: list[tuple[str, str]], closing: str, text: str) -> list[tuple[str, str]]:
    if tokens and tokens[0] == ("mark", ","):
        return tokens[1:]
    if tokens and tokens[0] != ("mark", closing):
        raise ValueError(f"{text!r}: items are separated by commas")
    return tokens


def _closed(tokens: list[tuple[str, str]], text: str) -> list[tuple[str, str]]:
    if not tokens:
        raise ValueError(f"{text!r} ends too early; close its brackets")
    return tokens[1:]


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
        return {k: _as(v, args[1]) if len(args) == 2 else v for k, v in value.items()}
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
    number = scalar(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
        raise ValueError
    return int(number)


def _float(value: Any) -> float:
    number = scalar(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError
    return float(number)


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
    needs_quotes = scalar(value) != value or re.search(r"[\[\]{},'\"\\\s]", value) or not value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" if needs_quotes else value
