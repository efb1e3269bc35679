from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from steptron.data.documents import file_items
from steptron.data.fields import Fields
from steptron.data.readers import Unread
from steptron.errors import DataError

TEXTS = [f"text {n}" for n in range(11)]


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one dataset, of a shard for each text, in the place of the network. Returns what is asked of it."""
    asked = []

    def rows(texts):
        yield from ({"doc": {"body": text}} for text in texts)

    def load(name, subset, *, split, revision, streaming):
        asked.append((name, subset, split, revision, streaming))
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"texts": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha="abc"))
    return asked


def test_a_dataset_by_name_is_streamed_shard_by_shard_from_one_commit(hub) -> None:
    items, unread = file_items(["datasets:org/web:en:validation"], Fields("doc.body"))
    assert not unread
    assert len(items) == len(TEXTS)  # a list of arguments of a generator is its shards
    assert [document for item in items for document in item.documents()] == TEXTS
    assert set(hub) == {("org/web", "en", "validation", "abc", True)}
    assert len({item.origin for item in items}) == len(TEXTS)
    [line] = file_items(["datasets:org/web"])[0][2].documents()
    assert isinstance(line, Unread)
    assert str(line).startswith("datasets:org/web:train, shard 2 of 11, row 0: has no field 'text'")
    assert hub[-1] == ("org/web", None, "train", "abc", True)


def test_without_a_network_it_is_refused_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def offline(self, name):
        raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach the Hub:\noffline mode")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(
        DataError, match=r"datasets:org/web cannot be opened \(Cannot reach .*\): check .*network"
    ) as caught:
        file_items(["datasets:org/web"])
    assert "\n" not in str(caught.value)


def test_a_shard_that_breaks_off_is_named(hub, monkeypatch) -> None:
    items, _ = file_items(["datasets:org/web"], Fields("doc.body"))

    def broken(*names, **options):
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    [line] = items[1].documents()
    assert str(line) == (
        "datasets:org/web:train, shard 1 of 11, after 0 rows: cannot be read further (reset): try again, or leave it out"
    )


@pytest.mark.parametrize("spec", ["datasets:", "datasets:a:b:c:d"])
def test_a_malformed_name_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="must be datasets:NAME"):
        file_items([spec])
