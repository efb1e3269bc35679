"""RoPE against complex rotation, and its frequencies against transformers' own."""

import pytest
import torch
from steptron.config.schema import RopeScalingConfig
from steptron.nn.rope import apply_rope, rope_frequencies, rope_tables
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@pytest.mark.parametrize("share", [0.5, 1.0], ids=["half rotary", "whole rotary"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"])
def test_is_a_rotation_of_complex_planes(share, dtype, tolerance):
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 0, 1, 1000])
    frequencies = rope_frequencies(16, share, 1e4, None)
    planes = len(frequencies)
    assert planes == int(16 * share) // 2
    x = torch.randn(6, 3, 16, dtype=dtype).requires_grad_()
    y = apply_rope(x, *rope_tables(positions, frequencies))
    turn = torch.polar(torch.ones(6, planes, dtype=torch.float64), torch.outer(positions, frequencies).double())
    wide = x.detach().double().requires_grad_()
    plane = torch.complex(wide[..., :planes], wide[..., planes : 2 * planes]) * turn[:, None]
    expected = torch.cat([plane.real, plane.imag, wide[..., 2 * planes :]], -1)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(got[0].double(), wanted[0], atol=tolerance, rtol=tolerance)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    tables = rope_tables(torch.arange(4), rope_frequencies(8, 0.5, 100.0, None).double())
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *tables), x)


def test_frequencies_are_powers_of_theta():
    frequencies = rope_frequencies(128, 0.5, 5e6, None)
    expected = torch.tensor([5e6 ** (-2 * c / 64) for c in range(32)])
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("factor", "original", "low", "high"),
    [
        pytest.param(2.0, 131072, 1.0, 32.0, id="released"),
        pytest.param(8.0, 8192, 1.0, 4.0, id="llama 3.1"),
        pytest.param(4.0, 64, 1.0, 32.0, id="short"),
    ],
)
@pytest.mark.parametrize("theta", [1e4, 5e6], ids=["1e4", "5e6"])
def test_scaling_equals_transformers(factor, original, low, high, theta):
    config = LlamaConfig(
        head_dim=64,
        num_attention_heads=1,
        hidden_size=64,
        max_position_embeddings=int(original * factor),
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "low_freq_factor": low,
            "high_freq_factor": high,
        },
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config)
    scaling = RopeScalingConfig(
        factor=factor, original_max_positions=original, low_freq_factor=low, high_freq_factor=high
    )
    frequencies = rope_frequencies(64, 1.0, theta, scaling)
    assert attention_factor == 1.0
    assert not torch.allclose(frequencies, rope_frequencies(64, 1.0, theta, None))
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0.0)
