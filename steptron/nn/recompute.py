"""Recompute chosen tensors in backward instead of keeping them from forward.

    with Forgetting() as forget:            around a layer's forward pass
        h = forget.keep(norm, x)            h = norm(x); where h would be saved for backward, (norm, x) is saved
        y = linear(h)

This saves memory only if the arguments are kept anyway: x above must live until backward, and it does if `norm` saves
it. The function is called again under no_grad, so its result may depend on nothing but its arguments and parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steptron.torch_internals import in_backward, watch_storage

Keep = Callable[..., Tensor]
"""Calls function(*args) and returns the result, which is kept for backward or recomputed."""


def keep(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call the function; autograd keeps what it needs."""
    return function(*args)


def recomputing() -> bool:
    """Return whether autograd is running.

    A forward pass is then a repetition by activation checkpointing, and has been observed before.
    """
    return in_backward()


class _Recipe:
    """The function and arguments of a tensor that was not saved; the recomputed value lives from first to last use."""

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
    """A context in which tensors made by `keep` are not saved for backward."""

    def __init__(self) -> None:
        self._open = False
        self._made: dict[tuple[int, int], tuple[Tensor, _Recipe]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def keep(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Return function(*args), which backward will recompute."""
        made = function(*args)
        if not self._open:  # activation checkpointing recomputes this layer: nothing is kept for long
            return made
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        # Hold the tensor until the context ends, so that no other tensor can get its address.
        self._made[_place(made)] = (made.detach(), _Recipe(function, plain))
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
        made, recipe = self._made.get(_place(tensor), (None, None))
        same = made is not None and made.numel() == tensor.numel() and made.dtype is tensor.dtype
        if recipe is None or not same or not tensor.is_contiguous():
            return tensor
        return recipe.saved(tensor.shape)

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].value(packed[1])


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return the place of a tensor's values: its storage, and where it begins there."""
    return watch_storage(tensor)[0], int(tensor.storage_offset())
