"""Rates of pictures, with what is known of them: n, interval, and the base's own rate.

    rate                 a share of pictures that tell nothing of each other      Wilson's interval
    Rate.beyond          how far it is above that of other pictures               Newcombe's interval
    cluster_bootstrap    a mean over pictures that are alike within a prompt      whole prompts are drawn again
    mean_of_few          a mean over a few targets                                Student's interval
    newcombe             the difference of two shares of the same pictures        Newcombe's interval
    paired               two ways of drawing the same pictures                    McNemar's test, and their difference

All intervals are of 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


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

    def beyond(self, other: Rate) -> Rate:
        """How far this share is above that of other pictures, with its 95 % interval of both shares' own.

            d − √((p₁ − l₁)² + (u₂ − p₂)²)  to  d + √((u₁ − p₁)² + (p₂ − l₂)²),      d = p₁ − p₂

        with l and u the ends of Wilson's intervals (Newcombe 1998, method 10). Negative where it is below.
        """
        d = self.value - other.value
        low = d - math.hypot(self.value - self.low, other.high - other.value)
        high = d + math.hypot(self.high - self.value, other.value - other.low)
        return Rate(d, self.n, low, high)

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
    n = len(hits)
    if not n:
        raise ValueError("a rate of no pictures")
    p = sum(hits) / n
    return Rate(p, n, *wilson(p, n), sum(base_hits) / n if base_hits is not None else None)


def wilson(p: float, n: int) -> tuple[float, float]:
    """The ends of the 95 % Wilson score interval of a share p of n ≥ 1 pictures."""
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # the interval holds p, which rounding may leave outside where all or none are hits
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def cluster_bootstrap(
    hits: Sequence[float], clusters: Sequence[Hashable], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of hits, with whole clusters drawn again.

    The bootstrap of hierarchical data (Efron 1979; Davison and Hinkley 1997, section 3.8). Pictures of one prompt are
    alike, so that n of them tell less than n independent ones. A draw takes as many clusters as there are, with
    replacement; nested ones are drawn likewise within each that was drawn, and the innermost come whole. Of few clusters,
    below ten or so, the interval is too narrow, and of a single one it is a point.

    Args:
        hits: One for each picture: a bool, or any number that has a mean, such as a difference of two hits.
        clusters: What each picture belongs to: a key such as its prompt, or a tuple of keys, the outermost first, such as
            (prompt, seed, training seed).
        draws: How often to draw.
        seed: Of the draws.

    Returns:
        The 2.5 % and 97.5 % quantiles of the means of the draws.

    Raises:
        ValueError: There are no pictures, a picture has no cluster, or some are nested deeper than others.
    """
    keys = [key if isinstance(key, tuple) else (key,) for key in clusters]
    if not len(hits) or len(hits) != len(keys) or len(set(map(len, keys))) > 1:
        raise ValueError(f"{len(hits)} pictures in {len(keys)} clusters: each needs one, all nested equally deep")
    values, rng = np.asarray(hits, np.float64), np.random.default_rng(seed)

    def totals(rows: Sequence[int], level: int, times: np.ndarray) -> np.ndarray:
        """Sum of hits and number of pictures (2, draws), of rows that are a cluster drawn so many times (draws,)."""
        if level == len(keys[0]):
            return np.outer([values[rows].sum(), len(rows)], times)
        within: dict[Hashable, list[int]] = {}
        for row in rows:
            within.setdefault(keys[row][level], []).append(row)
        n = len(within)
        counts = rng.multinomial(times * n, np.full(n, 1 / n))  # (draws, n)
        parts = [totals(r, level + 1, counts[:, j]) for j, r in enumerate(within.values())]
        whole: np.ndarray = np.sum(parts, 0)
        return whole

    total, pictures = totals(range(len(values)), 0, np.ones(draws, np.int64))
    low, high = np.quantile(total / pictures, (0.025, 0.975)).tolist()
    return low, high


