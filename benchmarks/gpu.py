"""Everything that only a GPU can show, by one command: parity with float64, speed beside its roof, a training step.

    python benchmarks/gpu.py [--parts a,b] [--list] [--out FILE] [--seconds 360] [--device cpu] [--rehearse]

Each part runs in a process of its own, with a time limit. A part that raises, dies or hangs is one row, `failed`, and
the others go on. Rows are printed as they come, and written to one JSON file after each part. The exit code is 1 if a
row is wrong or a part failed, else 0.

Without a CUDA device, the parts that need none run on the CPU: the same comparisons with float64 on small tensors in
fp32, Triton's kernels under its interpreter, and the operators of GPUs on fake tensors. The others say that they did
not run, and why. `--rehearse` runs these too, on the CPU and with small sizes: that tests their code and measures
nothing.

On a machine without this project's environment it needs torch, triton, numpy, rich, jaxtyping, pyarrow, safetensors,
tokenizers and fsspec, and hydra-core, omegaconf and antlr4-python3-runtime. docs/gpu.md says what each part shows.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PATHS = (ROOT, ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "moe")
"""The folders that the parts import from: `tests` has the naive model in float64."""
PRELOADED = (
    "gpu_parts.attention",
    "gpu_parts.experts",
    "gpu_parts.formulas",
    "gpu_parts.elementwise",
    "gpu_parts.steps",
    "gpu_parts.fake",
    "gpu_parts.state",
)
"""The modules that are imported once for all processes."""
PROBE = "gpu_parts.speed:probe"
"""The function that yields the facts of the device."""
LEAST_S = 5.0
"""The seconds without which no part is started."""
NO_DEVICE = "there is no CUDA device"


class Part(NamedTuple):
    """A part of the command."""

    name: str
    function: str
    """The function that yields its rows, as MODULE:NAME."""
    limit_s: float
    """The seconds after which it is ended."""
    needs_cuda: bool = False
    what: str = ""


PARTS = (
    Part("roofs", "gpu_parts.speed:roofs", 20, True, "bf16 product and copy: the roofs of the other figures"),
    Part("attention", "gpu_parts.attention:attention", 60, False, "full, sliding, packed, fewer queries than keys"),
    Part("ring", "gpu_parts.attention:ring", 45, False, "the ring of 4 simulated ranks, forward and backward"),
    Part(
        "experts", "gpu_parts.experts:experts", 60, False, "every back end, load, limit and statistic; unwritten rows"
    ),
    Part("formulas", "gpu_parts.formulas:formulas", 30, False, "loss, norm, RoPE, SwiGLU, router and its ties"),
    Part(
        "elementwise",
        "gpu_parts.elementwise:elementwise",
        45,
        False,
        "Triton's norm, norm with RoPE, gate, rows, plan and statistics",
    ),
    Part("optimizers", "gpu_parts.formulas:optimizers", 20, False, "Muon's orthogonalisation, Muon, AdamW"),
    Part("steps", "gpu_parts.steps:steps", 60, False, "three steps of a small model beside the naive run"),
    Part("state", "gpu_parts.state:state", 60, False, "metrics copies, checkpoint and repeated steps, bit by bit"),
    Part("fake", "gpu_parts.fake:fake", 60, False, "operators of GPUs on fake tensors; an expert layer counted"),
    Part("speed", "gpu_parts.speed:speed", 60, True, "each kernel beside its roof"),
    Part(
        "training", "gpu_parts.training:training", 90, True, "a step with the 196B's widths: time, memory, host waits"
    ),
    Part("watching", "gpu_parts.training:watching", 60, True, "monitoring full against off, in turn"),
    Part("compile", "gpu_parts.training:compiled", 90, True, "compiled against eager, in turn"),
    Part(
        "packages",
        "gpu_parts.packages:packages",
        40,
        True,
        "TransformerEngine, DeepSpeed, FA3 and others, if installed",
    ),
    Part("nccl", "gpu_parts.nccl:nccl", 60, True, "a collective that times out leaves a record and a message"),
)


def cuda_devices() -> int:
    """Return the number of CUDA devices that the driver has; 0 without a driver. It imports no torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def work(function: str, given: Any, line: Connection) -> None:
    """Send the rows of a part, in a process of its own. An exception is the last row."""
    os.setsid()  # so that the end of a part is the end of its own children too
    from gpu_parts.rows import Given, failed

    module, name = function.split(":")
    try:
        for row in getattr(import_module(module), name)(Given(*given)):
            line.send(tuple(row))
    except BaseException as error:
        line.send(tuple(failed("the part", error)))
    line.close()
    os._exit(0)  # torch's threads may not outlive the interpreter


Row = tuple[str, float | None, str, float | None, str, str]
"""name, figure, unit, bound, verdict, note: see gpu_parts/rows.py, which imports torch."""


