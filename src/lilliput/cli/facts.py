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
    """What `lilliput.config.facts` gives: from the file, or from the code if installed packages add names to it."""
    from importlib.metadata import entry_points

    if any(group.startswith("lilliput.") for group in entry_points().groups):
        from lilliput.config import facts as live

        return live.facts()
    return json.loads(FILE.read_text(encoding="utf-8"))


def write() -> None:
    """Write the file anew, a setting on each line."""
    from lilliput.config import facts as live

    text = json.dumps(live.facts(), indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n +(.+),\n +(.+)\n +\]", r"[\1, \2]", text)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
