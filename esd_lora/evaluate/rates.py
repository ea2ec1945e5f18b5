"""Rates of pictures, with what is known of them: n, interval, and the base's own rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """A share of n pictures with its 95 % Wilson interval, and the base's share where it was measured."""

    value: float
    n: int
    low: float
    high: float
    base: float | None = None

    @property
    def retained(self) -> float | None:
        """The patched rate over the base's own."""
        return self.value / self.base if self.base else None

    def interval(self) -> str:
        """In per cent, such as `97.5 [94, 99]`."""
        return f"{100 * self.value:.1f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    def short(self) -> str:
        """Such as `97.5 [94, 99] /200, base 98.0`."""
        beside = "" if self.base is None else f", base {100 * self.base:.1f}"
        return f"{self.interval()} /{self.n}{beside}"


def rate(hits: Sequence[bool], base_hits: Sequence[bool] | None = None) -> Rate:
    """The share of hits with its 95 % Wilson score interval (Wilson 1927).

    Raises:
        ValueError: There are no pictures.
    """
    n, z = len(hits), 1.959964
    if not n:
        raise ValueError("a rate of no pictures")
    p = sum(hits) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    base = sum(base_hits) / n if base_hits is not None else None
    # the interval holds p, which rounding may leave outside where all or none are hits
    return Rate(p, n, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), base)
