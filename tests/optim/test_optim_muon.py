"""Muon against singular values moved one by one in float64: orthogonalisation, steps, parameters without a gradient."""

import pytest
import torch
from steptron.optim import muon
from steptron.optim.muon import Muon, orthogonalise

COEFFICIENTS = [
    [8.28721201814563, -23.595886519098837, 17.300387312530933],
    [4.107059111542203, -2.9478499167379106, 0.5448431082926601],
    [3.9486908534822946, -2.908902115962949, 0.5518191394370137],
    [3.3184196573706015, -2.488488024314874, 0.51004894012372],
    [2.300652019954817, -1.6689039845749473, 0.4188073119525673],
    [1.891301407787398, -1.2679958271945868, 0.37680408948524835],
]
SHAPES = {"square": (12, 12), "wide": (8, 20), "tall": (20, 8), "row": (1, 7), "column": (7, 1)}


def polar(x_RC: torch.Tensor) -> torch.Tensor:
    """Each singular value goes through the six polynomials, all but the last at 1/1.01 of itself."""
    u, s, v = torch.linalg.svd(x_RC.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() * 1.01 + 1e-7)
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        s = s / 1.01 if i < 5 else s
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def reference_steps(p: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float, beta: float):
    """One matrix, one step after another, float64."""
    p, momentum = p.double().clone(), torch.zeros_like(p, dtype=torch.float64)
    for g in gradients:
        momentum = beta * momentum + g.double()
        p = p - lr * decay * p - lr * 0.2 * max(p.shape) ** 0.5 * polar(g.double() + beta * momentum)
    return p


def well_conditioned(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Singular values between 1 and 3."""
    u, _, v = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    return u @ torch.diag_embed(1 + 2 * torch.rand(u.shape[:-2] + v.shape[-2:-1], generator=generator)) @ v


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4], ids=["small", "plain", "large"])
def test_orthogonalise_equals_the_polynomials_of_singular_values(shape: tuple[int, int], scale: float):
    x_MRC = scale * well_conditioned(torch.Generator().manual_seed(1), 3, *shape)
    y_MRC = orthogonalise(x_MRC)
    assert (y_MRC.dtype, y_MRC.shape) == (x_MRC.dtype, x_MRC.shape)
    for x, y in zip(x_MRC, y_MRC, strict=True):
        torch.testing.assert_close(y.double(), polar(x), rtol=0, atol=1e-5)
        assert (torch.linalg.svdvals(y) - 1).abs().max() < 0.3


def test_an_ill_conditioned_matrix_is_made_orthogonal_too():
    """Six iterations lift singular values from a thousandth of the norm to about one."""
    generator = torch.Generator().manual_seed(2)
    u, _, v = torch.linalg.svd(torch.randn(16, 24, generator=generator), full_matrices=False)
    x_RC = u @ torch.diag(torch.logspace(0, -3, 16)) @ v
    y = orthogonalise(x_RC[None])[0]
    assert (torch.linalg.svdvals(y) - 1).abs().max() < 0.3
    torch.testing.assert_close(y.double(), polar(x_RC), rtol=0, atol=1e-3)


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("chunk", [1, 1 << 24], ids=["a matrix at a time", "all at a time"])
def test_three_steps_equal_the_reference(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(muon, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(4)
    shapes = SHAPES | {"square 2": (12, 12), "square 3": (12, 12), "experts": (5, 6, 9), "tall experts": (3, 9, 6)}
    start = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    gradients = {name: [well_conditioned(generator, *shape) for _ in range(3)] for name, shape in shapes.items()}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = Muon.of(dict(parameters), weight_decay=0.1, momentum=0.95)
    for i in range(3):
        for name, p in parameters.items():
            p.grad = gradients[name][i].clone()
        optimizer.step(0.02)
    for name, p in parameters.items():
        if p.ndim == 2:
            expected = reference_steps(start[name], gradients[name], 0.02, 0.1, 0.95)
        else:
            stacks = [start[name].unbind(), *(g.unbind() for g in gradients[name])]
            expected = torch.stack(
                [reference_steps(first, list(rest), 0.02, 0.1, 0.95) for first, *rest in zip(*stacks, strict=True)]
            )
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_gradient_nothing_moves():
    parameters: dict[str, torch.Tensor] = {
        "still": torch.nn.Parameter(torch.ones(3, 4)),
        "experts": torch.nn.Parameter(torch.ones(2, 3, 4)),
    }
    moving = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Muon.of(parameters | {"moving": moving}, weight_decay=0.1, momentum=0.95)
    moving.grad = torch.eye(3, 4)
    optimizer.step(0.1)
    for name, p in parameters.items():
        assert torch.equal(p, torch.ones_like(p))
        assert not optimizer.state[name]["momentum"].any()
    assert not torch.equal(moving, torch.ones(3, 4))
    assert torch.equal(moving.grad, torch.eye(3, 4)), "the gradient is read, not used up"


def test_an_expert_without_tokens_is_only_decayed():
    p = torch.nn.Parameter(torch.ones(2, 3, 4))
    optimizer = Muon.of({"experts": p}, weight_decay=0.1, momentum=0.95)
    p.grad = torch.stack([torch.eye(3, 4), torch.zeros(3, 4)])
    optimizer.step(0.5)
    torch.testing.assert_close(p[1].detach(), torch.full((3, 4), 0.95))
