"""Runs a function on several gloo ranks: one group of forks of a server that has imported everything, for all the
checks of a test."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forks import IMPORTED, reseed
from waiting import PATIENCE_S


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start a process that calls the function, in this process's environment: a fork of a server that has imported what
    it needs.

    It ends with this process. Both are sent to it, so they are to be found by name in modules."""
    process = context().Process(target=_call, args=(dict(os.environ), function, args), daemon=True)
    process.start()
    return process


def run_ranks(world_size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(rank, *args)` on every rank of a gloo group; what each returned, in order of ranks.

    Raises as `run_processes` does."""
    store = folder / f"store-{os.urandom(4).hex()}"
    return run_processes(world_size, _in_a_group, world_size, str(store), function, args)


def run_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, *args)` in as many processes, which make a process group themselves if they want one; what each
    returned.

    Raises `AssertionError` with the first failing rank's traceback, and where a rank dies without one."""
    results = context().SimpleQueue()
    workers = [start(_work, rank, results, function, args) for rank in range(world_size)]
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            if results.empty():
                wait([results._reader, *(w.sentinel for rank, w in enumerate(workers) if rank not in answers)])  # pyright: ignore
            if results.empty():
                raise AssertionError(f"a rank died without an answer: exit codes {[w.exitcode for w in workers]}")
            rank, value, failure = results.get()
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            answers[rank] = value
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.kill()
    return [answers[rank] for rank in range(world_size)]


def context() -> Any:
    """The server that all ranks and processes of tests are forked from."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(IMPORTED))
    return made


def _call(environment: dict[str, str], function: Callable[..., Any], args: tuple) -> None:
    os.environ.clear()  # the server has that of the time when it was started
    os.environ.update(environment)
    reseed()
    function(*args)


def _in_a_group(rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    # A rank that has connected may be done with a short function, and gone, before the others have.
    dist.barrier()
    value = function(rank, *args)
    dist.destroy_process_group()
    return value


def _work(rank: int, results, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    os._exit(0)  # torch's threads may not outlive the interpreter
