"""Intervals and tests of rates, against every resample and every toss of a coin counted out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest

from esd_lora.evaluate.rates import cluster_bootstrap, mean_of_few, newcombe, paired, rate

DRAWS = 20_000
TAIL = 5 * math.sqrt(0.025 * 0.975 / DRAWS)
"""Five standard errors of a tail of 2.5 % that so many draws are counted in."""

Outcomes = list[tuple[float, float]]
"""Means and their probabilities."""


def are_quantiles(interval: tuple[float, float], outcomes: Outcomes) -> bool:
    """Whether 2.5 % of the outcomes are below the interval and as many above, as far as draws can tell."""

    def below(bound: float, sign: int) -> tuple[float, float]:
        """Probability of the outcomes beyond the bound, and of those up to it."""
        beyond = sum(p for mean, p in outcomes if sign * mean < sign * bound - 1e-12)
        return beyond, sum(p for mean, p in outcomes if sign * mean <= sign * bound + 1e-12)

    tails = [below(interval[0], 1), below(interval[1], -1)]
    return all(beyond <= 0.025 + TAIL and upto >= 0.025 - TAIL for beyond, upto in tails)


def resamples(clusters: Sequence[Sequence[int]]) -> Outcomes:
    """The mean of every way to draw as many clusters as there are."""
    ways = list(itertools.product(clusters, repeat=len(clusters)))
    return [(mean_of(way), 1 / len(ways)) for way in ways]


def mean_of(parts: Iterable[Sequence[int]]) -> float:
    hits = [h for part in parts for h in part]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("n", "t"), [(3, 4.303), (5, 2.776), (6, 2.571), (20, 2.093), (26, 2.060), (1001, 1.962)])
def test_the_interval_of_few_values_is_students(n: int, t: float) -> None:
    """t as printed in tables, to three decimals; the expansion is off by a hundredth of it at most."""
    values = [0.2, -0.1, *[0.05] * (n - 2)]
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    found = mean_of_few(values)
    assert (found.value, found.n) == (pytest.approx(mean), n)
    assert found.high - mean == pytest.approx(mean - found.low) == pytest.approx(t * error, rel=1e-2)
    assert mean_of_few([0.3] * n).low == pytest.approx(0.3)
    with pytest.raises(ValueError, match="an interval over 1 values"):
        mean_of_few([0.3])


@pytest.mark.parametrize("k", [1, 9, 30])
def test_clusters_of_one_picture_are_the_plain_bootstrap(k: int) -> None:
    """A draw with replacement from n pictures with k hits has a binomial number of hits."""
    n = 60
    outcomes = [(i / n, math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i)) for i in range(n + 1)]
    found = cluster_bootstrap([i < k for i in range(n)], range(n), draws=DRAWS)
    assert are_quantiles(found, outcomes)
    assert not are_quantiles((found[0] - 2 / n, found[1]), outcomes)  # the check itself can tell
    assert not are_quantiles((found[0], found[1] + 2 / n), outcomes)


def test_whole_clusters_of_any_size_are_drawn() -> None:
    clusters = [[1, 1, 1], [0], [0, 1], [0, 0, 0, 0], [1, 0, 0]]
    hits = [h for c in clusters for h in c]
    keys = [f"prompt {i}" for i, c in enumerate(clusters) for _ in c]
    found = cluster_bootstrap(hits, keys, draws=DRAWS)
    assert are_quantiles(found, resamples(clusters))
    assert not are_quantiles(cluster_bootstrap(hits, range(len(hits)), draws=DRAWS), resamples(clusters))


def test_nested_clusters_are_drawn_within_those_that_were_drawn() -> None:
    prompts = [[[1, 1], [0]], [[0, 0, 1]], [[1], [0, 0], [0, 1]]]
    rows = [(h, (p, s)) for p, seeds in enumerate(prompts) for s, part in enumerate(seeds) for h in part]
    ways = [[(tuple(w), len(p) ** -len(p)) for w in itertools.product(p, repeat=len(p))] for p in prompts]
    outcomes = []
    for drawn in itertools.product(range(3), repeat=3):
        for parts in itertools.product(*(ways[i] for i in drawn)):
            mean = mean_of(part for way, _ in parts for part in way)
            outcomes.append((mean, math.prod(p for _, p in parts) / 27))
    assert sum(p for _, p in outcomes) == pytest.approx(1)
    hits, keys = zip(*rows, strict=True)
    nested = cluster_bootstrap(hits, keys, draws=DRAWS)
    assert are_quantiles(nested, outcomes)
    assert nested != cluster_bootstrap(hits, [p for p, _ in keys], draws=DRAWS)


def test_copies_of_a_picture_tell_nothing_new() -> None:
    hits = [i % 3 == 0 for i in range(100)]
    alone = cluster_bootstrap(hits, range(100))
    copies = [h for h in hits for _ in range(4)]
    assert cluster_bootstrap(copies, [i // 4 for i in range(400)]) == alone
    low, high = cluster_bootstrap(copies, range(400))
    # four times as many pictures, were they independent, halve an interval; the bootstrap's own noise is some per cent
    assert high - low == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15)


def test_a_seed_gives_one_interval_and_equal_hits_a_point() -> None:
    hits = [i % 7 < 3 for i in range(90)]
    keys = [(i // 30, i // 10) for i in range(90)]
    assert cluster_bootstrap(hits, keys) == cluster_bootstrap(hits, keys, seed=0)
    assert cluster_bootstrap(hits, range(90), seed=1) != cluster_bootstrap(hits, range(90), seed=2)
    for value in (0, 1):
        assert cluster_bootstrap([value] * 90, keys) == (value, value)
    assert cluster_bootstrap([1, 0], ["one prompt"] * 2) == (0.5, 0.5)


@pytest.mark.parametrize(("b", "c"), list(itertools.product(range(6), repeat=2)))
def test_mcnemar_is_the_share_of_coin_tosses_that_are_as_one_sided(b: int, c: int) -> None:
    hits_a = [True] * b + [False] * c + [True, False, False]
    hits_b = [False] * b + [True] * c + [True, False, False]
    found = paired(hits_a, hits_b)
    tosses = list(itertools.product((-1, 1), repeat=b + c))
    as_extreme = sum(abs(sum(t)) >= abs(b - c) for t in tosses) / len(tosses)
    assert found.p == pytest.approx(as_extreme, abs=1e-15)
    assert (found.only_first, found.only_second, found.n) == (b, c, b + c + 3)
    assert found.difference == pytest.approx((b - c) / (b + c + 3), abs=1e-15)


def test_mcnemar_of_thousands_of_pictures() -> None:
    """2 · P[X ≤ 450] of 1,000 tosses; the normal approximation with continuity correction, good to a per cent here."""
    p = paired([True] * 450 + [False] * 550, [False] * 450 + [True] * 550).p
    assert p == pytest.approx(math.erfc(49.5 / math.sqrt(250) / math.sqrt(2)), rel=0.01)


def test_the_interval_of_a_difference_is_that_of_the_pairs() -> None:
    hits_a = [i % 10 != 0 for i in range(200)]
    hits_b = [a and i % 25 != 1 for i, a in enumerate(hits_a)]  # eight hits fewer, none more
    found, back = paired(hits_a, hits_b), paired(hits_b, hits_a)
    n, k = 200, 8
    outcomes = [(i / n, math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i)) for i in range(60)]
    assert found.difference == pytest.approx(k / n)
    drawn = cluster_bootstrap([a - b for a, b in zip(hits_a, hits_b, strict=True)], range(n))
    assert are_quantiles(drawn, outcomes)  # of independent pictures it would be twice as wide
    ends = newcombe(hits_a, hits_b)
    assert (found.low, found.high) == (min(drawn[0], ends[0]), max(drawn[1], ends[1]))
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    grouped = paired(hits_a, hits_b, [i // 50 for i in range(n)])
    # two in each group of fifty, whichever is drawn: the bootstrap is a point
    assert (grouped.low, grouped.high) == ends
    assert (grouped.p, grouped.difference) == (found.p, found.difference)
    apart = paired([True] * 100 + [False] * 100, [False] * 200, [i // 100 for i in range(200)])
    assert (apart.low, apart.high) == (0, 1)  # of two clusters that are opposites, wider than of 200 pictures


@pytest.mark.parametrize(
    ("pairs", "ends"),
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((20, 12, 2, 16), (0.0562, 0.3292)), ((18, 12, 2, 18), (0.0562, 0.3290))],
)
def test_a_difference_of_pairs_has_newcombes_interval(
    pairs: tuple[int, int, int, int], ends: tuple[float, float]
) -> None:
    """His own examples (Statistics in Medicine 17, 1998, 2635-2650, table III, method 10), to the four places printed."""
    both, first, second, neither = pairs
    hits_a = [True] * (both + first) + [False] * (second + neither)
    hits_b = [True] * both + [False] * first + [True] * second + [False] * neither
    assert newcombe(hits_a, hits_b) == pytest.approx(ends, abs=5e-5)
    assert [-end for end in newcombe(hits_b, hits_a)] == pytest.approx(ends[::-1], abs=5e-5)


@pytest.mark.parametrize("hits", [[True] * 12, [False] * 12])
def test_a_difference_that_was_never_seen_is_not_known_to_be_none(hits: list[bool]) -> None:
    """Of twelve pictures that are all alike the other way can differ in a quarter: Wilson's 0 of 12 goes to 24 %."""
    found = paired(hits, hits)
    assert (found.difference, found.p) == (0, 1)
    assert (found.low, found.high) == pytest.approx((-0.2425, 0.2425), abs=1e-4)


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^0 pictures in 0 clusters: each needs one, all nested equally deep$"):
        cluster_bootstrap([], [])
    with pytest.raises(ValueError, match=r"^2 pictures in 1 clusters"):
        cluster_bootstrap([True, False], ["a"])
    with pytest.raises(ValueError, match="all nested equally deep"):
        cluster_bootstrap([True, False], ["a", ("a", 1)])
    with pytest.raises(ValueError, match=r"^pairs of 2 and 1 pictures$"):
        paired([True, False], [True])
    with pytest.raises(ValueError, match=r"^pairs of 0 and 0 pictures$"):
        paired([], [])


def test_a_difference_of_two_shares_has_newcombes_interval() -> None:
    """His first example (Statistics in Medicine 17, 1998, table II, method 10): 56 of 70 beside 48 of 80."""
    some, others = rate([True] * 56 + [False] * 14), rate([True] * 48 + [False] * 32)
    more = some.beyond(others)
    assert (more.value, more.low, more.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)  # as printed
    assert others.beyond(some).high == pytest.approx(-more.low)
