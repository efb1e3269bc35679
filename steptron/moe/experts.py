"""The routed experts of a layer: their parameters, and the choice of the back end that computes them.

    x_ND ─ gather ─→ rows by expert ─→ gate, up ─→ h = silu(gate)≤L · up∈[−L, L] · weight ─→ down ─ sum ─→ y_ND

Each expert is a clipped SwiGLU. The weight of a choice multiplies h, not the result: h is narrower, and backward gets
the weight's gradient, Σ h·(dy·W_down), without keeping the result.

    blocks               CPU: blocks of experts that fit the cache, one autograd function             cpu_experts.py
    batched              padded batched products of experts of similar size; any device               grouped_experts.py
    grouped              torch's grouped_mm; fast on Hopper and later                                 grouped_experts.py
    triton               grouped_mm, with SwiGLU, its gradient and its statistics in one kernel each  swiglu_triton.py
    transformer_engine   TransformerEngine's grouped product                                          grouped_te.py

Legend: N tokens, K choices a token, D hidden, E experts, I expert FFN.
"""

import importlib.util
import logging

import torch
from torch import Tensor, nn

from steptron.config.kernels import ExpertBackend
from steptron.config.schema import Precision
from steptron.errors import RecipeError
from steptron.moe.backend import Backend, Options, Weights
from steptron.moe.cpu_experts import compute_in_blocks, level
from steptron.moe.dispatch import Dispatched, Plan, plan_rows
from steptron.moe.elementwise import TORCH
from steptron.moe.grouped_experts import Product, batched_product, by_products, grouped_product, torch_swiglu
from steptron.moe.grouped_te import available as transformer_engine
from steptron.moe.stats import ExpertStats
from steptron.nn.recompute import Keep, keep, recomputing
from steptron.nn.to_local import local

log = logging.getLogger(__name__)

BLOCKS = Backend("blocks", compute_in_blocks, exact=True, level=level)


def choose_backend(name: ExpertBackend, device: torch.device, precision: Precision, widths: tuple[int, int]) -> Backend:
    """Return the back end with this name, or for `auto` the fastest one for the device, and log the reason.

    `widths` are the hidden size and the FFN columns of an expert on one rank. Raises `RecipeError` if the back end
    cannot run here.
    """
    why = ""
    if name == "auto":
        name, why = _fastest(device, precision, widths)
        log.info("experts: %s, %s", name, why)
        return _for_device(make_backend(name), device)
    reason = _hindrance(name, device, precision, widths)
    if reason:
        best, _ = _fastest(device, precision, widths)
        raise RecipeError(f"kernels.experts={name} cannot run here: {reason}; choose auto, which takes {best}")
    log.info("experts: %s, as the recipe says", name)
    return _for_device(make_backend(name), device)


def make_backend(name: ExpertBackend) -> Backend:
    """Return the back end with this name, whether or not it can run here. Modules that it needs are imported now."""
    match name:
        case "blocks":
            return BLOCKS
        case "batched":
            return Backend(name, by_products(batched_product, torch_swiglu), exact=True)
        case "grouped":
            return Backend(name, by_products(grouped_product, torch_swiglu), exact=False)
        case "triton":
            from steptron.moe.swiglu_triton import triton_swiglu

            return Backend(name, by_products(grouped_product, triton_swiglu), exact=False)
        case "transformer_engine":
            from steptron.moe.grouped_te import grouped_product as te_product

            def prepare(plan: Plan) -> Product:
                sizes = plan.groups_E.tolist()
                return lambda rows_PK, weights_ENK: te_product(rows_PK, weights_ENK, sizes)

            return Backend(name, by_products(prepare, torch_swiglu), exact=True)
        case "auto":
            raise AssertionError("auto has been resolved before")


