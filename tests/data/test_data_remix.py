"""A mix that changes at a sample: every source continues with its next sample, and the shares are the new ones from there
on."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steptron.config.schema import DataConfig, LrConfig, SourceConfig, StageConfig
from steptron.data.drawn import refuse_other_data, remix
from steptron.data.loader import Loader
from steptron.data.remix import Remixed


class Weighted:
    """A naive mixture: each sample goes to the source that is furthest behind its share."""

    def __init__(self, **weights: int):
        self._weights = weights

    def locate(self, index: int) -> tuple[str, int]:
        counts = self.counts(index)
        total = sum(self._weights.values())
        name = max(sorted(counts), key=lambda name: (index + 1) * self._weights[name] / total - counts[name])
        return name, counts[name]

    def counts(self, length: int) -> dict[str, int]:
        counts = dict.fromkeys(self._weights, 0)
        total = sum(self._weights.values())
        for index in range(length):
            name = max(sorted(counts), key=lambda name: (index + 1) * self._weights[name] / total - counts[name])
            counts[name] += 1
        return counts


@given(st.lists(st.integers(1, 12), max_size=3), st.integers(0, 12))
def test_each_source_goes_on_with_its_next_sample(lengths: list[int], rest: int) -> None:
    weights = [{"a": 1, "b": 2}, {"b": 1, "c": 3}, {"a": 5}, {"c": 1, "a": 1}]
    firsts = [sum(lengths[:part]) for part in range(len(lengths) + 1)]
    mixed = Remixed([(first, Weighted(**of)) for first, of in zip(firsts, weights, strict=False)])
    seen: Counter[str] = Counter()
    for index in range(firsts[-1] + rest):
        name, ordinal = mixed.locate(index)
        assert ordinal == seen[name]
        assert name in weights[max(part for part, first in enumerate(firsts) if first <= index)]
        seen[name] += 1
        assert {name: count for name, count in mixed.counts(index + 1).items() if count} == seen


@pytest.fixture
def data(write_source, tokenizer_file) -> DataConfig:
    documents = [[[*range(1, 20), 0] for _ in range(9)]]
    sources = {name: SourceConfig(path=str(write_source(name, documents))) for name in ("code", "prose", "math")}
    return DataConfig(sources=sources, tokenizer=str(tokenizer_file))


def loader(data: DataConfig, **mix: float) -> Loader:
    stage = StageConfig(tokens=9999, seq_len=8, batch_size=4, mix=mix, lr=LrConfig(peak=1.0))
    return Loader(data, {"base": stage}, seed=1, num_mtp_heads=0, vocab_size=100)


def test_a_fork_gives_its_stage_another_mix_and_a_resume_of_it_has_the_same(data: DataConfig) -> None:
    old, new = loader(data, code=1, prose=3), loader(data, code=1, math=1)
    drawn = remix(old.facts(["base"]), "base", 40, new.facts(["base"]))
    forked = new.continued(drawn)
    refuse_other_data(drawn, ["base"], forked.facts)
    before = old.tokens_by_source("base", range(40))
    assert before == {"code": 80, "prose": 240}
    assert forked.tokens_by_source("base", range(40, 80)) == {"code": 160, "math": 160}
    code = [forked.batch("base", [n]).rows.tokens_BS.tolist() for n in range(40, 80)]
    sources = [forked.batch("base", [n]).sources[0] for n in range(40, 80)]
    alone = loader(data, code=1)
    expected = iter(alone.batch("base", [n]).rows.tokens_BS.tolist() for n in range(10, 30))
    assert all(row == next(expected) for row, source in zip(code, sources, strict=True) if source == "code")
    assert next(expected, None) is None, "all of them, from the eleventh on"
    again = remix(drawn, "base", 60, old.facts(["base"]))
    assert again["stages"]["base"]["earlier"] == [[40, {"code": 1.0, "prose": 3.0}], [60, {"code": 1.0, "math": 1.0}]]
    assert remix(drawn, "base", 60, new.facts(["base"])) == drawn
    assert loader(data, code=1, prose=3).continued(again).tokens_by_source("base", range(60, 100))["code"] == 80
