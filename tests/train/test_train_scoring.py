"""Scores and greedy continuations against one plain forward pass of each text; a needle sweep against a reader that
finds the needle."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from steptron.config.schema import ParallelConfig
from steptron.data import tokenizer
from steptron.errors import DataError
from steptron.model.heads import logits
from steptron.model.init import initialise
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer, apply_stage
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.network import InTurn, Network
from steptron.train.haystack import QUESTION, STATEMENT, Sweep, read_filler, read_form, run_sweep
from steptron.train.process_group import meshes_over, process_group
from steptron.train.scoring import Beginning, Request, Score, Scorer

from tiny import tiny_model, tiny_stage
from waiting import PATIENCE_S

LONGEST = 24
END = 7
"""A token that ends a continuation."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = tiny_model(vocab_size=40, num_layers=3, layer_pattern="FS", num_mtp_heads=1)
    model = Transformer(config)
    initialise(model, 1, config.init_std)
    apply_stage(model, tiny_stage(), num_groups=1)
    return model


@pytest.fixture(scope="module")
def scorer(model: Transformer) -> Iterator[Scorer]:
    device = torch.device("cpu")
    with process_group(device, PATIENCE_S):
        meshes = meshes_over(resolve_layout(ParallelConfig(), 1), device, PATIENCE_S)
        yield Scorer(Network({0: model}, InTurn(model), None), meshes, LONGEST, micro_batch=2)


