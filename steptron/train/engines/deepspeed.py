"""DeepSpeed's ZeRO as an engine. It holds gradients, fp32 weights and AdamW's state in flat vectors, a part on each
rank.

    micro-batches ─► its forward and backward ─► gradients summed over ranks, this rank's stretches ─► Σ g² by parameter
    update ─► its step: AdamW on the flat vectors ─► weights gathered (ZeRO 1, 2) or left in parts (ZeRO 3)

Norm, clip and judge are ours. They come between backward and DeepSpeed's step, which is left out if the judge does not
allow the update.

DeepSpeed does three things in another way than by default:
- it sums over ranks instead of averaging, because losses are divided by the targets of the whole global batch already.
  ZeRO 1 and 2 have a switch for it. For ZeRO 3 the loss is multiplied by the number of ranks that it divides by;
- router weights are a separate parameter group, whose step is left out while they are frozen. DeepSpeed takes a missing
  gradient for zeros, so decay and moments would move them;
- experts under expert parallelism are marked as its own MoE layers mark theirs. The dispatch of tokens stays native.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steptron.config.schema import OptimConfig, Precision
from steptron.errors import CheckpointError
from steptron.model.init import initialise_parameter
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer
from steptron.optim.observe import UpdateObserver
from steptron.optim.optimizer import split_parameters
from steptron.parallel.grad_norm import copies_of
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import InTurn, Network, final_outputs
from steptron.parallel.objective import Objective
from steptron.train.engines.zero_shards import ShardLayout, Stretch, find_stretches, flat_part

# DeepSpeed does not use torch's newer names for collectives yet, and each of them warns.
warnings.filterwarnings("ignore", r".*is deprecated\. Please use `torch\.distributed", FutureWarning)
# DeepSpeed configures a logger of this name, which writes to standard output.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
import deepspeed  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS  # noqa: E402
from deepspeed.utils import groups  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default size of the buffer in which gradients are summed. A smaller model gets a smaller buffer."""


class FlatAdamW(torch.optim.AdamW):
    """AdamW on ZeRO's flat vectors, with torch's fused kernel like the native engine. It clips, and leaves frozen
    routers alone."""

    scale: Tensor
    """The factor on all gradients."""
    frozen = False
    """True while the group of the routers must not change."""
    watch: Callable[[Tensor, Tensor], None] | None = None
    """A function that gets each flat vector and its change."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the vectors that have a gradient. ZeRO calls this for one group after the other."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not (group["name"] == "routers" and self.frozen)]
        flats = [flat for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        for flat in flats:
            flat.grad.mul_(self.scale)
        before = [] if self.watch is None else [flat.clone() for flat in flats]
        super().step()
        self.param_groups = everything
        if self.watch is not None:
            for flat, old in zip(flats, before, strict=True):
                self.watch(flat, torch.sub(flat, old, out=old))


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it.

    ZeRO imports it whatever the optimizer is. Its functions are marked for torch's compiler, whose import takes two
    seconds, and nothing here calls them.
    """
    marks, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = marks


_import_muon()
ZERO_SUPPORTED_OPTIMIZERS.append(FlatAdamW)  # the list has its parent


class _ZeroOfMoe(DeepSpeedEngine):
    """DeepSpeed's engine, which finds experts by their marks. The original looks for layers of its own MoE class."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(getattr(p, "allreduce", True) is False for p in model.parameters())


class _ZeroInTurn(InTurn):
    """Runs micro-batches one after the other through DeepSpeed's forward and backward."""

    def __init__(self, model: Transformer, theirs: DeepSpeedEngine, factor: float) -> None:
        """`factor`: the factor on each loss."""
        super().__init__(model)
        self._theirs, self._factor = theirs, factor

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """See `Runner`."""
        sums = objective.zeros()
        for n, micro_batch in enumerate(inputs):
            self._theirs.set_gradient_accumulation_boundary(n == len(inputs) - 1)
            outputs = final_outputs(self._theirs(inputs=micro_batch))
            total, terms = objective(self._model, outputs, micro_batch)
            self._theirs.backward(total * self._factor, scale_wrt_gas=False)
            sums += terms
        return sums


