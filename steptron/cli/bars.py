"""Progress bars in bytes, for the commands that read a lot of data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steptron.data.tokenize import BuildReporter


@contextmanager
def bars() -> Iterator["BuildReporter"]:
    """Show one progress bar per task on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())

    class Bars:
        def begin(self, task: str, num_bytes: int) -> None:
            self.end()
            self.task = rich.add_task(task, total=num_bytes)

        def advance(self, num_bytes: int) -> None:
            rich.advance(self.task, num_bytes)

        def end(self) -> None:
            for task in rich.tasks:
                rich.update(task.id, completed=task.total)

    with Progress(*columns, console=Console(stderr=True)) as rich:
        reporter = Bars()
        yield reporter
        reporter.end()
