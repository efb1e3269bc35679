"""The model of a step on many GPUs agrees with cases computed by hand, and counts the operations that MFU counts."""

import gpu_count
import pytest
import step_counts
from step_events import HostWait, Receive, Run, Send, Start, Wait, run_of, simulate
from step_machine import ROWS, Machine, with_shared
from step_marks import Arrival, Choices, Exchange, Held, Kernel, Piece, Stop
from step_program import Plan, play, weave
from steptron.config.resolve import resolve
from steptron.config.schema import PipelineConfig
from steptron.model.flops import flops_per_token

FREE = Machine(launch=0.0, shortest=0.0, host_wait=0.0, nvlink_latency=0.0, network_latency=0.0, steal=0.0)
"""A machine on which only kernels and transfers take time."""
SECOND = FREE.product_flops * FREE.product_share
"""The operations of a kernel of one second."""


def busy(seconds: float, of_weight: bool = False) -> Kernel:
    return Kernel("product", seconds * SECOND, 0, of_weight)


PIECE = Piece(Held(0, 0, 1, ()), (busy(1),), (busy(1), busy(1, of_weight=True)), (), ())
"""One second forward, two backward, of which one is for weights."""


def play_even(schedule: str, pp: int, micro_batches: int, chunks: int = 1) -> float:
    """Return the seconds of a pipeline with one `PIECE` per stage and messages that take no time."""
    pipeline = PipelineConfig(schedule=schedule, chunks=chunks)  # pyright: ignore[reportArgumentType]
    plan = Plan(
        stages=((PIECE,),) * (pp * chunks),
        pipeline=pipeline,
        pp=pp,
        micro_batches=micro_batches,
        carried=0,
        ep=1,
        expert_shards=1,
        dense_shards=1,
    )
    played = play(plan, FREE)
    for spent in played.spent:
        assert sum(spent.values()) == pytest.approx(played.seconds), "a device's time is spent completely"
        assert spent["products"] == pytest.approx(3 * micro_batches * chunks)
    return played.seconds


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 4), (4, 9), (1, 3)])
def test_1f1b_has_the_bubble_of_the_formula(pp: int, micro_batches: int):
    seconds = play_even("1f1b", pp, micro_batches)
    bubble = 1 - 3 * micro_batches / seconds
    assert bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1))


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_stages_divide_the_bubble_by_their_number(chunks: int):
    pp, micro_batches = 4, 8
    seconds = play_even("interleaved", pp, micro_batches, chunks)
    assert seconds == pytest.approx(3 * chunks * micro_batches + 3 * (pp - 1)), "arXiv 2104.04473, section 2.2"


def test_dualpipe_v_and_zb_v_idle_less_than_1f1b_with_as_many_layers():
    pp, micro_batches = 4, 12
    idle = {name: play_even(name, pp, micro_batches, 2) - 6 * micro_batches for name in ("zb-v", "dualpipe-v")}
    # arXiv 2401.10241, section 6: with equal times of F, B and W only filling and draining the pipeline is left.
    assert idle["zb-v"] == pytest.approx(pp - 1)
    assert 0 < idle["dualpipe-v"] < 2 * 3 * (pp - 1)


def test_a_transfer_beside_kernels_costs_the_longer_of_both_and_what_it_takes_from_them():
    work = Run(1, 3.0, 0.0)
    transfer = [Start(("x",), "nvlink", 2.0)]
    apart = simulate([[work, *transfer, Wait(("x",))]], 0.0, 0.0)
    assert apart.seconds == 5.0
    assert apart.spent[0]["nvlink"] == 2.0
    assert simulate([[*transfer, work, Wait(("x",))]], 0.0, 0.0).seconds == 3.0
    assert simulate([[Start(("x",), "nvlink", 4.0), work, Wait(("x",))]], 0.0, 0.0).seconds == 4.0
    assert simulate([[*transfer, work, Wait(("x",))]], 0.0, 0.25).seconds == 3.5, "a quarter of the device, for 2 s"


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes():
    second = int(FREE.memory_bytes * FREE.memory_share)
    assert FREE.kernel(Kernel("product", SECOND, 2 * second)) == (pytest.approx(2.0), False)
    assert FREE.kernel(Kernel("product", 3 * SECOND, 2 * second)) == (pytest.approx(3.0), True)
    assert Machine().kernel(Kernel("elementwise", 0.0, 0)) == (Machine().shortest, False)


def test_a_saturated_lane_decides_the_time():
    starts = [item for n in range(5) for item in (Run(1, 0.1, 0.0), Start((n,), "network", 1.0))]
    played = simulate([[*starts, *(Wait((n,)) for n in range(5))]], 0.0, 0.0)
    assert played.seconds == pytest.approx(0.1 + 5.0)


def test_a_slow_host_decides_the_time_and_a_wait_stops_it():
    short = run_of([(0.001, True)] * 10, launch=0.01)
    assert simulate([[short]], 0.01, 0.0).seconds == pytest.approx(10 * 0.01 + 0.001)
    long = run_of([(1.0, False)] * 3, launch=0.01)
    assert simulate([[long, long]], 0.01, 0.0).seconds == pytest.approx(0.01 + 6.0)
    waited = simulate([[long, HostWait(0.5), long]], 0.01, 0.0)
    assert waited.seconds == pytest.approx(0.01 + 3.0 + 0.5 + 0.01 + 3.0)
    assert waited.spent[0]["host"] == pytest.approx(0.01 + 0.5 + 0.01)


