"""server.jsonl: the server's refusals, missing ranks, start and end. The same lines go to the log.

Refusals are counted by kind, and a line is written at the 1st, 10th, 100th, … of each kind: a flood of bad frames makes
only a few lines.
"""

import collections
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steptron.monitor.storage import jsonl

log = logging.getLogger("steptron.monitor.server")


class Journal:
    """The log of one server. A full disk is reported once."""

    def __init__(self, path: Path, server: str):
        self._path, self._server = path, server
        self._failed = False
        self.refused: collections.Counter[str] = collections.Counter()
        """The number of refusals by kind."""

    def write(self, event: str, text: str, **evidence: Any) -> None:
        """Write one line. `text` is for people."""
        log.warning("%s", text)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = jsonl.dump({"time": time, "event": event, "server": self._server, **evidence, "text": text})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with jsonl.open_to_append(self._path) as file:
                file.write(line)
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written: %s", self._path, error)
            self._failed = True

    def refuse(self, kind: str, detail: str) -> None:
        """Count a refusal."""
        self.refused[kind] += 1
        count = self.refused[kind]
        if count == 10 ** (len(str(count)) - 1):
            self.write("refused", f"refused, {kind}: {detail} (number {count} of this kind)", kind=kind, count=count)
