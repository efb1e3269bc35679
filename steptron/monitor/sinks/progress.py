"""The progress line for a person: a bar on a terminal, or a plain line every few seconds if the output is a file.

long 2/3 ━━━━━━━╸━━━ 61%  step 12/20  loss 3.1415  grad norm 0.812  12.3K tokens/s  MFU 38%  5.2 GiB  ETA 12:34

`loss` is that of the next token, and the memory is the peak of rank 0 in this stage. A narrow terminal leaves out
some parts. Warnings from the log appear above the bar, or between the lines.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

PLAIN_EVERY_S = 5.0
"""The seconds between plain lines."""

_WINDOW = 32
"""The number of steps over which the speed is averaged."""
_BAR = 10
"""The least width of the bar on a terminal, with its spaces."""


class ProgressLine:
    """The progress over the whole run, by tokens. It is a context manager."""

    def __init__(
        self,
        stages: Mapping[str, int],
        last_step: int,
        tokens: int = 0,
        console: Console | None = None,
        memory: Callable[[], int] | None = None,
    ):
        """Start the line.

        Args:
            stages: token budget by stage, in order.
            last_step: the number of the run's last step.
            tokens: tokens trained on before (in a resumed run).
            console: where to print. None: standard error.
            memory: returns the peak of memory in bytes. None: it is not shown.
        """
        self._last_step, self._memory = last_step, memory
        self._names = list(stages)
        self._total = sum(stages.values())
        self._stage = ""
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # tokens and seconds of each step
        self._printed = -math.inf
        self._last_line = ""
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("starting", total=self._total, completed=tokens, numbers="")
            self._bar.start()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a step. Reads step, stage, tokens, loss, grad_norm, lr, mfu, batch_tokens and step_time."""
        stage = str(metrics["stage"])
        changed = stage != self._stage
        if changed:  # another length has another speed
            self._recent.clear()
            self._stage = stage
        self._recent.append((metrics["batch_tokens"], metrics["step_time"]))
        where = f"{stage} {self._names.index(stage) + 1}/{len(self._names)}" if stage in self._names else stage
        speed = self.tokens_per_second()
        mfu = [] if metrics["mfu"] is None else [f"MFU {metrics['mfu']:.0%}"]
        memory = [] if self._memory is None else [f"{self._memory() / (1 << 30):.1f} GiB"]
        norm = f"grad norm {metrics['grad_norm']:.3g}"
        step, loss = f"step {metrics['step']:,}/{self._last_step:,}", f"loss {metrics['loss']:.4f}"
        parts = [step, loss, norm, f"{short(speed)} tokens/s", *mfu, *memory]
        left = max(0, self._total - metrics["tokens"])  # a stage ends with the step that reaches its budget
        eta = f"ETA {duration(left / speed)}" if speed > 0 else "ETA –"
        share = min(1.0, metrics["tokens"] / self._total)
        if self._bar is not None:
            numbers = [f"{share:4.0%}", *parts, eta]
            for part in (*memory, *mfu, norm):
                if len(where) + len("  ".join(numbers)) + _BAR > self._console.width:
                    numbers.remove(part)
            numbers = "  ".join(numbers)
            self._bar.update(self._task, description=where, completed=metrics["tokens"], numbers=numbers)
            return
        self._last_line = " · ".join([where, *parts, f"lr {metrics['lr']:.3g}", f"{share:.1%}", eta])
        if changed or time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._print_plain()

    def tokens_per_second(self) -> float:
        """Return the speed over the last steps of this stage."""
        seconds = sum(second for _, second in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else 0.0

    def say(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """End the line; its last state stays visible."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._last_line:
            self._print_plain()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _print_plain(self) -> None:
        if self._last_line:
            self.say(self._last_line)
        self._last_line = ""
        self._printed = time.monotonic()


class Warnings(logging.Handler):
    """Shows each warning of the log once, as a line on standard error; errors are printed by the command line.

    While a bar is on the terminal, rich redirects standard error and prints the warning above the bar.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning; the traceback of a bug goes only to the log file."""
        text = " ".join(record.getMessage().split())
        if record.levelno == logging.WARNING and text not in self._shown:
            self._shown.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)


def short(number: float) -> str:
    """Return a count with about three digits: 950, 12.3K, 4.50M, 17.2T."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            value = number / factor
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{value:.{digits}f}{suffix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:34, 3:25:09, or 2 d 03 h."""
    whole = round(seconds)
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
