"""The command line: one file per command, imported when it is called.

What a user can put right ends as one line on the error stream and exit status 2; LILLIPUT_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "run": "train, as key=value settings say; -m sweeps over several values",
    "pretrain": "train a language model on one owner's text; LLaMA and others, in a fraction of the memory",
    "memory": "what training needs of memory, before anything is allocated; whether it fits, and what would make it",
    "resume": "continue an interrupted run exactly where it stopped",
    "compare": "tables and figures of several runs",
    "evaluate": "score a run's model, or weights of your own, on the test set",
    "list": "what there is: algorithms, models, data sets, partitions, recipes, ...",
    "new": "write a running method of your own and its test",
    "demo": "twenty devices, half of them too small for the model",
    "doctor": "versions, devices, memory, and what is missing here",
}

HELP = """lilliput trains one model across devices too small for it.

  lilliput run                                      a first run, seconds: FedAvg, ten clients, handwritten digits
  lilliput run algorithm=fedprox fedprox.mu=0.1     another method, and a setting of its own
  lilliput run -m algorithm=fedavg,scaffold seed=0,1,2      all six; typed again, only what is missing
  lilliput compare runs/                            what came of them

commands
{commands}

`lilliput COMMAND --help` tells more, `lilliput run --help NAME` what can be set for a method, model or data set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for work that failed, 2 for what the user can put right."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except KeyboardInterrupt as error:
        print(f"lilliput: stopped{_remedy(error)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lilliput list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        return report(error)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:10}{line}" for name, line in COMMANDS.items())))
        return 0
    if args[0] in ("-V", "--version", "version"):
        from lilliput import __version__

        print(f"lilliput {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from lilliput.core.registry import nearest

        raise ValueError(f"there is no command {args[0]!r}; {nearest(args[0], COMMANDS)}")
    from lilliput.cli.help import help_on

    told = help_on(args[0], args[1:])
    if told is not None:
        print(told)
        return 0
    # A module called `list` would hide the built-in from this package.
    module = {"list": "listing"}.get(args[0], args[0])
    return importlib.import_module(f"lilliput.cli.{module}").main(args[1:])


def report(error: BaseException) -> int:
    """Print an error as one line; its exit status."""
    if os.environ.get("LILLIPUT_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    status, line = explain(error)
    print(f"lilliput: {line}", file=sys.stderr)
    return status


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for an error: 2 where the user can put it right, 1 where it is in a program."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return 2, f"the disk is full{where}; free some space{_remedy(error)}"
    if isinstance(error, PermissionError) and error.filename:
        return 2, f"no permission for {error.filename}; choose another place with folder=..."
    if isinstance(error, FileNotFoundError) and error.errno == errno.ENOENT:
        return 2, f"there is no {error.filename}"
    ours = type(error).__module__.startswith("lilliput.")
    if ours or (isinstance(error, ValueError | OSError | ImportError) and text):
        return 2, text + _remedy(error)
    what = f"{type(error).__name__}: {text or 'no more is said'}{_place(error)}"
    return 1, f"{what} (LILLIPUT_DEBUG=1 shows all of it){_remedy(error)}"


def _remedy(error: BaseException) -> str:
    """How to go on with the run that an error ended, if it got somewhere."""
    folder = getattr(error, "lilliput_folder", None)
    return f"; `lilliput resume {folder}` goes on with it" if folder else ""


def _place(error: BaseException) -> str:
    """` at file:line` of the innermost line that is the user's, or ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
