"""Rows of an evaluation, and sources that are refused because a run is trained on them."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from steptron.data.evaluation import TokensInMemory, check_not_trained, evaluation_rows, num_rows
from steptron.data.source import ShardedSource
from steptron.errors import DataError

DOCUMENTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
"""Every token is another one, so that a target is known by its id."""


@pytest.mark.parametrize("tokens", [7, 15, 1000])
@pytest.mark.parametrize("seq_len", [1, 4, 6, 50])
def test_each_token_but_the_first_of_a_document_is_a_target_once(seq_len: int, tokens: int) -> None:
    """Whatever the length of a row, for the output matrix and for a head that looks one token further."""
    stream = TokensInMemory.of(DOCUMENTS)
    rows = evaluation_rows(stream, tokens, seq_len, 2, range(num_rows(stream, tokens, seq_len) + 2))
    evaluated = [ids[: max(0, tokens - start)] for ids, start in zip(DOCUMENTS, (0, 7, 8, 11), strict=True)]
    for head in (0, 1):
        targets_BT, weights_BT = rows.targets(seq_len, head)
        seen = Counter(targets_BT[weights_BT > 0].tolist())
        assert set(weights_BT.unique().tolist()) <= {0.0, 1.0}
        assert seen == Counter(token for ids in evaluated for token in ids[1 + head :])
    assert rows.tokens_BS[-2:].count_nonzero() == 0, "rows behind the last one are empty"


def test_rows_of_a_source_are_its_tokens(write_source) -> None:
    source = ShardedSource(write_source("text", [DOCUMENTS[:2], DOCUMENTS[2:]]))
    memory = TokensInMemory.of(DOCUMENTS)
    for index in range(num_rows(source, 100, 4)):
        ours, theirs = (evaluation_rows(stream, 100, 4, 1, [index]) for stream in (source, memory))
        assert ours.tokens_BS.equal(theirs.tokens_BS)
        assert ours.documents_BS.equal(theirs.documents_BS)


def source(write_source, name: str, first: int, **fields: object) -> ShardedSource:
    return ShardedSource(write_source(name, [[[first, 2, 3]]], **fields))


SIDES = {
    # The split of the evaluation source and that of the training source, both of the same files; who is refused.
    "whole and whole": ({}, {}, True),
    "held out of a source without the split": ({"hold_out": 0.1, "held_out": True}, {}, True),
    "held out, and the other side": ({"hold_out": 0.1, "held_out": True}, {"hold_out": 0.1}, False),
    "held out, and the other side of a larger split": ({"hold_out": 0.1, "held_out": True}, {"hold_out": 0.2}, False),
    "held out, and the other side of a smaller split": ({"hold_out": 0.1, "held_out": True}, {"hold_out": 0.05}, True),
    "held out and held out": ({"hold_out": 0.1, "held_out": True}, {"hold_out": 0.1, "held_out": True}, True),
    "the side for training, both": ({"hold_out": 0.1}, {"hold_out": 0.1}, True),
}


@pytest.mark.parametrize(("evaluated", "trained", "refused"), SIDES.values(), ids=SIDES.keys())
def test_sides_of_the_same_files(write_source, evaluated: dict, trained: dict, refused: bool) -> None:
    ours = source(write_source, "ours", 1, inputs="files", **evaluated)
    theirs = source(write_source, "theirs", 5, inputs="files", **trained)
    if not refused:
        assert check_not_trained("ours", ours, {"theirs": theirs}) == []
        return
    with pytest.raises(DataError, match=r"has documents from the same files as data\.sources\.theirs") as error:
        check_not_trained("ours", ours, {"theirs": theirs})
    assert "\n" not in str(error.value)


def test_the_same_folder_and_the_same_tokens_are_refused(write_source, tmp_path: Path) -> None:
    ours = source(write_source, "ours", 1)
    (tmp_path / "link").symlink_to(ours.folder)
    shutil.copytree(ours.folder, tmp_path / "copy")
    for folder, how in (
        (ours.folder, "is the folder of"),
        ("link", "is the folder of"),
        ("copy", "has the same tokens"),
    ):
        with pytest.raises(DataError, match=rf"evaluation\.sources\.ours: .* {how}.* which is trained on; build"):
            check_not_trained("ours", ours, {"theirs": ShardedSource(tmp_path / folder)})


def test_a_source_without_the_split_is_a_doubt_only_beside_a_held_out_one(write_source) -> None:
    others = {
        "split": source(write_source, "split", 5, inputs="b", hold_out=0.1),
        "unsplit": source(write_source, "unsplit", 6, inputs="c"),
    }
    held = source(write_source, "held", 7, inputs="a", hold_out=0.1, held_out=True)
    own = source(write_source, "own", 8, inputs="d")
    assert check_not_trained("held", held, others) == ["unsplit"]
    assert check_not_trained("own", own, others) == []
