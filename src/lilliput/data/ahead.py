"""A thread that makes the next batches while the model trains: tokenising releases the interpreter lock."""

from __future__ import annotations

import queue
import threading
from typing import Any

from lilliput.data.sequences import Batch, Position, Sequences


class Ahead:
    """Makes up to `depth` batches of a stream ahead; `position` is the stream's after the last batch returned."""

    def __init__(self, stream: Sequences, n: int, depth: int):
        """n: sequences per batch; depth: 0 makes each batch when it is needed."""
        self.position: Position = stream.position
        self._stream, self._n = stream, n
        self._made: queue.Queue[tuple[Any, Position]] | None = queue.Queue(depth) if depth else None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def batch(self) -> Batch | None:
        """The next batch, or None at the end of the stream.  Raises what the stream raised."""
        made, self.position = self._next()
        if isinstance(made, BaseException):
            raise made
        return made

    def _next(self) -> tuple[Any, Position]:
        if self._made is None:
            return self._stream.batch(self._n), self._stream.position
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._made,), daemon=True)
            self._thread.start()
        return self._made.get()

    def _work(self, made: queue.Queue[tuple[Any, Position]]) -> None:
        item: Any = ()
        while item is not None and not isinstance(item, BaseException) and not self._closed.is_set():
            try:
                item = self._stream.batch(self._n)
            except BaseException as error:
                item = error
            self._put(made, (item, self._stream.position))

    def _put(self, made: queue.Queue[tuple[Any, Position]], item: tuple[Any, Position]) -> None:
        while not self._closed.is_set():
            try:
                made.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """End the thread and drop the batches that nobody took."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