def rows_of(function: str, given: tuple, limit_s: float, method: str) -> Iterator[Row]:
    """Run a part and yield its rows. What does not end in `limit_s` seconds, or dies, is a row too."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=work, args=(function, given, theirs))
    process.start()
    theirs.close()
    deadline = time.monotonic() + limit_s
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            yield ours.recv()
        yield "the part", None, "", None, "failed", f"it did not end within {limit_s:.0f} s"
    except EOFError:
        process.join(LEAST_S)
        if process.exitcode != 0:
            yield "the part", None, "", None, "failed", f"its process ended with {process.exitcode}"
    finally:
        end(process)


def end(process: Any) -> None:
    """Kill a process and its children, if they still live."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def run(parts: list[Part], device: str, rehearse: bool, seconds: float, keep: Callable[..., None]) -> int:
    """Run these parts, print and keep their rows, and return the exit code."""
    start, roofs, method = time.monotonic(), (None, None), start_method(device)
    done: list[dict[str, Any]] = []
    for part in parts:
        began, rows = time.monotonic(), []
        left = seconds - (began - start)
        say(f"── {part.name}: {part.what}")
        with tempfile.TemporaryDirectory() as folder:
            given = (device, *roofs, Path(folder))
            for row in _rows(part, given, left, device, rehearse, method):
                rows.append(row)
                say(f"   {_text(row)}")
        roofs = _roofs(rows) or roofs
        took = round(time.monotonic() - began, 1)
        done.append({"part": part.name, "seconds": took, "rows": [dict(zip(FIELDS, row, strict=True)) for row in rows]})
        keep(device, done)
    verdicts = [row["verdict"] for part in done for row in part["rows"]]
    counts = {verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "failed", "not run")}
    say(f"{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}; {time.monotonic() - start:.0f} s")
    return 1 if counts["wrong"] or counts["failed"] else 0


FIELDS = ("name", "figure", "unit", "bound", "verdict", "note")


def _rows(part: Part, given: tuple, left: float, device: str, rehearse: bool, method: str) -> Iterator[Row]:
    if part.needs_cuda and device != "cuda" and not rehearse:
        return iter([("the part", None, "", None, "not run", NO_DEVICE)])
    if left < LEAST_S:
        return iter([("the part", None, "", None, "not run", "the time of the command (--seconds) is over")])
    return rows_of(part.function, given, min(part.limit_s, left), method)


def start_method(device: str) -> str:
    """Return how processes start: forks of one that has imported everything, unless CUDA does not start in these."""
    if device != "cuda":
        return "forkserver"
    rows = list(rows_of(PROBE, (device, None, None, Path()), 60.0, "forkserver"))
    for row in rows:
        say(f"   {_text(row)}")
    return "spawn" if any(row[4] == "failed" for row in rows) else "forkserver"


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def _roofs(rows: list[Row]) -> tuple[float | None, float | None] | None:
    """Return the roofs among these rows, in operations and bytes per second; None if there are none."""
    found = {name: figure for name, figure, *_ in rows if figure is not None}
    if "bf16 product" not in found or "copy" not in found:
        return None
    return found["bf16 product"] * 1e12, found["copy"] * 1e9


def _text(row: Row) -> str:
    name, figure, unit, bound, verdict, note = row
    shown = [name.ljust(60), "" if figure is None else f"{figure:.4g} {unit}".rstrip()]
    if bound is not None and figure is not None:
        shown.append(f"{figure / bound:.0%} of {bound:.4g}" if verdict == "measured" else f"(at most {bound:.3g})")
    shown += ["" if verdict == "measured" else verdict, note if verdict != "right" else ""]
    return "  ".join(word for word in shown if word)


def machine(device: str) -> dict[str, Any]:
    """Return the machine and the versions that the figures belong to."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"device": device, "python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in ("torch", "triton", "numpy", "hydra-core", "omegaconf"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> int:
    """Run the chosen parts; 1 if a row is wrong or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="the parts to run, with commas between them; default: all")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json", help="the JSON file")
    parser.add_argument("--seconds", type=float, default=360.0, help="the seconds that all parts have")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a device")
    parser.add_argument("--rehearse", action="store_true", help="run the parts that need a GPU on the CPU too")
    args = parser.parse_args()
    names = [part.name for part in PARTS]
    chosen = args.parts.split(",") if args.parts else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--parts: there is no part {', '.join(unknown)}; the parts are {', '.join(names)}")
    if args.list:
        for part in PARTS:
            print(f"{part.name:12} {part.limit_s:3.0f} s  {'GPU ' if part.needs_cuda else '    '} {part.what}")
        return 0
    device = args.device or ("cuda" if cuda_devices() else "cpu")
    prepare(device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    here = machine(device)

    def keep(device: str, done: list[dict[str, Any]]) -> None:
        args.out.write_text(json.dumps({"machine": here, "parts": done}, indent=1))

    say(", ".join(f"{name} {value}" for name, value in here.items()))
    parts = [part for part in PARTS if part.name in chosen]
    code = run(parts, device, args.rehearse, args.seconds, keep)
    print(f"written to {args.out}")
    return code


def prepare(device: str) -> None:
    """Set what the processes of the parts get from this one: where they import from, and Triton's interpreter."""
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path[:0] = [str(path) for path in PATHS]
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a question for devices must not start CUDA
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: threads would wait for each other
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


if __name__ == "__main__":
    sys.exit(main())
