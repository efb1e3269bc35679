"""Read torch's flight recorder and name a collective that did not end: its rank, name and number in its group.

    NCCL's watchdog aborts ─► one file of each rank, at the path that launch/env.sh sets
    files of this host ─► each rank's entries ─► the oldest unfinished collective, and who has not begun it ─► one line

A file is a pickle of plain dicts, lists, texts and numbers. The format is in torch's tutorial "Flight Recorder for
Debugging Stuck Jobs", and torch.distributed.flight_recorder reads it too. Nothing else is unpickled here, and no file
of another user. This module does not import what handles tensors, so that a launcher starts in half the time.
"""

import os
import pickle
import re
from collections.abc import Iterable
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

PATH_VARIABLE = "TORCH_FR_DUMP_TEMP_FILE"
"""Environment variable with the path of the records, to which torch appends the rank."""
MOST_BYTES = 2**28
"""The size of the largest file that is read. The record of a collective has about 1 KB."""
NAMED = 8
"""The largest number of ranks that a message names."""


class Collective(NamedTuple):
    """A collective or a point-to-point operation of one rank."""

    rank: int
    name: str
    """all_reduce, send 0->1, … of any back end."""
    group: str
    """The name and the description of its process group."""
    number: int
    """The sequence number in the group. Those of point-to-point operations are counted apart."""
    is_p2p: bool
    done: bool
    created_ns: int


class Record(NamedTuple):
    """The last operations of one rank, oldest first."""

    rank: int
    operations: list[Collective]
    ranks_of: dict[str, tuple[int, ...]]
    """The ranks of each process group by name, as far as they are known."""


class _Plain(pickle.Unpickler):
    """Reads built-in containers, texts and numbers. A pickle that names a class or a function is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not part of a flight record")


def flight_record() -> str:
    """Return what the flight records of this host say, and where they are, to append to a message; "" without any."""
    prefix = os.environ.get(PATH_VARIABLE, "")
    paths = [Path(name) for name in glob(f"{escape(prefix)}*")] if prefix else []
    if not paths:
        return ""
    records = [record for path in paths if (record := read(path, prefix)) is not None]
    return f"{explain(records)}; the last collectives are in {prefix}*"


def read(path: Path, prefix: str) -> Record | None:
    """Return the record of the rank whose number follows `prefix` in the path. None if it is not complete, of another
    format, of another user or too large."""
    try:
        rank = int(str(path).removeprefix(prefix))
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_size > MOST_BYTES:
                return None
            found = _Plain(file).load()
        entries = sorted(found["entries"], key=lambda entry: entry["record_id"])
        members = found["pg_config"].values()
        ranks_of = {str(one["name"]): tuple(map(int, re.findall(r"\d+", str(one["ranks"])))) for one in members}
        return Record(rank, [_operation(rank, entry) for entry in entries], ranks_of)
    except Exception:  # a file that is still being written, or damaged, may lead to any error
        return None


def _operation(rank: int, entry: dict[str, Any]) -> Collective:
    is_p2p = bool(entry["is_p2p"])
    return Collective(
        rank=rank,
        name=str(entry["profiling_name"]).partition(":")[2],
        group=" ".join(map(str, entry["process_group"])),
        number=int(entry["p2p_seq_id" if is_p2p else "collective_seq_id"]),
        is_p2p=is_p2p,
        done=bool(entry["retired"]) or entry["state"] == "completed",
        created_ns=int(entry["time_created_ns"]),
    )


def explain(records: Iterable[Record]) -> str:
    """Return what the ranks wait for, to append to a message; "" if all operations of all records are done."""
    known = {record.rank: record for record in records}
    waiting = [one for record in known.values() for one in record.operations if not one.done]
    if not waiting:
        return ""
    stuck = min(waiting, key=lambda one: (one.created_ns, one.rank))
    text = f"; rank {stuck.rank} waits in {stuck.name}, number {stuck.number} of process group {stuck.group}"
    if stuck.is_p2p:
        return text
    members = known[stuck.rank].ranks_of.get(stuck.group.partition(" ")[0], tuple(known))
    late, others = [], []
    for rank in members:
        if rank not in known:
            continue
        same_group = [one for one in known[rank].operations if one.group == stuck.group and not one.is_p2p]
        if max((one.number for one in same_group), default=0) < stuck.number:
            late.append(rank)
        others += [one for one in same_group if one.number == stuck.number and one.name != stuck.name]
    text += "".join(f"; rank {one.rank} is in {one.name} there" for one in others[:NAMED])
    if late:
        return f"{text}; {_ranks(late)} not begun it"
    return text


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
    return f"rank {shown} has" if len(ranks) == 1 else f"ranks {shown} have"
