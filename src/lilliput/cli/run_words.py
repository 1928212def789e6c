"""The command line of `lilliput run`, sorted into flags, settings and what Hydra is told."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lilliput.cli.arguments import Line

_LINE = Line("-m", "--multirun", "--dry", "--check", "--cfg", "--plain", config="a file", count="all or published")


@dataclass
class Args:
    """The command line of `run`, sorted."""

    settings: list[str] = field(default_factory=list)
    hydra: list[str] = field(default_factory=list)
    config: str | None = None
    sweep: bool = False
    check: bool = False
    cfg: bool = False
    dry: bool = False
    count: str | None = None
    plain: bool = False

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Args:
        """Raises ValueError for a flag that there is not."""
        flags, typed = _LINE.parse(argv)
        hydra = [word for word in typed if word.startswith(("hydra.", "hydra/", "+hydra.", "++hydra."))]
        flags["sweep"] = flags.pop("m") | flags.pop("multirun")
        args = cls([word for word in typed if word not in hydra], hydra, **flags)
        if args.dry and args.sweep:
            raise ValueError("--dry tells of one run; leave -m out, and repeat the command for others")
        if args.hydra and not args.sweep:
            raise ValueError(f"{args.hydra[0]} says how to sweep; add -m")
        return args


def tell(remarks: Iterable[str]) -> None:
    """Say on the error stream what was noted of settings."""
    for remark in remarks:
        print(f"lilliput: note: {remark}", file=sys.stderr)