def _for_device(backend: Backend, device: torch.device) -> Backend:
    """Return the back end as this device needs it.

    From compute capability 10 on, torch's grouped_mm has trouble with groups without rows: pytorch issue 172439.
    """
    grouped = device.type == "cuda" and backend.name in ("grouped", "triton")
    return backend._replace(fill_empty=grouped and torch.cuda.get_device_capability(device) >= (10, 0))


def _fastest(device: torch.device, precision: Precision, widths: tuple[int, int]) -> tuple[ExpertBackend, str]:
    if device.type != "cuda":
        return "blocks", f"the fastest on {device.type}"
    if precision == "fp32":
        return "batched", "grouped_mm on CUDA takes bf16 only"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "batched", "grouped_mm has kernels for compute capability 9.0 and later"
    if unaligned := _unaligned(precision, widths):
        return "batched", unaligned
    if importlib.util.find_spec("triton") is None:
        return "grouped", "triton is not installed"
    return "triton", "SwiGLU and its statistics take one pass"


def _hindrance(name: ExpertBackend, device: torch.device, precision: Precision, widths: tuple[int, int]) -> str | None:
    """Return the reason why this back end cannot run on the device, or None if it can."""
    if name == "blocks" and device.type != "cpu":
        return f"it is written for CPUs, and this rank's device is {device.type}"
    if name in ("grouped", "triton") and (unaligned := _unaligned(precision, widths)):
        return unaligned
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device.type != "cuda":
            return f"Triton's kernels need a CUDA device, and this rank's device is {device.type}"
    if name == "transformer_engine":
        return transformer_engine()
    return None


def _unaligned(precision: Precision, widths: tuple[int, int]) -> str | None:
    unit = 16 // (2 if precision == "bf16" else 4)
    if all(width % unit == 0 for width in widths):
        return None
    return (
        f"grouped_mm needs rows of a multiple of 16 bytes ({unit} elements in {precision}), "
        f"and an expert has {widths[0]} × {widths[1]}"
    )


class Experts(nn.Module):
    """`num_experts` gated MLPs in three tensors: w_gate and w_up [E, I, D], w_down [E, D, I]. No biases."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.backend = BLOCKS
        """The back end that computes the experts; set from outside for the device."""
        self.kernels = TORCH
        """The small operations; set from outside for the device."""
        self.limit: float | None = None
        """Activation limit of the stage; None: off."""
        self.keep_rows: Keep = keep
        self.keep_product: Keep = keep
        """Replaced from outside to recompute in backward: `keep_rows` for the gathered rows, this for w_down's input.

        The back end `blocks` always recomputes both.
        """
        self.w_gate = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        self.w_up = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, here: Dispatched, with_stats: bool = False) -> tuple[Tensor, ExpertStats | None]:
        """Return Σ_k weights[n, k] · expert experts[n, k] (x[n]): [N, D], in the dtype of `x` and the parameters.

        The second value is the statistics of the pass if `with_stats` asks for them, else None.

        A choice `ELSEWHERE` adds nothing, and its weight's gradient is 0. The weights are fp32 (fp64 in gradient
        checks). If each rank holds only some FFN columns of the experts, the result is this rank's part of the sum.
        """
        weights = Weights(local(self.w_gate), local(self.w_up), local(self.w_down))
        plan = self._plan(here, len(weights.gate_EID))
        # Nobody reads the statistics of a pass that backward repeats.
        options = Options(self.limit, with_stats and not recomputing(), self.keep_rows, self.keep_product, self.kernels)
        y_ND, rows = self.backend.compute(here.x_ND, here.weights_NK, plan, weights, options)
        return y_ND, None if rows is None else self.kernels.by_expert(rows, plan)

    def _plan(self, here: Dispatched, num_experts: int) -> Plan:
        exact, fill_empty, level = self.backend.exact, self.backend.fill_empty, self.backend.level
        if exact:
            return plan_rows(here.experts_NK, num_experts, here.num_here, exact, level, fill_empty)
        return self.kernels.plan(here.experts_NK, num_experts, here.num_here, fill_empty)
