"""Who is named when a collective has failed, from what the ranks have answered."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from steptron.parallel.rank_status import RankStatus
from steptron.parallel.watchdog import Board, _culprit, _failed_collective, _where_in

from waiting import PATIENCE_S


@pytest.fixture
def boards() -> list[Board]:
    """The boards of eight ranks on one store."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=PATIENCE_S), wait_for_workers=False)
    boards = [Board(store, rank) for rank in range(8)]
    for board in boards:
        board._host = f"n{board._rank // 4}"
        RankStatus(board.write, board._rank).enter(11 + (board._rank < 4), "data")
    return boards


def test_silent_ranks_are_named_first(boards: list[Board]) -> None:
    for rank in (0, 1, 2, 4, 5):
        boards[rank].answer("failed", "all_reduce in f (a.py)", "step 12, data")
    boards[6].answer("busy", "g (b.py:3), called from f (a.py)", "step 11, data")
    assert boards[0].num_answers() == 6
    assert _culprit(boards[0].answers(), boards[0], 8) == (
        "rank 3 (host n0) was last heard of in step 12, data; rank 7 (host n1) was last heard of in step 11, data"
    )


def test_many_silent_ranks_are_counted(boards: list[Board]) -> None:
    boards[0].answer("failed", "all_reduce in f (a.py)", "step 12, data")
    text = _culprit(boards[0].answers(), boards[0], 8)
    assert text.count("last heard of") == 4
    assert text.endswith("; 3 more are lost too")


def test_then_those_that_are_in_no_collective(boards: list[Board]) -> None:
    for board in boards[:7]:
        board.answer("waiting", "all_reduce in f (a.py)", "step 12, data")
    boards[7].answer("busy", "g (b.py:3), called from f (a.py)", "step 11, data")
    assert _culprit(boards[0].answers(), boards[0], 8) == (
        "rank 7 (host n1) is in step 11, data, still in g (b.py:3), called from f (a.py)"
    )


def test_a_mismatch_names_each_collective(boards: list[Board]) -> None:
    for board in boards:
        board.answer("waiting", f"{'barrier' if board._rank == 5 else 'all_reduce'} in f (a.py)", "step 12, data")
    assert _culprit(boards[0].answers(), boards[0], 8) == (
        "no rank is missing; rank 0 waits in all_reduce in f (a.py), rank 5 waits in barrier in f (a.py)"
    )


def test_the_lowest_rank_that_failed_speaks_once(boards: list[Board]) -> None:
    assert not boards[0].alarm()
    boards[0].answer("waiting", "all_reduce in f (a.py)", "step 12, data")
    for rank in (5, 2):
        boards[rank].answer("failed", "all_reduce in f (a.py)", "step 12, data")
    assert boards[0].alarm()
    assert [board.claims() for board in boards] == [rank == 2 for rank in range(8)]
    boards[0].answer("failed", "all_reduce in f (a.py)", "step 12, data")
    assert not boards[0].claims(), "a rank has spoken already"
    assert boards[0].num_answers() == 3, "rank 0 counts once"
    assert [(a.rank, a.kind) for a in boards[7].answers()] == [(0, "failed"), (2, "failed"), (5, "failed")]


def test_an_error_of_a_product_is_no_collectives() -> None:
    assert _failed_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert _failed_collective(ValueError("gloo")) is None
    assert _failed_collective(dist.DistBackendError("timeout")) is not None
    assert _where_in([]) == ("busy", ", called from code outside steptron")
