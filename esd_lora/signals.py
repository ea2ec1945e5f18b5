"""`Signals`: a run that is told to stop, by Ctrl-C or a scheduler, does so where it can go on from."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Inside, the first SIGINT or SIGTERM is kept in `came` until it is asked for; a second one acts as ever.

    Outside the main thread, where Python has no say in signals, none is kept; one that is ignored stays so.
    """

    def __init__(self) -> None:
        self.came = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        """Begin to keep signals."""
        if threading.current_thread() is threading.main_thread():
            kept = [s for s in STOPS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
            self._before = {s: signal.signal(s, self._keep) for s in kept}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let signals act as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _keep(self, number: int, _: FrameType | None) -> None:
        self.came = number
        self.__exit__(None, None, None)


def stop(number: int) -> BaseException:
    """What ends a process that got this signal: exit code 130 or 143, as shells have it."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
