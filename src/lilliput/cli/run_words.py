"""The command line of `lilliput run`, sorted into flags, settings and what Hydra is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lilliput.config import from_file, words

USAGE = "lilliput run [-m] [--config FILE] [--dry] [--count published] [--check] [--cfg] [--plain] [key=value ...]"


@dataclass
class Args:
    """The command line of `run`, sorted."""

    settings: list[str] = field(default_factory=list)
    hydra: list[str] = field(default_factory=list)
    config: str | None = None
    sweep: bool = False
    check: bool = False
    show: bool = False
    dry: bool = False
    count: str = "all"
    plain: bool = False
    help: str | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Args:
        """Raises ValueError for a flag there is not."""
        args, rest = cls(), list(argv)
        while rest:
            word = rest.pop(0)
            if word in _FLAGS:
                setattr(args, _FLAGS[word], True)
            elif word in ("-h", "--help"):
                args.help = rest.pop(0) if rest else ""
            elif word.partition("=")[0] in ("--config", "--count"):
                setattr(args, word.partition("=")[0].removeprefix("--"), _value(word, rest))
            elif word.startswith("-"):
                raise ValueError(_unknown(word, rest))
            elif word.startswith(("hydra.", "hydra/", "+hydra.", "++hydra.")):
                args.hydra.append(word)
            else:
                args.settings.append(word)
        if args.dry and args.sweep:
            raise ValueError("--dry tells of one run; leave -m out, and repeat the command for others")
        if args.hydra and not args.sweep:
            raise ValueError(f"{args.hydra[0]} says how to sweep; add -m")
        return args

    def layers(self, settings: Sequence[str]) -> list[dict[str, Any]]:
        """The configuration file, if any, and these words."""
        return [*([from_file(self.config)] if self.config else []), words(settings)]


_FLAGS = {"-m": "sweep", "--multirun": "sweep", "--dry": "dry", "--check": "check", "--cfg": "show", "--plain": "plain"}


def _value(word: str, rest: list[str]) -> str:
    name, sign, value = word.partition("=")
    if not sign and not rest:
        raise ValueError(f"{name} needs {'a file' if name == '--config' else 'all or published'}")
    return value if sign else rest.pop(0)


def _unknown(word: str, rest: Sequence[str]) -> str:
    name, sign, value = word.lstrip("-").partition("=")
    value = value if sign else rest[0] if rest else "..."
    setting = f"{name.replace('-', '_')}={value}"
    return f"there is no flag {word!r}; settings are written {setting}, flags are {', '.join(_FLAGS)}"
