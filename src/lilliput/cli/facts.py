"""What help and lists say, without importing torch: read from a file that is written when the code changes.

python -m lilliput.cli.facts    # after a change of names, settings, their defaults or their words
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("facts.json")


def facts() -> dict[str, Any]:
    """What `read` gives: from the file, or from the code if installed packages add names to it."""
    from importlib.metadata import entry_points

    if any(group.startswith("lilliput.") for group in entry_points().groups):
        return read()
    return json.loads(FILE.read_text(encoding="utf-8"))


def read() -> dict[str, Any]:
    """The names and settings of `lilliput run` (see `config.facts`), and the settings of `lilliput memory`."""
    from lilliput.config.facts import facts, told
    from lilliput.config.fields import docs, fields_of
    from lilliput.footprint import Setting

    return {**facts(), "memory": told(fields_of(Setting).values(), docs(Setting))}


def write() -> None:
    """Write the file anew, a setting on each line."""
    text = json.dumps(read(), indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n +(.+),\n +(.+)\n +\]", r"[\1, \2]", text)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
