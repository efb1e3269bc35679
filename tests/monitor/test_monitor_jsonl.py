"""JSON lines: exact floats, torn lines passed over."""

import json
import math
import random
import struct

import numpy as np
import pytest
from steptron.monitor.storage import jsonl


def test_floats_come_back_bit_for_bit(tmp_path):
    generator = random.Random(0)
    bits = [generator.getrandbits(64) for _ in range(2000)]
    floats = [value for (value,) in (struct.unpack("<d", struct.pack("<Q", word)) for word in bits)]
    floats = [value for value in floats if math.isfinite(value)] + [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    path = tmp_path / "x.jsonl"
    with jsonl.open_to_append(path) as file:
        file.write(jsonl.dump({"values": floats}))
    (row,) = jsonl.read(path)
    assert [struct.pack("<d", value) for value in row["values"]] == [struct.pack("<d", value) for value in floats]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(np.float32(0.1), 0.10000000149011612, id="float32"),
        pytest.param(np.int64(2**40), 2**40, id="int64"),
        pytest.param(np.arange(3), [0, 1, 2], id="array"),
        pytest.param(math.inf, math.inf, id="infinity"),
    ],
)
def test_numpy_scalars_become_plain_numbers(value, expected):
    assert json.loads(jsonl.dump({"value": value}))["value"] == expected


def test_values_without_a_json_form_are_named():
    with pytest.raises(TypeError, match="set"):
        jsonl.dump({"value": {1, 2}})


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        pytest.param('{"step": 1}\n{"step": 2}\n', [1, 2], id="whole"),
        pytest.param('{"step": 1}\n{"step": 2, "lo', [1], id="torn"),
        pytest.param('{"step": 1}\n{"step": 2}', [1], id="newline missing"),
        pytest.param('{"step": 1}\n{"st\n{"step": 3}\n', [1, 3], id="torn in the middle"),
        pytest.param('{"step": 1}\n\0\0\0\0', [1], id="zeros after a power cut"),
        pytest.param("17\n", [], id="no object"),
        pytest.param("", [], id="empty"),
    ],
)
def test_only_whole_lines_are_read(tmp_path, text, steps):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert [row["step"] for row in jsonl.read(path)] == steps


def test_a_missing_file_has_no_rows(tmp_path):
    assert list(jsonl.read(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 18])
@pytest.mark.parametrize("tail", ["", "half a li"], ids=["whole", "torn"])
def test_backwards_gives_the_lines_from_the_last_to_the_first(tmp_path, monkeypatch, block, tail):
    monkeypatch.setattr(jsonl, "_BLOCK", block)
    path = tmp_path / "x"
    path.write_bytes(("a\n\nbb\r\nccc" + "d" * 50 + "\n" + "é\u2028x\n" + tail).encode())
    with path.open("rb") as file:
        forwards = list(file)
    assert [line for _, line in jsonl.backwards(path)] == forwards[::-1]
    content = path.read_bytes()
    assert all(content[end - len(line) : end] == line for end, line in jsonl.backwards(path))
    path.write_bytes(b"")
    assert list(jsonl.backwards(path)) == []
