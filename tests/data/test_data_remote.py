import fcntl
import gzip
import json
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from steptron.cli.main import main
from steptron.data.documents import file_items
from steptron.data.fields import PLAIN
from steptron.data.readers import Unread
from steptron.data.remote import Cache, Remote, find_remote
from steptron.data.source import read_info
from steptron.errors import DataError


@pytest.fixture
def server():
    """Files in fsspec's file system in memory, below memory://bucket."""
    files = fsspec.filesystem("memory")

    def put(name: str, content: bytes) -> str:
        files.pipe(f"/bucket/{name}", content)
        return f"memory:///bucket/{name}"

    yield put
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1000)


def read(spec: str, cache: Cache) -> tuple[list[str], list[str]]:
    items, unread = file_items([spec], PLAIN, cache)
    found = [*unread, *(document for item in items for document in item.documents())]
    return [text for text in found if isinstance(text, str)], [
        str(place) for place in found if isinstance(place, Unread)
    ]


def use(cache: Cache, remote: Remote) -> None:
    with cache.opened(remote):
        pass


def copies(cache: Cache) -> list[str]:
    return sorted(path.name.split("-")[1] for path in cache.folder.iterdir() if not path.name.startswith("."))


def test_files_folders_and_patterns_behind_urls_are_read_as_local_ones_are(server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10**6)
    server("a.txt", b"alpha")
    server("deep/b.json.gz", gzip.compress(b'{"text": "beta"}\n{"text": "gamma"}\n'))
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ["delta"]}), sink)
    server("deep/c.parquet", sink.getvalue().to_pybytes())
    server("deep/.hidden/d.txt", b"hidden")
    assert read("memory:///bucket", cache) == (["alpha", "beta", "gamma", "delta"], [])
    assert read("memory:///bucket/deep/*.gz", cache) == (["beta", "gamma"], [])
    server("deep/LICENCE", b"free")
    assert read("memory:///bucket/deep/LICENCE", cache) == (["free"], [])
    server("deep/e.jsonl", b'{"text": "cut off')
    texts, lines = read("memory:///bucket/deep", cache)
    assert texts == ["beta", "gamma", "delta"]
    assert [line.split(" is ")[0].split(": not")[0] for line in lines] == [
        "memory:///bucket/deep/LICENCE",
        "memory:///bucket/deep/e.jsonl, line 1",
    ]


def test_the_cache_keeps_what_was_used_last_and_never_grows_above_its_size(server, cache: Cache) -> None:
    urls = [server(f"{name}.txt", name.encode() * 400) for name in "abc"]
    fetched = {url: find_remote(url)[0] for url in urls}
    for number, url in enumerate([urls[0], urls[1], urls[0], urls[2]]):
        with cache.opened(fetched[url]) as path:
            assert path.read_bytes() == fsspec.open(url).open().read()
        os.utime(path, ns=(number, number))
    assert copies(cache) == ["a.txt", "c.txt"]
    other = server("a.txt", b"other")
    with cache.opened(find_remote(other)[0]) as path:
        assert path.read_bytes() == b"other", "a file that has changed is another one"


def test_a_copy_in_use_stays_and_a_cache_without_room_is_told(server, cache: Cache) -> None:
    first, second, large = (find_remote(server(f"{n}.txt", b"x" * n))[0] for n in (600, 601, 1001))
    with cache.opened(first) as path:
        with pytest.raises(DataError, match=r"601\.txt does not fit .*: 600 of 1,000 bytes are in use.*--cache-size"):
            use(cache, second)
        assert path.stat().st_size == 600
    with cache.opened(second):
        assert copies(cache) == ["601.txt"]
    with pytest.raises(DataError, match=r"1001\.txt has 1,001 bytes, and the cache .* holds 1,000: give more"):
        use(cache, large)


def test_what_a_killed_process_left_is_removed_and_what_another_copies_is_not(server, cache: Cache) -> None:
    cache.folder.mkdir()
    left, busy = cache.folder / "1-left.txt.part", cache.folder / "2-busy.txt.part"
    for path in (left, busy):
        path.write_bytes(b"x" * 400)
    with (cache.folder / ".2-busy.txt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with cache.opened(find_remote(server("new.txt", b"x" * 500))[0]):
            assert copies(cache) == ["busy.txt.part", "new.txt"]


def test_an_address_that_fails_is_one_line(server, cache: Cache, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"memory://absent/a\.txt cannot be listed .*check the address"):
        file_items(["memory://absent/a.txt"], PLAIN, cache)
    with pytest.raises(DataError, match=r"nothing://a cannot be listed \(Protocol not known: nothing\)"):
        file_items(["nothing://a"], PLAIN, cache)
    url = server("a.txt", b"a")
    items, _ = file_items([url], PLAIN, cache)
    fsspec.filesystem("memory").rm("/bucket/a.txt")
    [line] = items[0].documents()
    assert str(line).startswith(f"{url} cannot be fetched (")


def test_a_build_from_a_url(server, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"text": f"text {number} {line} " * 9}) for line in range(60)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    words = ["data", "build", f"file://{folder}", "--out", str(tmp_path / "out"), "--name", "web", "--workers", "1"]
    words += ["--vocab-size", "300", "--cache", str(tmp_path / "cache"), "--cache-size", "20K"]
    assert main(words) == 0
    assert read_info(tmp_path / "out" / "web").num_documents == 180
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 20_000
    assert main(words) == 0
    assert "already built" in capsys.readouterr().out
    assert main([*words[:-1], "x"]) == 2
    assert "--cache-size=x must be a number of bytes" in capsys.readouterr().err
