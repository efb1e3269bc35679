"""Initial weights are a function of the seed and the name, and look as they should."""

import torch
from steptron.model import init
from steptron.model.transformer import Transformer

from tiny import tiny_model


def test_values_depend_on_seed_and_name_only():
    config = tiny_model()
    torch.manual_seed(0)
    first, again, other = Transformer(config), Transformer(config), Transformer(tiny_model(num_layers=7))
    init.initialise(first, 7, 0.02)
    torch.manual_seed(99)
    init.initialise(again, 7, 0.02)
    init.initialise(other, 7, 0.02)
    state, state_again, state_other = first.state_dict(), again.state_dict(), other.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, state_again[name])
        assert torch.equal(tensor, state_other[name]), "another depth must not change a layer's start"
    init.initialise(again, 8, 0.02)
    assert not torch.equal(again.state_dict()["lm_head.weight"], state["lm_head.weight"])


def test_matrices_of_one_shape_start_apart():
    """No matrix, and no expert of a stack, may repeat another's values: they would be moved alike for ever."""
    model = Transformer(tiny_model())
    init.initialise(model, 7, 0.02)
    matrices = [(n, m) for n, p in model.named_parameters() if p.ndim > 1 for m in p.detach().view(-1, *p.shape[-2:])]
    assert len(matrices) > 100
    by_shape: dict[torch.Size, list] = {}
    for name, matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append((name, matrix.flatten() / matrix.norm()))
    for shape, found in by_shape.items():
        names, rows = zip(*found, strict=True)
        alike = (torch.stack(rows) @ torch.stack(rows).T).fill_diagonal_(0.0).abs()
        # Independent normal values correlate by 1 / √elements; six times that, once in a billion pairs.
        first, second = divmod(int(alike.argmax()), len(names))
        assert alike.max() < 6 * shape.numel() ** -0.5, f"{names[first]} and {names[second]} start alike"


def test_a_row_block_is_made_alone(monkeypatch):
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", 64)
    whole = torch.nn.Linear(16, 50, bias=False)
    init.initialise(whole, 1, 1.0)
    made = []
    original = init._generator
    monkeypatch.setattr(init, "_generator", lambda key: made.append(key) or original(key))
    init.initialise(torch.nn.Linear(16, 50, bias=False), 1, 1.0)
    assert made == [f"1:weight:{block}" for block in range(13)]
    assert abs(float(whole.weight.detach().mean())) < 0.1
    assert abs(float(whole.weight.detach().std()) - 1.0) < 0.1


def test_vectors_and_buffers_start_at_zero():
    model = Transformer(tiny_model())
    init.initialise(model, 1, 0.02)
    assert all(not t.any() for t in model.state_dict().values() if t.ndim == 1)
