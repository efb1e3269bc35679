"""Every statistic of one training step, against what is computed of the same step by other means: float64, loops, whole
tensors."""

import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_run import make_registry
from steptron.config.monitoring import MonitorConfig
from steptron.config.schema import DataConfig, OptimConfig, Recipe, RunConfig, SourceConfig
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Inputs, Rows
from steptron.monitor.statistics.plane import Plane
from steptron.monitor.statistics.probes import UpdateProbe, last_query_entropy, watch_modules
from steptron.monitor.statistics.registry import Registry
from steptron.nn.to_local import local
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.apply import build_network
from steptron.parallel.mesh import build_meshes, resolve_layout
from steptron.train.engines.native import NativeEngine
from steptron.train.instrumentation import watch_network
from steptron.train.step import Lenient, StepBatch, StepSettings, train_step
from torch import nn

from planes import merged
from tiny import tiny_model, tiny_stage

B, T, HEADS = 2, 24, 3
SOURCES = ("prose", "code")
MOE = range(1, 6)


class Seeing(Lenient):
    """Allows every step, and completes the plane as a run's watch does."""

    def __init__(self, seen):
        self.seen = seen

    def see(self, squares_P):
        self.seen.after_backward(squares_P)


def make_recipe(**monitor) -> Recipe:
    stage = tiny_stage(seq_len=T, batch_size=2 * B, micro_batch=B, tokens=1000, mix={"prose": 1.0, "code": 1.0})
    return Recipe(
        run=RunConfig(name="plane", device="cpu"),
        model=tiny_model(),
        data=DataConfig(sources={name: SourceConfig(path="") for name in SOURCES}, tokenizer=""),
        stages={"only": stage},
        optim=OptimConfig(),
        monitor=MonitorConfig(level="full", **monitor),
    )


def batches() -> list[Inputs]:
    """Two micro-batches: documents of several lengths, a source each."""
    random = torch.Generator().manual_seed(3)
    found = []
    for number in range(2):
        tokens = torch.randint(50, (B, T + HEADS), generator=random)
        documents = (torch.rand(B, T + HEADS, generator=random) < 0.15).cumsum(1).int()
        found.append(Inputs.from_rows(Rows.unweighted(tokens, documents), T, sources=[number, 1 - number]))
    return found


@pytest.fixture(scope="module")
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def step(alone):
    """One step of a tiny network: its plane merged as readers do, and all that hooks of the test have kept."""
    torch.manual_seed(0)
    recipe = make_recipe(probes=("layers.*.ffn_norm",))
    meshes = build_meshes(resolve_layout(recipe.parallel, 1), "cpu")
    network = build_network(recipe, meshes, torch.device("cpu"))
    seen = watch_network(recipe.monitor, meshes, network, SOURCES, T)
    engine = NativeEngine(network, build_optimizer(dict(network.named_parameters()), recipe.optim))
    engine.observe(seen.updates)
    kept = keep_outputs(network.parts[0])
    network.apply_stage(recipe.stages["only"], num_groups=1)
    before = {n: local(p).detach().double().clone() for n, p in network.named_parameters()}
    inputs = batches()
    weights_H = sum(i.weights_HBT.double().sum((1, 2)) for i in inputs)
    conditions = StepSettings(seq_len=T, batch_size=2 * B, lr=1e-2, bias_rate=0.0, mtp_weight=0.3, clip_norm=1e9)
    train_step(
        engine,
        StepBatch(inputs=inputs, weights_H=weights_H, notices=torch.zeros(0)),
        conditions,
        Seeing(seen),
        TokenLoss(),
    )
    plane = seen.plane
    values = merged([(plane.registry.to_dict(), plane.values.clone())])
    after = {n: local(p).detach().double().clone() for n, p in network.named_parameters()}
    grads = {n: local(p.grad).double() for n, p in network.named_parameters() if p.grad is not None}
    return {"values": values, "kept": kept, "before": before, "after": after, "grads": grads, "inputs": inputs}