def mean_of_few(values: Sequence[float]) -> Rate:
    """The mean of independent values, such as differences over targets, with its 95 % interval; n is their number.

        mean ± t s / √n,        s² = Σ (x_i − mean)² / (n − 1),    t the 97.5 % quantile of Student's t of n − 1

    Student 1908. Of few values it is wider than a bootstrap, as it must be; t by the expansion in 1 / (n − 1) of Abramowitz and
    Stegun 1964, 26.7.5, to a hundredth from three values on. Where all are equal it is a point.

    Raises:
        ValueError: There are fewer than two.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over {n} values")
    mean, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    half = _student(n - 1) * spread
    return Rate(mean, n, mean - half, mean + half)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(freedom) ** k for k, term in enumerate(terms))


@dataclass(frozen=True)
class Paired:
    """What two ways of drawing the same n pictures differ in."""

    difference: float
    """The rate of the first minus that of the second."""
    low: float
    high: float
    """Its 95 % interval, the wider of a bootstrap's and Newcombe's at each end."""
    only_first: int
    only_second: int
    """Pictures that are hits of one way alone."""
    p: float
    """Two-sided, of McNemar's exact test: how often chance alone is as one-sided, were both ways alike."""
    n: int


def paired(
    hits_a: Sequence[bool], hits_b: Sequence[bool], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Paired:
    """The difference of two rates on the same pictures, its interval, and McNemar's exact test (McNemar 1947).

        p = min(1, 2 · P[X ≤ min(b, c)]),    X ~ Binomial(b + c, ½)

    with b and c the pictures that are hits of one way alone: the others say nothing about which is better. The test takes
    pictures as independent; where those of a prompt are alike, trust the interval. Each of its ends is the bootstrap's over
    clusters or Newcombe's over pictures, whichever is further away: where hardly any picture differs, or there are few
    clusters, a bootstrap alone is too narrow, and a point where none does.

    Args:
        hits_a, hits_b: Of the same prompts and the same noise, in the same order.
        clusters: See `cluster_bootstrap`; every picture is its own by default.
        seed: Of the bootstrap's draws.

    Raises:
        ValueError: There are no pictures, or not as many of one way as of the other.
    """
    n = len(hits_a)
    if not n or n != len(hits_b):
        raise ValueError(f"pairs of {n} and {len(hits_b)} pictures")
    differences = [float(a) - float(b) for a, b in zip(hits_a, hits_b, strict=True)]
    drawn = cluster_bootstrap(differences, range(n) if clusters is None else clusters, seed=seed)
    ends = drawn, newcombe(hits_a, hits_b)
    b, c = differences.count(1), differences.count(-1)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return Paired(sum(differences) / n, low, high, b, c, min(1.0, 2 * tail / 2 ** (b + c)), n)


def newcombe(hits_a: Sequence[bool], hits_b: Sequence[bool]) -> tuple[float, float]:
    """The ends of the 95 % interval of the difference of two shares of the same independent pictures.

        d − √(x² − 2φ x y + y²),    x = p₁ − l₁,  y = u₂ − p₂,    to    d + √(x² − 2φ x y + y²),    x = u₁ − p₁,  y = p₂ − l₂

    with l and u the ends of Wilson's intervals and φ the correlation of the two, its numerator e h − f g (e hits of both, h of
    none) taken n / 2 nearer to 0 where it is positive (Newcombe 1998, "based on paired data", method 10).
    """
    n, k = len(hits_a), (sum(hits_a), sum(hits_b))
    both = sum(a and b for a, b in zip(hits_a, hits_b, strict=True))
    along: float = both * (n - sum(k) + both) - (k[0] - both) * (k[1] - both)
    along = max(along - n / 2, 0) if along > 0 else along
    spread = math.sqrt(k[0] * k[1] * (n - k[0]) * (n - k[1]))
    phi = along / spread if spread else 0.0
    a, b = rate(hits_a), rate(hits_b)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    d = a.value - b.value
    return d - reach(a.value - a.low, b.high - b.value), d + reach(a.high - a.value, b.value - b.low)