def plain(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token of one text, from whole logits."""
    inputs = Inputs.from_tokens(torch.tensor([ids]))
    with torch.no_grad():
        found = logits(model.eval(), model(inputs=inputs), inputs)[0].double()
    model.train()
    return torch.log_softmax(found, -1)


def some(draw: torch.Generator, count: int) -> list[int]:
    return torch.randint(8, 40, (count,), generator=draw).tolist()


def test_scores_are_those_of_each_request_alone(model: Transformer, scorer: Scorer) -> None:
    """Requests of many lengths are packed into rows. Two contexts are longer than a row; one continuation is greedy."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (5, 2), (9, 4), (30, 3), (2, 12), (20, 5), (1, 24), (3, 1), (21, 3), (7, 1)]
    requests = [Request(some(draw, a), some(draw, b)) for a, b in sizes]
    context, greedy = requests[1].context, []
    for _ in range(3):
        greedy.append(int(plain(model, context + greedy)[-1].argmax()))
    requests += [Request(context, greedy), Request(context, [*greedy[:2], (greedy[2] + 1) % 40])]
    before = scorer.num_cut
    found = scorer.run(lambda: scorer.scores(requests))
    assert found is not None
    assert scorer.num_cut == before + 1
    for request, score in zip(requests, found, strict=True):
        ids = [*request.context, *request.continuation][-LONGEST - 1 :]
        wanted = plain(model, ids[:-1])[-len(request.continuation) :]
        log_prob = sum(float(row[token]) for row, token in zip(wanted, request.continuation, strict=True))
        assert score.log_prob == pytest.approx(log_prob, rel=1e-5)
        assert score.greedy == (wanted.argmax(-1).tolist() == request.continuation)
    assert [score.greedy for score in found[-2:]] == [True, False]


def test_continuations_are_greedy_up_to_an_end_or_a_limit(model: Transformer, scorer: Scorer) -> None:
    draw = torch.Generator().manual_seed(1)
    contexts = [some(draw, count) for count in (4, 1, 30, 6)]
    limits = [9, 5, 10, 0]
    wanted: list[list[int]] = []
    for context, limit in zip(contexts, limits, strict=True):
        made: list[int] = []
        for _ in range(limit):
            made.append(int(plain(model, [*context[-(LONGEST - limit) :], *made])[-1].argmax()))
        wanted.append(made)
    end = wanted[0][3]
    short = wanted[0][: wanted[0].index(end) + 1]

    def never(made: list[int]) -> bool:
        return False

    asked = [Beginning(context, limit, never) for context, limit in zip(contexts, limits, strict=True)]
    asked.append(Beginning(contexts[0], 9, lambda made: made[-1] == end))
    assert scorer.run(lambda: scorer.continuations(asked)) == [*wanted, short]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.scores([Request([1], [2] * 25)]), "a continuation of 25 tokens is longer than a sequence of 24"),
        (lambda s: s.scores([Request([1], [40])]), "token id 40 is outside of model.vocab_size=40"),
        (lambda s: s.continuations([Beginning([1], 24, bool)]), "24 tokens to generate leave no room for a context"),
    ],
    ids=["continuation", "vocabulary", "limit"],
)
def test_what_does_not_fit_is_refused(scorer: Scorer, ask, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scorer.run(lambda: ask(scorer))


class Reader:
    """Answers as a scorer whose network finds a needle if the statement is within its reach."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.asked: list[Request] = []

    def scores(self, requests: list[Request]) -> list[Score]:
        self.asked += requests
        return [self.score(*request) for request in requests]

    def score(self, context: list[int], value: list[int]) -> Score:
        """The key and the words around it stand before the answer; they are looked for further up."""
        for size in range(10, 0, -1):
            tail = context[-size:]
            for start in range(len(context) - size - 1, -1, -1):
                if context[start : start + size] == tail and context[start + size : start + size + 6] == value:
                    return Score(-0.5, len(context) - start < self.reach)
        return Score(-9.0, False)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.LoadedTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(iter(["The number of the box is what the sun and the river see. " * 20]), 290, path)
    return tokenizer.load(path)


def test_a_sweep_counts_the_values_that_are_found(used: tokenizer.LoadedTokenizer) -> None:
    """The reader's reach decides, by length and depth; texts are whole, and a seed makes the same ones."""
    sweep = Sweep(lengths=(300, 600), depths=(0.0, 50.0, 100.0), repeats=2, pairs=3, seed=5)
    form, filler = read_form(STATEMENT, QUESTION, used), read_filler(None, used, 1000)
    reader, again, other = Reader(350), Reader(350), Reader(350)
    cells = run_sweep(sweep, form, filler, reader)  # pyright: ignore[reportArgumentType]
    assert [(cell.length, cell.depth, cell.found / cell.repeats) for cell in cells] == [
        *((300, depth, 1.0) for depth in (0.0, 50.0, 100.0)),
        *((600, depth, share) for depth, share in ((0.0, 0.0), (50.0, 1.0), (100.0, 1.0))),
    ]
    assert {cell.loss for cell in cells} == {0.5 / 6}
    for cell, request in zip([cell for cell in cells for _ in range(2)], reader.asked, strict=True):
        assert len(request.context) + len(request.continuation) == cell.length
        text, value = used.tokenizer.decode(request.context), used.tokenizer.decode(request.continuation)
        key = text.split(" Remember: the number of box ")[1][:4]
        assert text.endswith(f" Remember: the number of box {key} is ")
        place = text.index(f" The number of box {key} is {value}.")
        assert len(used.encoder.encode(text[:place]).ids) == pytest.approx(
            cell.depth / 100 * cell.length, abs=150 if cell.depth else 80
        )
        assert text.count("The number of box") == 3
    assert len({tuple(request.continuation) for request in reader.asked}) == 12
    run_sweep(sweep, form, filler, again)  # pyright: ignore[reportArgumentType]
    assert again.asked == reader.asked
    changed = Sweep(lengths=(600,), depths=(50.0,), repeats=2, pairs=3, seed=5)
    run_sweep(changed, form, filler, other)  # pyright: ignore[reportArgumentType]
    assert other.asked == reader.asked[8:10]


def test_filler_is_text_without_the_ends_of_documents(used: tokenizer.LoadedTokenizer) -> None:
    from steptron.data.evaluation import TokensInMemory

    text = TokensInMemory.of([[5, 6, used.eos_id], [8, 9, used.eos_id], [10]])
    assert read_filler(text, used, 5).tolist() == [5, 6, 8, 9]
    assert read_filler(text, used, 100).dtype == np.int64


@pytest.mark.parametrize(
    ("statement", "question", "message"),
    [
        ("no places", QUESTION, "--statement 'no places' must have {key:N} and then {value:N}"),
        ("{value:6} of {key:4}", QUESTION, "--statement '{value:6} of {key:4}' must have"),
        ("{key} {value:6}", QUESTION, "must have {key:N} and then {value:N}, once each, with a number"),
        ("{key:0} {value:6}", QUESTION, "must have {key:N}"),
        (STATEMENT, "{key:4 is", "--question '{key:4 is' must have"),
        (STATEMENT, "{key:4} {value:5}", "must have keys and values as long as those of"),
    ],
    ids=["none", "order", "digits", "zero", "brace", "length"],
)
def test_a_wording_that_cannot_be_used_is_refused(used, statement: str, question: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_form(statement, question, used)
    assert message in str(error.value)


def test_a_tokenizer_without_digits_is_refused(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="does not have a token for each digit"):
        read_form(STATEMENT, QUESTION, tokenizer.load(tmp_path / "tokenizer.json"))
