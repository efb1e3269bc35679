"""Tensors that are computed again in the backward pass instead of being kept for it.

    with Forgetting() as forget:            around a layer's forward pass
        h = forget.keep(norm, x)            h = norm(x); who saves h for backward saves (norm, x) in its place
        y = linear(h)

Only what nobody else keeps is saved memory: x above must live until backward anyway, as it does where `norm` saves it. A function is
called again under no_grad, so it must be a function of its arguments (and parameters) alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Keep = Callable[..., Tensor]
"""(function, *args) → function(*args), which is kept for backward, or not."""


def keep(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The plain way: autograd keeps what it needs."""
    return function(*args)


def recomputing() -> bool:
    """Whether autograd is running: then a forward pass is a repetition, by activation checkpointing, of one that has been seen."""
    return torch._C._current_graph_task_id() != -1


class _Recipe:
    """How to compute a forgotten tensor. It is held from its first use in backward to its last."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        self._function, self._args = function, args
        self._savers = self._served = 0
        self._value: Tensor | None = None

    def saved(self, shape: torch.Size) -> "tuple[_Recipe, torch.Size]":
        self._savers += 1
        return self, shape

    def value(self, shape: torch.Size) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self._function(*self._args)
        value = self._value.view(shape)
        self._served += 1
        if self._served == self._savers:
            self._value, self._served = None, 0
        return value


class Forgetting:
    """A context in which tensors made through `keep` are not saved for backward."""

    def __init__(self) -> None:
        self._open = False
        self._made: dict[int, tuple[Tensor, _Recipe]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def keep(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), to be computed again in the backward pass."""
        made = function(*args)
        if not self._open:  # a layer that is being recomputed as a whole: nothing of it is kept for long
            return made
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        # Held until the context ends: no other tensor can have its address before.
        self._made[made.data_ptr()] = (made.detach(), _Recipe(function, plain))
        return made

    def __enter__(self) -> "Forgetting":
        self._hooks.__enter__()
        self._open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._hooks.__exit__(*error)
        self._made.clear()

    def _pack(self, tensor: Tensor) -> Any:
        made, recipe = self._made.get(tensor.data_ptr(), (None, None))
        same = made is not None and made.numel() == tensor.numel() and made.dtype is tensor.dtype
        if recipe is None or not same or not tensor.is_contiguous():
            return tensor
        return recipe.saved(tensor.shape)

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].value(packed[1])
