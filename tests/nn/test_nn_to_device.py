"""Copies to a device: pinned where CUDA reads them, plain elsewhere."""

import pytest
import torch
from steptron.nn.to_device import to_device
from torch import Tensor


def test_without_cuda_it_is_a_plain_copy():
    values = torch.arange(5)
    assert to_device(values, "cpu") is values
    assert to_device(values, torch.device("meta")).is_meta


def test_a_copy_to_cuda_is_of_pinned_memory_and_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda values: asked.append("pin") or values)
    monkeypatch.setattr(Tensor, "to", lambda values, device, **options: asked.append((str(device), options)) or values)
    to_device(torch.arange(5), "cuda:1")
    assert asked == ["pin", ("cuda:1", {"non_blocking": True})]
