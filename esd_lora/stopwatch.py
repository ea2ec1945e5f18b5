"""`Stopwatch`: where the time of a run goes, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds by stage, from now on.

    On a CUDA device the marks are events in its queue, so that nothing waits for them before `seconds` is asked for.

    Args:
        device: Where the stages' work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._started = time.perf_counter()
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._earlier: Mapping[str, float] = {}

    def go_on(self, earlier: Mapping[str, float]) -> None:
        """Count what a watch told of earlier parts of the same work, too."""
        self._earlier = earlier

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside counts for this stage; stages do not nest."""
        start = self._mark()
        yield
        self._spans.setdefault(name, []).append((start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, in the order of their first use; `other` is the rest of the whole, the last, `total`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        stages = {name: self._earlier[name] for name in self._earlier if name not in ("other", "total")}
        for name, spans in self._spans.items():
            stages[name] = stages.get(name, 0.0) + sum(self._between(*span) for span in spans)
        total = time.perf_counter() - self._started + self._earlier.get("total", 0.0)
        return {**stages, "other": max(0.0, total - sum(stages.values())), "total": total}

    def _between(self, start: Any, end: Any) -> float:
        seconds: float = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        return seconds
