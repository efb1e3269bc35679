"""Bit by bit: copies of the metrics plane, a checkpoint and what follows it, and a step that is taken twice."""

import os
import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_parts.rows import Given, Row, guarded, judged
from gpu_parts.steps import Small, small_run
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import step_name
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.saver import Saver
from steptron.config.schema import Precision
from steptron.monitor.statistics.host_copy import HostCopies, PendingCopy
from steptron.nn.to_local import local
from steptron.train.device import one_order
from steptron.train.process_group import make_saving_coordinator


def state(given: Given) -> Iterator[Row]:
    """Yield the number of values that are not as they should be."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic products; read when CUDA starts
    yield from guarded("metrics copies", partial(_copies, given))
    for precision in given.pick(("bf16", "fp32"), ("fp32",)):
        for name, check in (("checkpoint", _checkpoint), ("a step taken twice", _twice)):
            yield from guarded(f"{name}, {precision}", partial(check, given, precision))


def _copies(given: Given) -> Iterator[Row]:
    """Send planes that are overwritten at once, while the device is busy, and read them in another thread."""
    slots, sent = given.pick(1_000_000, 10_000), 200
    values, busy = torch.zeros(slots, device=given.device), torch.randn(given.pick(4096, 64), given.pick(4096, 64))
    busy, copies = busy.to(given.device), HostCopies(slots, torch.device(given.device))
    waiting: list[tuple[int, PendingCopy]] = []
    room, done = threading.Semaphore(4), threading.Semaphore(0)
    found: list[int] = []

    def read() -> None:
        for i in range(sent):
            done.acquire()
            number, copy = waiting[i]
            found.append(int((copy.unpack() != number).sum()))
            room.release()

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, sent + 1):
        room.acquire()
        torch.mm(busy, busy)
        values.fill_(number)
        copy = copies.send(values)
        assert copy is not None, "a buffer was free"
        values.fill_(-1.0)
        waiting.append((number, copy))
        done.release()
    reader.join()
    yield judged(f"metrics copies: wrong values of {sent} planes of {slots:,}", float(sum(found)), 0.0)


def _differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the number of tensors that are not bitwise equal, or that only one side has."""
    common = a.keys() & b.keys()
    return float(len(a.keys() ^ b.keys()) + sum(not torch.equal(a[name], b[name]) for name in common))


def _snapshot(small: Small) -> dict[str, Tensor]:
    return {name: local(t).detach().clone() for name, t in small.engine.state().items()}


def _restore(small: Small, kept: dict[str, Tensor]) -> None:
    def read(tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                local(tensor).copy_(kept[name])

    small.engine.load(read)


def _checkpoint(given: Given, precision: Precision) -> Iterator[Row]:
    """Save in the background while a step changes the weights, load, and take the step again."""
    with small_run(given, precision) as small:
        small.step(0)
        at_save, folder = _snapshot(small), given.folder / f"checkpoints-{precision}"
        saver = Saver(folder, Retention(newest=1), make_saving_coordinator(60.0), None, background=True)
        saver.save(1, small.engine.state, lambda: None, counters={}, recipe_hash="", layout={})
        first = small.step(1)
        after = _snapshot(small)
        saver.wait()
        saver.close(60.0)
        small.engine.load(partial(load, folder / step_name(1)))
        yield judged(
            f"checkpoint, {precision}: tensors that differ after loading", _differing(_snapshot(small), at_save), 0.0
        )
        moved = sum(not torch.equal(at_save[name], after[name]) for name in at_save)
        assert moved > len(at_save) // 2, "the step in between changed the weights"
        if not given.cuda:  # on CUDA only deterministic kernels repeat a step
            second = small.step(1)
            same = first.terms == second.terms and not _differing(_snapshot(small), after)
            yield judged(f"checkpoint, {precision}: the step after it is another", float(not same), 0.0)


def _twice(given: Given, precision: Precision) -> Iterator[Row]:
    """Take a step twice from the same state: once as runs do, then with `run.deterministic`."""
    for mode in given.pick((False, True), (False,)):
        with one_order(torch.device(given.device), mode), small_run(given, precision) as small:
            start, ends = _snapshot(small), []
            for _ in range(2):
                _restore(small, start)
                result = small.step(0)
                ends.append(_snapshot(small) | {"loss": torch.tensor(result.terms["total_loss"])})
        differing = _differing(*ends)
        name = f"a step taken twice, {precision}{', deterministic' if mode else ''}: tensors that differ"
        if given.cuda and not mode:
            yield Row(name, differing, "tensors")
        else:
            yield judged(name, differing, 0.0)
