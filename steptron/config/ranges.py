"""Allowed ranges of single numbers. validate.py and validate_monitoring.py list them by section and field."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """The allowed values of a number."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    or_rest: bool = False
    """If true, −1 is allowed too."""

    def holds(self, value: float) -> bool:
        if self.or_rest and value == -1:
            return True
        return not (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
        )

    def rule(self) -> str:
        parts = [
            f"{name} {bound:g}"
            for name, bound in (
                ("above", self.above),
                ("at least", self.at_least),
                ("below", self.below),
                ("at most", self.at_most),
            )
            if bound is not None
        ]
        return " and ".join(parts) + (", or -1 for what is left of the ranks" if self.or_rest else "")


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
COUNT = Range(at_least=1)
AXIS = Range(at_least=1, or_rest=True)
SHARE = Range(above=0, at_most=1)
BETA = Range(at_least=0, below=1)
