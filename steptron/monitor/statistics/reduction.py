"""The one place that says how parts of a quantity are combined, and how derived quantities follow from them.

    parts of one statistic: micro-batches, ranks, files of ranks ── RULES ──► one value
    statistics of one cell ── derived, derived_sql ──► a derived quantity
    one quantity at several steps ── OVER_STEPS ──► a point of a curve

A maximum of nothing is NaN, and nothing does not change a maximum. A sum of nothing is 0, and a NaN in a sum stays: a
broken number is never hidden by those beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Reduction = Literal["sum", "max"]
"""The operation that combines the parts of a statistic."""
OverSteps = Literal["sum", "max", "min"]
"""The operation that combines the values of neighbouring steps for a curve."""
Powers = Sequence[tuple[str, float]]
"""A derived quantity: Π column^power."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One reduction, for each place where parts meet."""

    nothing: float
    """The content of a cell that has no part yet."""
    combine: np.ufunc
    """Combines a cell with one more part."""
    collective: str
    """The operation of a collective over ranks, by its name in `torch.distributed.ReduceOp`."""
    neutral: float
    """The value that a rank without a part puts into the collective. The result is `nothing` if all ranks do."""
    sql: str
    """The aggregate of a column, in which `{0}` is the quoted name."""


RULES: Mapping[Reduction, Rule] = {
    "sum": Rule(nothing=0.0, combine=np.add, collective="SUM", neutral=0.0, sql="sum({0})"),
    # DuckDB orders NaN above all numbers.
    "max": Rule(
        nothing=np.nan,
        combine=np.fmax,
        collective="MAX",
        neutral=-np.inf,
        sql="max({0}) FILTER (WHERE NOT isnan({0}))",
    ),
}

OVER_STEPS: Mapping[OverSteps, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda rows: np.nansum(rows, axis=0),
    "max": lambda rows: np.fmax.reduce(rows, axis=0),
    "min": lambda rows: np.fmin.reduce(rows, axis=0),
}
"""Reduce [steps, …] over the steps. A step without a value (NaN) does not count."""


def derived(powers: Powers, column: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return Π column^power cell by cell, float64. NaN where the result is not finite: there is nothing to divide by.

    Columns of the same |power| are divided first, (h / e)^½, with square roots and divisions only where that is
    possible: these are exact with every C library, and ranks decide by the results.
    """
    product = np.float64(1.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for power, above, below in _by_power(powers):
            quotient = np.float64(1.0)
            for name in above:
                quotient = quotient * column(name).astype(np.float64)
            for name in below:
                quotient = quotient / column(name).astype(np.float64)
            product = product * (quotient if power == 1 else np.sqrt(quotient) if power == 0.5 else quotient**power)
    return np.where(np.isfinite(product), product, np.nan)


def derived_sql(powers: Powers, quote: Callable[[str], str]) -> str:
    """Return the same as an SQL expression. NULL where the result is not finite."""
    factors = []
    for power, above, below in _by_power(powers):
        quotient = " * ".join(map(quote, above)) or "1"
        for name in below:
            quotient += f" / {quote(name)}"
        factors.append(f"pow({quotient}, {power!r})")
    product = " * ".join(factors)
    return f"CASE WHEN isfinite({product}) THEN {product} END"


def _by_power(powers: Powers) -> list[tuple[float, list[str], list[str]]]:
    """Return each |power|, with the columns that have it and those that have its negative."""
    groups: dict[float, tuple[list[str], list[str]]] = {}
    for name, power in powers:
        groups.setdefault(abs(float(power)), ([], []))[power < 0].append(name)
    return [(power, above, below) for power, (above, below) in groups.items()]
