"""The benchmark of retrieval: its documents have one right answer to each query, and its tables count as they say."""

import numpy as np
import pytest
import retrieval
import torch

FORMS = [retrieval.DENSE, retrieval.Form(512, 8, 16, 3), retrieval.Form(4096, 8, 64, 2)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_key_has_one_value_in_a_document_and_comes_as_often_as_asked(form):
    length, line, pairs, uses = form
    ids = retrieval.document(np.random.default_rng(length), form)
    words = [retrieval.WORDS[i] for i in ids]
    assert len(words) == length
    assert [i for i, word in enumerate(words) if word == retrieval.EOS] == [length - 1]
    places = [i for i, word in enumerate(words) if word in retrieval.KEYS]
    values = {words[i]: {words[j + 1] for j in places if words[j] == words[i]} for i in places}
    assert len(values) == pairs
    assert all(len(of_key) == 1 and of_key <= set(retrieval.VALUES) for of_key in values.values())
    assert len(places) == pairs * uses == sum(word in retrieval.VALUES for word in words)
    lines = [words[i : i + line] for i in range(0, length - 1, line)]
    assert all(word in retrieval.FILLER for words in lines for word in words[: line - 2])


def test_queries_are_the_later_places_of_a_key_with_the_distance_to_its_first():
    ids = [retrieval.WORDS.index(word) for word in "f0 k3 v1 f1 k5 v2 k3 v1 f2 k5 v2 k3 v1 <eos>".split()]
    assert retrieval.queries(np.array(ids)) == [(6, 5), (9, 5), (11, 10)]


def test_different_documents_have_different_values_for_a_key():
    random = np.random.default_rng(0)
    ids = np.stack([retrieval.document(random, retrieval.Form(4096, 8, len(retrieval.KEYS), 2)) for _ in range(20)])
    key = retrieval.WORDS.index(retrieval.KEYS[7])
    values = {int(row[np.flatnonzero(row == key)[0] + 1]) for row in ids}
    assert len(values) > 10


class _Reaching:
    """A network that gives the right answer up to a distance, and the filler above it."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def logits(self, inputs):
        tokens = inputs[0].tokens_HBT[0, 0]
        logits_BTV = torch.zeros(1, len(tokens), len(retrieval.WORDS))
        logits_BTV[..., 1] = 1.0
        for place, distance in retrieval.queries(tokens.numpy()):
            if distance <= self.reach:
                logits_BTV[0, place, tokens[place + 1]] = 2.0
        return [logits_BTV]


@pytest.mark.parametrize(
    ("first", "last", "met"),
    [
        (600, 16384, [True] * 5),
        (600, 9000, [True, False, True, False, True]),
        (16384, 16384, [True, True, False, True, False]),
        (40, 16384, [False, True, True, True, True]),
    ],
    ids=["as wanted", "the last one fails", "the first one reaches as far", "the first one has learnt nothing"],
)
def test_goals_follow_from_how_far_each_checkpoint_reaches(capsys, first, last, met):
    random, found = np.random.default_rng(0), {}
    documents = {form: retrieval.document(random, form) for form in retrieval.NEW}
    documents[retrieval.LONGEST] = retrieval.document(random, retrieval.LONGEST._replace(pairs=128))
    for name, reach in (("short", first), ("long", last)):
        network = _Reaching(reach)
        found[name] = {form: retrieval.answered(network, ids) for form, ids in documents.items()}
        assert all(of[:, 1].astype(bool).tolist() == (of[:, 0] <= reach).tolist() for of in found[name].values())
    assert retrieval.show(found) == met
    assert "12,289 to 16,384" in capsys.readouterr().out
