"""A small corpus of two sources, made once for all tests of the run."""

import json
import random
from pathlib import Path

import pytest

from small_runs import steptron

WORDS = "the a one two red blue fox dog sees runs over under tree house very slow quick and then".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Folder with tokenizer.json and the sources `prose` and `code`."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for name, end in (("prose", ". "), ("code", "();\n")):
        with (folder / f"{name}.jsonl").open("w") as lines:
            for _ in range(150):
                text = "".join(
                    " ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + end for _ in range(draw.randint(1, 20))
                )
                lines.write(json.dumps({"text": text}) + "\n")
    out, tokenizer = folder / "tokens", []
    for name in ("prose", "code"):
        steptron("data", "build", folder / f"{name}.jsonl", "--out", out, "--vocab-size", 300, *tokenizer)
        tokenizer = ["--tokenizer", out / "tokenizer.json"]
    return out
