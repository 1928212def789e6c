"""The command line of a command that takes settings: flags by argparse, and the words beside them."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def folders_and_settings(words: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """The words of a command that takes both, settings as a layer.  Raises ValueError for what is no setting."""
    from lilliput.config import words as layer  # which needs torch: `lilliput list` does not

    return [Path(word) for word in words if "=" not in word], layer(word for word in words if "=" in word)


class Line(argparse.ArgumentParser):
    """What a command takes: flags, settings (key=value, or --key value as published commands write them), folders."""

    def __init__(self, *switches: str, **valued: str):
        """switches: flags without a value.  valued: names of flags with one, and what the value is, in words."""
        super().__init__(add_help=False, allow_abbrev=False)
        self._flags = {switch: "" for switch in switches} | {
            f"--{name.replace('_', '-')}": words for name, words in valued.items()
        }
        for flag, words in self._flags.items():
            if words:
                self.add_argument(flag)
            else:
                self.add_argument(flag, action="store_true")
        self.add_argument("words", nargs="*")

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """(flags by name, the other words): every setting is written key=value in them.

        Raises ValueError for a flag that the command does not have, or one without its value.
        """
        found = vars(self.parse_intermixed_args(self._settled(argv)))
        return found, found.pop("words")

    def error(self, message: str) -> NoReturn:
        """argparse itself prints its usage and exits."""
        if match := re.fullmatch(r"argument (--[\w-]+): expected one argument", message):
            raise ValueError(f"{match[1]} needs {self._flags[match[1]]}")
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        raise ValueError(f"there is no flag {unknown!r}; settings are written key=value, flags are {self._listed()}")

    def _settled(self, argv: Sequence[str]) -> list[str]:
        """The words with `--key value` and `--key=value` as key=value; a key without a value is true."""
        words, rest = [], list(argv)
        while rest:
            word = rest.pop(0)
            flag, sign, value = word.partition("=")
            if not re.match(r"--\w", word) or flag in self._flags:
                words.append(word)
                continue
            if meant := difflib.get_close_matches(flag, self._flags, 1, 0.8):
                raise ValueError(f"there is no flag {flag!r}; did you mean {meant[0]!r}? Flags are {self._listed()}")
            if not sign:
                value = rest.pop(0) if rest and not rest[0].startswith("--") and "=" not in rest[0] else "true"
            words.append(f"{flag.removeprefix('--').replace('-', '_')}={value}")
        return words

    def _listed(self) -> str:
        return ", ".join(self._flags)
