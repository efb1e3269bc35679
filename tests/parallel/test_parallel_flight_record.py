"""Messages about the flight records that NCCL's ranks leave, in the format of torch's recorder."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from steptron.parallel import flight_record as module
from steptron.parallel.flight_record import flight_record
from torch.distributed.flight_recorder.components.loader import read_dump

ALL, PAIR = ("0", "default_pg"), ("3", "mesh_ep")


def entry(number: int, name: str, group: tuple[str, str] = ALL, at: int = 0, **values: Any) -> dict[str, Any]:
    """Return an entry with all fields that torch 2.13 writes."""
    return {
        "record_id": number,
        "pg_id": int(group[0]),
        "process_group": group,
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": f"nccl:{name}",
        "time_created_ns": at or number,
        "time_discovered_started_ns": None,
        "time_discovered_completed_ns": None,
        "input_sizes": [[4, 2]],
        "input_dtypes": ["Float"],
        "output_sizes": [[4, 2]],
        "output_dtypes": ["Float"],
        "state": "completed",
        "timeout_ms": 600000,
        "is_p2p": False,
        "retired": True,
        "frames": [{"name": "all_reduce", "filename": "distributed_c10d.py", "line": 3245}],
        "thread_id": "7",
        "thread_name": "python",
        **values,
    }


WAITS = {"state": "scheduled", "retired": False}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes the record of a rank, which torch's own reader reads too."""
    prefix = str(tmp_path / "collectives-7-rank-")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", prefix)

    def write(rank: int, *entries: dict[str, Any]) -> Path:
        groups = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2]"}}
        groups["3"] = {"name": "3", "desc": "mesh_ep", "ranks": "[1, 2]"}
        path = Path(f"{prefix}{rank}")
        path.write_bytes(pickle.dumps({"version": "2.10", "pg_config": groups, "entries": list(entries)}, protocol=2))
        assert len(read_dump(path.name.removesuffix(str(rank)), str(path))["entries"]) == len(entries)
        return path

    return write


def test_the_rank_that_waits_and_the_one_that_has_not_begun_are_named(write) -> None:
    done = entry(1, "all_reduce")
    write(0, done, entry(2, "all_reduce", at=50, **WAITS))
    write(1, done)
    write(2, done, entry(2, "all_reduce", at=40, **WAITS), entry(3, "all_gather", at=60, **WAITS))
    assert flight_record().startswith(
        "; rank 2 waits in all_reduce, number 2 of process group 0 default_pg; rank 1 has not begun it; the last "
    )


def test_ranks_in_different_collectives_are_told_apart_and_other_groups_do_not_count(write) -> None:
    write(0, entry(2, "broadcast", at=90, **WAITS))
    write(1, entry(5, "all_to_all", PAIR, at=70, **WAITS), entry(9, "all_reduce", ALL, at=20))
    write(2, entry(5, "_allgather_base", PAIR, at=80, **WAITS))
    text = flight_record()
    assert (
        "; rank 1 waits in all_to_all, number 5 of process group 3 mesh_ep; rank 2 is in _allgather_base there" in text
    )
    assert "not begun" not in text, "rank 0 is not in the group"


def test_a_send_has_a_number_of_its_own(write) -> None:
    write(1, entry(0, "send 1->2", PAIR, is_p2p=True, p2p_seq_id=31, **WAITS))
    assert flight_record().startswith("; rank 1 waits in send 1->2, number 31 of process group 3 mesh_ep; the last")


def test_where_nothing_waits_only_the_files_are_named(write, tmp_path: Path) -> None:
    assert flight_record() == "", "no rank has written one"
    (tmp_path / "collectives-6-rank-0").touch()
    assert flight_record() == "", "an earlier launcher's"
    write(0, entry(1, "barrier"))
    assert flight_record() == f"; the last collectives are in {tmp_path / 'collectives-7-rank-'}*"


def test_files_that_cannot_be_read_are_named_and_do_no_harm(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named() -> bool:
        return flight_record() == f"; the last collectives are in {tmp_path / 'collectives-7-rank-'}*"

    path = write(0, entry(1, "all_reduce", **WAITS))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert named(), "as it is while the rank still writes it"
    path.write_bytes(whole.replace(b"entries", b"3ntries"))
    assert named()

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    path.write_bytes(pickle.dumps({"version": "2.10", "pg_config": {}, "entries": [], "more": Harm()}))
    assert named()
    assert not (tmp_path / "harmed").exists()
    path.write_bytes(whole)
    assert not named()
    monkeypatch.setattr(module.os, "getuid", lambda: 12345)
    assert named(), "anyone may write into /tmp"
