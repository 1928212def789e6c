"""`lilliput run --dry`: what a run would cost, before it costs it."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.cli.run_words import tell
from lilliput.config import Settings, changed
from lilliput.config.build import build
from lilliput.config.checks import check

COUNTS = ("all", "published")


def dry(chosen: Sequence[Settings], count: str = "all") -> int:
    """Print the bytes of each sort of round, and memory and FLOPs of the clients; the exit status.

    It is 1 for a run that would end early, for want of clients that can hold the method.
    """
    from lilliput.engines.dry import predict

    if count not in COUNTS:
        raise ValueError(f"--count {count} is not one of {', '.join(COUNTS)}")
    stopped = False
    for s in chosen:
        s = changed(s, {"engine": "dry"})
        check(s)
        built = build(s)
        tell(built.remarks)
        predicted = predict(built.experiment)
        head = f"{built.settings['algorithm']}, {built.settings['model']}, {built.settings['dataset']}"
        title = f"{s['case']}: {head}" if s["case"] else head
        print(f"{title}, {predicted.clients} clients: predicted, nothing was trained\n\n{predicted.table(count)}\n")
        stopped = stopped or bool(predicted.stopped)
    return int(stopped)
