"""The rows that a part yields: a figure with its bound, or what stopped a part; comparison with float64, and timing."""

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Verdict = Literal["right", "wrong", "measured", "failed", "not run"]

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The largest error allowed of a result in this dtype, as `error` measures it."""
TIMED_S = 0.2
"""The seconds for which a function is repeated to measure its time."""


class Given(NamedTuple):
    """The facts that a part is told."""

    device: str = "cpu"
    """`cuda` or `cpu`. On the CPU all sizes are small."""
    flops: float | None = None
    """The measured bf16 products of the device in operations per second; None if they were not measured."""
    bandwidth: float | None = None
    """The measured bytes per second of a copy, read and written; None if it was not measured."""
    folder: Path = Path()
    """An empty folder for files."""

    @property
    def cuda(self) -> bool:
        """Return whether the part runs on a CUDA device."""
        return self.device == "cuda"

    def pick(self, on_cuda, on_cpu):
        """Return the first value on a CUDA device, else the second."""
        return on_cuda if self.cuda else on_cpu


class Row(NamedTuple):
    """One line of the table."""

    name: str
    figure: float | None = None
    """The error, time or speed."""
    unit: str = ""
    bound: float | None = None
    """The largest figure allowed of a `right` or `wrong` row, the roof of a `measured` one."""
    verdict: Verdict = "measured"
    note: str = ""


def failed(name: str, error: BaseException) -> Row:
    """Return the row of a check that raised this error."""
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(where[0].filename).name}:{where[0].lineno})" if where else ""
    lines = str(error).splitlines() or [""]
    return Row(name, verdict="failed", note=f"{type(error).__name__}: {lines[0][:300]}{place}")


def not_run(name: str, why: str) -> Row:
    """Return the row of a check that cannot run here."""
    return Row(name, verdict="not run", note=why)


def guarded(name: str, check: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a check. An exception becomes the row `name`, so that the checks after it run."""
    try:
        yield from check()
    except Exception as raised:
        yield failed(name, raised)


def error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference ÷ that of `want`, or a tenth of the largest such ratio of a row (last dim).

    The norm of a row counts at least as much as the rows' mean norm. So one wrong row among many is seen, and rounding
    errors of rows that happen to be near 0 are not. Infinite if `got` is not finite or has another shape.
    """
    if got.shape != want.shape:
        return math.inf
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    if not got.isfinite().all():
        return math.inf
    if not want.numel():
        return 0.0
    got, want = (t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in (got, want))
    norms, differences = want.norm(dim=1), (got - want).norm(dim=1)
    of_rows = differences / norms.clamp(min=max(float(norms.mean()), 1e-30))
    return max(float(differences.norm() / norms.norm().clamp(min=1e-30)), float(of_rows.max()) / 10)


def judged(name: str, figure: float, bound: float, unit: str = "", note: str = "") -> Row:
    """Return the row of a figure that must be at most `bound`."""
    return Row(name, figure, unit, bound, "right" if figure <= bound else "wrong", note)


def compared(name: str, got: Sequence[Tensor], want: Sequence[Tensor], bounds: float | Sequence[float]) -> Row:
    """Return the row of the largest error of several tensors, each over its bound; `bounds` are one or as many."""
    allowed = [bounds] * len(want) if isinstance(bounds, float | int) else bounds
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i])
    note = f"errors {', '.join(f'{found:.1e}' for found in errors)}" if len(errors) > 1 else ""
    return judged(name, errors[worst], allowed[worst], note=note)


def synchronise(given: Given) -> None:
    """Wait for the device."""
    if given.cuda:
        torch.cuda.synchronize()


def seconds_of(given: Given, function: Callable[[], object]) -> float:
    """Return the median seconds of a call, over `TIMED_S` of calls after a warm-up; by events on a CUDA device."""
    for _ in range(2):
        function()
    synchronise(given)
    start = time.perf_counter()
    function()
    synchronise(given)
    count = min(50, max(3, int(TIMED_S / max(time.perf_counter() - start, 1e-6))))
    if not given.cuda:
        return statistics.median(_wall_seconds(function) for _ in range(min(count, 5)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    synchronise(given)
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def _wall_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