def test_kernels_as_one_item_take_as_long_as_one_by_one():
    kernels = [(0.3, True), (0.01, False), (0.02, False), (0.9, True), (0.05, False)]
    for launch in (0.0, 0.04, 0.2, 1.0):
        whole = simulate([[run_of(kernels, launch)] * 2], launch, 0.0)
        single = simulate([[run_of([kernel], launch) for kernel in kernels * 2]], launch, 0.0)
        assert whole.seconds == pytest.approx(single.seconds), f"launch {launch}"


def test_ranks_that_wait_for_each_other_are_an_error():
    programs = [[Receive("a"), Send("b", 0.0, False)], [Receive("b"), Send("a", 0.0, False)]]
    with pytest.raises(RuntimeError, match="wait for each other"):
        simulate(programs, 0.0, 0.0)


def test_a_pair_hides_the_exchanges_of_one_pass_under_the_other():
    def one(name: str) -> list:
        parts = [(Run(1, 1.0, 0.0), Start((name, n, ROWS), "nvlink", 1.0), Wait((name, n, ROWS))) for n in range(3)]
        return [item for part in parts for item in part]

    assert simulate([[*one("forward"), *one("backward")]], 0.0, 0.0).seconds == 12.0
    assert simulate([weave(one("forward"), one("backward"))], 0.0, 0.0).seconds == 7.0, "the last exchange is in sight"


def test_the_shared_expert_lies_between_the_start_of_an_exchange_and_its_wait():
    rows, table = Exchange(1 << 28), Exchange(1 << 10)
    one, two, other = busy(1), busy(2), busy(3)
    piece = PIECE._replace(
        forward=(other, rows, Arrival(), other, rows, Arrival()),
        backward=(rows, Arrival(), other, rows, Arrival(), table, Arrival(), other),
        shared_forward=(one, two),
        shared_backward=(two, one),
    )
    forward, backward = with_shared(piece, beside=True)
    assert forward == [other, rows, one, Arrival(), other, rows, two, Arrival()]
    assert backward == [rows, two, Arrival(), other, rows, one, table, Arrival(), Arrival(), other]


@pytest.fixture(scope="module")
def recipe():
    return resolve("step3p5_flash")


def counter(recipe, **choices) -> step_counts.Counter:
    return step_counts.Counter(recipe.model, recipe.stages["pre-1"], 8, Choices(**choices))


def marks(piece: Piece) -> list:
    return [*piece.forward, *piece.backward, *piece.shared_forward, *piece.shared_backward]


def test_the_counted_operations_are_those_of_mfu(recipe):
    """Grouped products have rows of padding, and attention works on tiles and computes its scores again."""
    model, T = recipe.model, recipe.stages["pre-1"].seq_len
    flops = dict.fromkeys(("product", "fp32", "grouped", "attention", "attention backward", "elementwise"), 0.0)
    with gpu_count.fake_ranks(8):
        counts = counter(recipe, loss_chunk=4096)
        heads = [counts.block(), counts.output()] * model.num_mtp_heads
        pieces = [counts.embedding(), *counts.layers(), counts.output(), *heads]
    for piece in pieces:
        for mark in marks(piece):
            if isinstance(mark, Kernel):
                flops[mark.kind] += mark.flops
    rows = T * model.moe.top_k
    padded = rows + model.moe.num_experts // 8 * 15 // 16 * 16 + 16
    real = flops["product"] + flops["fp32"] + flops["grouped"] * rows / padded
    keys = {"F": (T + 1) / 2, "S": 512 - 512 * 511 / (2 * T)}
    heads = {"F": model.full.num_heads, "S": model.sliding.num_heads}
    kinds = [*(model.layer_pattern * model.num_layers)[: model.num_layers], *"S" * model.num_mtp_heads]
    scores = sum(12 * heads[kind] * model.head_dim * keys[kind] for kind in kinds)
    assert real == pytest.approx((flops_per_token(model, T) - scores) * T, rel=2e-4)
    tiles = sum(4 * heads[k] * model.head_dim * (keys[k] + (64 if k == "F" else 128)) for k in kinds) * T
    assert flops["attention"] == pytest.approx(tiles, rel=1e-3)
    assert flops["attention backward"] == pytest.approx(2.5 * tiles, rel=1e-3)


def test_choices_change_what_they_name(recipe):
    def of_an_expert_layer(**choices) -> Piece:
        with gpu_count.fake_ranks(8):
            return counter(recipe, **choices).layer("S", dense=False)[1]

    def moved(piece: Piece) -> int:
        return sum(mark.moved for mark in marks(piece) if isinstance(mark, Kernel))

    def number(piece: Piece, kind: type) -> int:
        return sum(isinstance(mark, kind) for mark in marks(piece))

    today, choices = of_an_expert_layer(), 4096 * 8
    assert choices < today.rows < 1.02 * choices
    assert number(today, Stop) == 1
    assert number(today, Exchange) == number(today, Arrival)
    everything = of_an_expert_layer(all_choices=True, waits=3, more_kernels=7)
    assert everything.rows > 5 * choices
    assert number(everything, Stop) == 3
    assert number(everything, Kernel) == number(today, Kernel) + 7
    fixed = of_an_expert_layer(capacity=1.25, waits=0)
    assert number(fixed, Stop) == 0
    assert fixed.rows == pytest.approx(1.25 * choices, rel=0.02)
    fused = of_an_expert_layer(elementwise="triton")
    assert number(fused, Kernel) < number(today, Kernel)
    joined = of_an_expert_layer(elementwise="triton", gate_and_up=True)
    assert number(joined, Kernel) < number(fused, Kernel)
    assert moved(joined) < moved(fused) < moved(today) < moved(everything)