def keep_outputs(model: nn.Module) -> dict[str, list]:
    """Outputs of every module by name, pass by pass, in float64."""
    kept: dict[str, list] = {}

    def hook(name):
        def keep(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            kept.setdefault(name, []).append(first.detach().double())

        return keep

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(hook(name))
    return kept


def close(got, wanted, tolerance=1e-5):
    assert got == pytest.approx(wanted, rel=tolerance)


def test_residual_stream_by_layer(step):
    for n in range(6):
        passes = torch.stack(step["kept"][f"layers.{n}"])
        close(step["values"]["residual_rms"][(n,)], float(passes.square().mean().sqrt()))
        close(step["values"]["residual_max"][(n,)], float(passes.abs().max()))
    mtp = torch.stack(step["kept"]["mtp.1.block"])
    close(step["values"]["residual_rms"][(7,)], float(mtp.square().mean().sqrt()))


def test_gate_mean_by_head(step):
    for n in range(6):
        gates = torch.cat(step["kept"][f"layers.{n}.attention.gate_proj"]).sigmoid().mean(0).tolist()
        for head, gate in enumerate(gates):
            close(step["values"]["gate_mean"][(n, head)], gate)
    assert math.isnan(step["values"]["gate_mean"][(0, 5)]), "a full layer has four heads, not six"


def test_attention_entropy_is_that_of_the_longest_document_s_last_token():
    torch.manual_seed(1)
    q, k = torch.randn(20, 4, 8), torch.randn(20, 2, 8)
    for window in (None, 5):
        got = last_query_entropy(q, k, (3, 17), window)
        keys = range(3 if window is None else 12, 17)
        for head in range(4):
            scores = torch.tensor([float(q[16, head].double() @ k[m, head // 2].double()) / 8**0.5 for m in keys])
            p = scores.double().softmax(0)
            close(float(got[head]), float(-(p * p.log()).sum()))


def test_every_layer_has_a_sample_of_attention_entropy_a_pass(step):
    samples = step["values"]["attention_samples"]
    assert [samples[(n, 0)] for n in range(8)] == [2.0] * 8
    assert 0 < step["values"]["attention_entropy"][(0, 0)] < math.log(T)


def test_gradients_parameters_and_updates_by_parameter(step):
    values = step["values"]
    for name, old in step["before"].items():
        close(values["gradient_norm"][(name,)], float(step["grads"][name].norm()))
        close(values["parameter_norm"][(name,)], float(old.norm()))
        if old.norm() > 0:
            ratio = float((step["after"][name] - old).norm() / old.norm())
            close(values["update_ratio"][(name,)], ratio, 1e-3)


def test_weight_norm_by_expert(step):
    for n in MOE:
        for e in range(6):
            parts = [step["before"][f"layers.{n}.moe.experts.{w}"][e] for w in ("w_gate", "w_up", "w_down")]
            close(step["values"]["weight_norm"][(n, e)], math.sqrt(sum(float(p.square().sum()) for p in parts)))


def test_orthogonality_of_known_matrices():
    registry = Registry()
    axes = {"parameter": ["a", "b"]}
    for name in ("gradient_square_sum", "update_square_sum", "orthogonality_square_sum", "matrices"):
        registry.add(name, unit="1", reduction="sum", axes=axes)
    registry.derive("gradient_norm", unit="1", powers={"gradient_square_sum": 0.5})
    plane = Plane(registry, torch.device("cpu"))
    probe = UpdateProbe(plane, {"a": 1, "b": 1})
    orthogonal = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    wide, tall = orthogonal[:7], orthogonal[:, :7]
    probe.orthogonalised(["a"], wide[None])
    probe.orthogonalised(["b", "b"], torch.stack([2 * tall, 2 * tall]))
    squares, matrices = plane.view("orthogonality_square_sum"), plane.view("matrices")
    assert matrices.tolist() == [1.0, 2.0]
    assert float(squares[0]) < 1e-10
    close(float(squares[1]), 2 * 9.0)  # Yᵀ·Y − 1 is 3 on the diagonal


def test_orthogonality_is_near_zero_after_polar_express_and_only_of_matrices(step):
    values = step["values"]
    assert values["matrices"][("layers.1.moe.experts.w_gate",)] == 2, "a few of the six experts"
    assert values["matrices"][("norm.weight",)] == 0
    assert 0 < values["orthogonality"][("layers.0.attention.q_proj.weight",)] < 0.2


def test_losses_by_source_position_and_mtp_head(step):
    by_source, by_position, by_head = {}, {}, {1: [], 2: []}
    starts = [start for (start,) in step["values"]["position_loss"]]
    assert starts == [0, 16]
    for number, inputs in enumerate(step["inputs"]):
        head = step["before"]["lm_head.weight"]
        losses = F.cross_entropy(
            (step["kept"]["norm"][number] @ head.T).flatten(0, 1), inputs.targets_HBT[0].flatten(), reduction="none"
        )
        for place, weight in enumerate(inputs.weights_HBT[0].flatten().tolist()):
            if weight:
                row, loss = place // T, float(losses[place])
                position = int(inputs.packing.positions_BT.flatten()[place])
                by_source.setdefault(SOURCES[int(inputs.sources_B[row])], []).append(loss)
                by_position.setdefault(0 if position < 16 else 16, []).append(loss)
        for h in (1, 2):
            logits = step["kept"][f"mtp.{h - 1}.norm"][number] @ step["before"][f"mtp.{h - 1}.lm_head.weight"].T
            mine = F.cross_entropy(logits.flatten(0, 1), inputs.targets_HBT[h].flatten(), reduction="none")
            by_head[h] += mine[inputs.weights_HBT[h].flatten() > 0].tolist()
    for table, wanted in (("source", by_source), ("position", by_position), ("mtp", by_head)):
        for cell, losses in wanted.items():
            close(step["values"][f"{table}_loss"][(cell,)], sum(losses) / len(losses))
            close(step["values"][f"{table}_targets"][(cell,)], len(losses))


def test_modules_that_the_recipe_names(step):
    assert set(step["values"]["output_rms"]) == {(f"layers.{n}.ffn_norm",) for n in range(6)}
    passes = torch.stack(step["kept"]["layers.2.ffn_norm"])
    close(step["values"]["output_rms"][("layers.2.ffn_norm",)], float(passes.square().mean().sqrt()))
    close(step["values"]["output_max"][("layers.2.ffn_norm",)], float(passes.abs().max()))


def test_a_module_that_yields_nothing_in_a_pass_is_none_the_worse_for_it():
    """Experts of which a micro-batch needs none."""
    registry = Registry()
    for name in ("output_square_sum", "output_elements"):
        registry.add(name, unit="1", reduction="sum", axes={"module": ["experts"]})
    registry.add("output_max", unit="1", reduction="max", axes={"module": ["experts"]})
    registry.derive("output_rms", unit="1", powers={"output_square_sum": 0.5, "output_elements": -0.5})
    plane, model = Plane(registry, torch.device("cpu")), nn.ModuleDict({"experts": nn.Identity()})
    watch_modules([model], plane)  # pyright: ignore
    for rows in (torch.zeros(0, 4), torch.tensor([[3.0, -4.0]]), torch.zeros(0, 4)):
        model["experts"](rows)
    assert plane.values.tolist() == [25.0, 2.0, 4.0]


def test_gains_of_q_and_k_norms(step):
    for n in range(6):
        for which in ("q", "k"):
            gain = 1 + step["before"][f"layers.{n}.attention.{which}_norm.weight"]
            close(step["values"][f"{which}_gain"][(n,)], float(gain.square().mean().sqrt()))


def test_routers_and_experts_add_up(step):
    values = step["values"]
    tokens = 2 * B * T
    for n in MOE:
        counts = [values["tokens"][(n, e)] for e in range(6)]
        assert sum(counts) == tokens * 2
        assert [values["rows"][(n, e)] for e in range(6)] == counts
        close(sum(values["mass_sum"][(n, e)] for e in range(6)), tokens)
        assert values["router_tokens"][(n,)] == tokens
        assert 0 < values["router_entropy"][(n,)] <= math.log(6)


def test_a_pattern_without_a_module_is_warned_of_once_with_what_is_near(caplog):
    from steptron.monitor.statistics.probes import matching, warn_of_patterns

    model = nn.ModuleDict({"layers": nn.ModuleDict({"0": nn.Linear(2, 2)})})
    with caplog.at_level(logging.WARNING, "steptron"):
        assert matching(("layer.0", "layers.*"), [model]) == (["layers.0"], ["layer.0"])  # pyright: ignore
        warn_of_patterns(["layer.0"], [model])  # pyright: ignore
    assert len(caplog.records) == 1
    assert "layer.0" in caplog.text
    assert "near: layers.0" in caplog.text


@pytest.mark.parametrize("level", ["light", "off"])
def test_probes_at_a_level_without_them_are_warned_of(alone, caplog, level):
    recipe = replace(make_recipe(), monitor=MonitorConfig(level=level, probes=("layers.*.ffn_norm",)))
    meshes = build_meshes(resolve_layout(recipe.parallel, 1), "cpu")
    with caplog.at_level(logging.WARNING, "steptron"):
        watch_network(recipe.monitor, meshes, build_network(recipe, meshes, torch.device("cpu")), SOURCES, T)
    assert [record.getMessage() for record in caplog.records] == [
        f"monitor.probes=[layers.*.ffn_norm] with monitor.level={level}: no module is watched; probes need monitor.level=full"
    ]


def test_level_off_watches_no_module(alone):
    recipe = replace(make_recipe(), monitor=MonitorConfig(level="off"))
    meshes = build_meshes(resolve_layout(recipe.parallel, 1), "cpu")
    network = build_network(recipe, meshes, torch.device("cpu"))
    before = {name: len(module._forward_hooks) for name, module in network.parts[0].named_modules()}
    seen = watch_network(recipe.monitor, meshes, network, SOURCES, T)
    assert all(moe.observer is None for moe in network.moe_layers().values())
    assert before == {name: len(module._forward_hooks) for name, module in network.parts[0].named_modules()}
    assert seen.updates is None
    assert set(seen.plane.registry.statistics) == {
        *("loss", "total_loss", "grad_norm", "step_time", "data_wait", "communication_time", "not_finite")
    }


def test_a_reset_may_keep_what_is_known_before_the_step():
    plane = Plane(make_registry(), torch.device("cpu"))
    plane.values.fill_(3.0)
    plane.reset(keep=("step_time",))
    assert (plane.view("step_time") == 3.0).all()
    assert (plane.view("data_wait") == 0.0).all()
    assert (plane.view("tokens") == 0.0).all()