class ZeroEngine:
    """See `Engine`. The tensors of `state` are copies. Between steps the weights are in DeepSpeed's vectors."""

    def __init__(
        self,
        model: Transformer,
        meshes: Meshes,
        device: torch.device,
        optim: OptimConfig,
        *,
        zero: int,
        precision: Precision,
        seed: int,
    ):
        """Give the model to DeepSpeed.

        Args:
            model: the unsharded model with its initial values, for a layout that has been checked.
            zero: the stage of ZeRO.
            seed: the recipe's seed, for the initial values in fp32.
        """
        self._stage, ep = zero, meshes.layout.expert["ep"]
        experts = {id(p) for moe in model.moe_layers().values() for p in moe.experts.parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        self._routers = [moe.router for moe in model.moe_layers().values()]
        self._still = {f"layers.{n}.moe.router.weight" for n in model.moe_layers()}
        self._places = {names[id(p)]: ShardLayout.find(p, id(p) in experts, meshes) for p in model.parameters()}
        self._adamw = FlatAdamW(_groups(model, experts, ep, optim), **_settings(optim))
        self._theirs = _initialise(model, self._adamw, zero, precision, ep, device)
        self._zero: Any = self._theirs.optimizer
        found = {names[id(p)]: stretch for p, stretch in find_stretches(self._zero, self._stage)}
        self._stretches: dict[str, Stretch] = {name: found[name] for name in names.values()}
        for stretch in self._stretches.values():
            self._adamw.state[stretch.flat] = _empty_state(stretch.flat)
        # ZeRO 3 has no switch for sums, and divides by the number of ranks.
        factor = float(meshes.layout.world_size) if self._stage == 3 else 1.0
        self.network = Network({0: model}, _ZeroInTurn(model, self._theirs, factor), None, self._kept(model))
        if precision == "bf16":  # DeepSpeed has made its fp32 weights from rounded ones
            self._take_initial(seed, model.config.init_std)

    def observe(self, observer: UpdateObserver | None) -> None:
        """Show every update to `observer`."""
        if observer is None:
            self._adamw.watch = None
            return
        # One rank alone updates an element. Observers assume that all ranks which hold it do.
        scales = {name: copies_of(p) ** 0.5 for name, p in self.network.named_parameters()}

        def watch(flat: Tensor, change: Tensor) -> None:
            for name, stretch in self._stretches.items():
                if stretch.flat is flat and stretch.elements:
                    observer.updated(name, stretch.of(change), scales[name])

        self._adamw.watch = watch

    def zero_grad(self) -> None:
        """Drop all gradients, as DeepSpeed does after an overflow."""
        zero = self._zero
        zero.zero_grad()
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = None
        if self._stage < 3:
            for group in list(zero.all_grad_tensors):
                zero.all_grad_tensors[group] = None

    def gradient_squares(self) -> Tensor:
        """Return Σ g² of this rank's stretch of each parameter, float64 [P]."""
        return torch.stack([self._squares(name) for name in self._stretches])

    def update(self, norm: Tensor, max_norm: float, lr: float) -> None:
        """Clip the gradients and update the weights."""
        self._adamw.scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
        self._adamw.frozen = self._frozen()
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._theirs.step()

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Return weights, router biases and AdamW's state. All ranks call it together."""
        tensors = {f"model.{name}": buffer for name, buffer in self.network.buffers().items()}
        for name, stretch in self._stretches.items():
            state = self._adamw.state[stretch.flat]
            vectors = {f"model.{name}": stretch.flat} | {f"optimizer.{name}.{key}": state[key] for key in MOMENTS}
            place = self._places[name]
            for key, flat in vectors.items():
                tensors[key] = place.rows_of(place.join(stretch.of(flat), stretch.offset))
            tensors[f"optimizer.{name}.step"] = state["step"].clone()
        return tensors

    @torch.no_grad()
    def load(self, read: Callable[[dict[str, Tensor]], None], *, weights_only: bool = False) -> None:
        """Fill tensors like those of `state` with `read`, and continue with their values."""
        tensors = {f"model.{name}": buffer for name, buffer in self.network.buffers().items()}
        for name, stretch in self._stretches.items():
            moments = [] if weights_only else [f"optimizer.{name}.{key}" for key in MOMENTS]
            for key in (f"model.{name}", *moments):
                tensors[key] = self._places[name].empty_rows(stretch.flat.device)
            if not weights_only:
                tensors[f"optimizer.{name}.step"] = torch.zeros((), device=stretch.flat.device)
        read(tensors)
        self.zero_grad()
        for name, stretch in self._stretches.items():
            state = self._adamw.state[stretch.flat]
            vectors = {f"model.{name}": stretch.flat} | {f"optimizer.{name}.{key}": state[key] for key in MOMENTS}
            for key, flat in vectors.items():
                if key in tensors:
                    self._put(stretch, flat, self._places[name].join_rows(tensors[key]))
        if not weights_only:
            self._take_steps(tensors)
        self._spread()

    def _frozen(self) -> bool:
        return any(router.frozen for router in self._routers)

    def _squares(self, name: str) -> Tensor:
        stretch = self._stretches[name]
        gradient = stretch.gradient()
        # ZeRO 3 keeps the last gradient of a parameter that had none since.
        if gradient is None or not stretch.elements or (name in self._still and self._frozen()):
            return torch.zeros((), dtype=torch.float64, device=self.network.device)
        return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()

    def _kept(self, model: Transformer) -> Mapping[str, Tensor]:
        """Return the parameters between steps. ZeRO 1 and 2 keep all that a rank computes with, ZeRO 3 a part."""
        if self._stage == 3:
            return {name: flat_part(stretch, self._places[name]) for name, stretch in self._stretches.items()}
        return {name: self._places[name].as_computed(p) for name, p in model.named_parameters()}

    def _put(self, stretch: Stretch, flat: Tensor, whole: Tensor) -> None:
        stretch.of(flat).copy_(whole.flatten()[stretch.offset : stretch.offset + stretch.elements])

    def _take_steps(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the step counts. DeepSpeed counts the steps of a flat vector, not of a parameter."""
        first: dict[int, str] = {}
        for name, stretch in self._stretches.items():
            steps = tensors[f"optimizer.{name}.step"]
            other = first.setdefault(id(stretch.flat), name)
            if not torch.equal(steps, tensors[f"optimizer.{other}.step"]):
                raise CheckpointError(
                    f"{name} has been updated {steps:.0f} times and {other} "
                    f"{tensors[f'optimizer.{other}.step']:.0f} times, which engine=deepspeed counts together; "
                    "continue with engine=native"
                )
            self._adamw.state[stretch.flat]["step"].copy_(steps)

    def _take_initial(self, seed: int, std: float) -> None:
        """Set all parameters to the initial values of the seed, in fp32."""
        for name, stretch in self._stretches.items():
            place = self._places[name]
            whole = torch.empty(place.shape, device=stretch.flat.device)
            initialise_parameter(name, place.as_computed(whole), seed, std)
            self._put(stretch, stretch.flat, whole)
        self._spread()

    def _spread(self) -> None:
        """Copy the values of the fp32 vectors to the weights that a rank computes with."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _initialise(
    model: Transformer, adamw: FlatAdamW, stage: int, precision: Precision, ep: int, device: torch.device
) -> DeepSpeedEngine:
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed reads it without a launcher too
    # A reduction for inference, which DeepSpeed would compile here for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    if ep > 1:
        groups._create_expert_and_data_parallel(ep)
    bucket = min(BUCKET_ELEMENTS, max(1, sum(p.numel() for p in model.parameters())))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # without effect: batches and their accumulation are ours
        "steps_per_print": None,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if stage < 3:
        settings["gradient_allreduce_op"] = "sum"
        settings["zero_optimization"]["compute_grad_norm"] = False
    return _ZeroOfMoe(args=None, model=model, optimizer=adamw, config=settings, config_class=DeepSpeedConfig(settings))


def _groups(model: Transformer, experts: set[int], ep: int, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW. ZeRO puts each group end to end.

    Experts are marked if ranks hold different ones.
    """
    hidden, outer, vectors = split_parameters(dict(model.named_parameters()))
    matrices = hidden | outer
    routers = {name for name in matrices if name.endswith("router.weight")}
    apart = {name for name, p in matrices.items() if id(p) in experts} if ep > 1 else set()
    group_name = f"ep_size_{ep}"
    for name in apart:
        matrices[name].allreduce, matrices[name].group_name = False, group_name  # pyright: ignore[reportAttributeAccessIssue]
    decay = {"weight_decay": config.weight_decay}
    found: list[dict[str, Any]] = [
        {"name": "matrices", "params": [p for n, p in matrices.items() if n not in routers | apart], **decay},
        {"name": group_name, "params": [matrices[n] for n in matrices if n in apart], "moe": True, **decay},
        {"name": "routers", "params": [matrices[n] for n in matrices if n in routers], **decay},
        {"name": "vectors", "params": list(vectors.values()), "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def _settings(config: OptimConfig) -> dict[str, Any]:
    return {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}


def _empty_state(flat: Tensor) -> dict[str, Tensor]:
    moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
    return {"step": torch.zeros((), device=flat.device), **moments}
