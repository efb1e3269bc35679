"""The user's mesh on few ranks: each axis becomes a divisor of its size, with as many axes above 1 as possible.

recipe's axes ─ asked_axes ─► sizes, None for "the rest" ─ fit ─► both views over at most N ranks, axes left out
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import lcm, prod

from steptron.config.schema import DenseMeshConfig, ExpertMeshConfig, ParallelConfig
from steptron.errors import MeshError
from steptron.parallel.mesh import DENSE_AXES, EXPERT_AXES, Layout, axis_field, resolve_layout, written_sizes

Sizes = dict[str, int | None]
"""The sizes by axis. None means as many as the number of ranks leaves."""

PRIORITY = ("pp", "tp", "cp", "ep", "etp", "dp_shard", "edp_shard", "dp_replicate", "edp_replicate")
"""The axes in order of priority, if there is not room for all."""

MOST_RANKS = 512
"""The largest number of ranks that is tried when searching room for every axis."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The layout of the proof."""

    layout: Layout
    left_out: tuple[str, ...]
    """The axes above 1 that have size 1 in it."""
    enough: int | None
    """The fewest ranks with room for every axis, if some are left out. None if none was found."""


def asked_axes(parallel: ParallelConfig, world_size: int | None) -> tuple[Sizes, Layout]:
    """Return the sizes that the user asks for, and the layout on the fewest ranks that it fits (or on `world_size`).

    Raises `MeshError` if it fits none.
    """
    world_size = world_size or parallel.ranks
    views = [written_sizes(parallel, axes) for axes in (DENSE_AXES, EXPERT_AXES)]
    written = dict(zip(DENSE_AXES + EXPERT_AXES, views[0] + views[1], strict=True))
    complete = [prod(view) for view in views if -1 not in view]
    if parallel.pp == -1 and world_size is None:
        raise MeshError("parallel.pp=-1 depends on the number of ranks of the run; say it with --world")
    world = world_size or (complete[0] if complete else lcm(*(prod(n for n in view if n > 0) for view in views)))
    layout = resolve_layout(parallel, world)
    if world_size is not None or complete:
        return {**layout.dense, **layout.expert}, layout
    return {axis: None if size == -1 else size for axis, size in written.items()}, layout


def fit(sizes: Sizes, ranks: int) -> Fit:
    """Return the best layout on at most `ranks` ranks."""
    chosen = _better(sizes, range(1, ranks + 1), None)
    assert chosen is not None, "one rank is always a layout"
    left_out, enough = _left_out(sizes, chosen), None
    larger: dict[str, int] | None = chosen
    for n in range(ranks + 1, MOST_RANKS + 1) if left_out else ():
        larger = _better(sizes, (n,), larger)
        if larger is not None and not _left_out(sizes, larger):
            enough = n
            break
    layout = Layout(
        world_size=_world(chosen),
        dense={axis: chosen[axis] for axis in DENSE_AXES},
        expert={axis: chosen[axis] for axis in EXPERT_AXES},
    )
    return Fit(layout=layout, left_out=left_out, enough=enough)


def as_parallel(layout: Layout) -> dict[str, object]:
    """Return the fields of `ParallelConfig` that make it this layout."""
    dense, expert = layout.dense, layout.expert
    return {
        "pp": dense["pp"],
        "dense": DenseMeshConfig(**{axis: dense[axis] for axis in DENSE_AXES[1:]}),
        "expert": ExpertMeshConfig(**{axis_field(axis): expert[axis] for axis in EXPERT_AXES[1:]}),
    }


def describe(sizes: Sizes | dict[str, int]) -> str:
    """Return both views in a line, each with the keys of its section of the recipe; axes of size 1 are left out."""

    def view(name: str, axes: tuple[str, ...]) -> str:
        shown = [
            f"{axis_field(axis)}={'rest' if sizes[axis] is None else sizes[axis]}" for axis in axes if sizes[axis] != 1
        ]
        return f"{name} {' · '.join(shown) or 'one rank'}"

    pp = "" if sizes["pp"] == 1 else f"pp={sizes['pp']}, "
    return f"{pp}{view('dense', DENSE_AXES[1:])}, {view('expert', EXPERT_AXES[1:])}"


def _better(sizes: Sizes, worlds: Iterable[int], than: dict[str, int] | None) -> dict[str, int] | None:
    """Return the best layout on any of these numbers of ranks, or the given one."""
    found = [axes for axes in (than, *(_best(sizes, n) for n in worlds)) if axes is not None]
    return max(found, key=lambda axes: (*_score(sizes, axes), _world(axes)), default=None)


def _best(sizes: Sizes, world: int) -> dict[str, int] | None:
    """Return the best layout on exactly so many ranks, or None."""
    options = []
    for pp in _divisors(sizes["pp"] or 1):
        if world % pp:
            continue
        views = [list(_views(sizes, axes[1:], world // pp)) for axes in (DENSE_AXES, EXPERT_AXES)]
        if all(views):
            # The views share nothing but the ranks, so that each is chosen by itself.
            options.append(
                {"pp": pp} | {a: n for view in views for a, n in max(view, key=lambda v: _score(sizes, v)).items()}
            )
    return max(options, key=lambda axes: _score(sizes, axes), default=None)


def _views(sizes: Sizes, axes: tuple[str, ...], ranks: int) -> Iterator[dict[str, int]]:
    """Yield all ways to make `ranks` of these axes."""
    known = [(axis, _divisors(size)) for axis in axes if (size := sizes[axis]) is not None]
    free = [axis for axis in axes if sizes[axis] is None]
    for chosen in product(*(divisors for _, divisors in known)):
        view = dict(zip((axis for axis, _ in known), chosen, strict=True))
        rest, odd = divmod(ranks, prod(chosen))
        if not odd and (free or rest == 1):
            yield view | dict.fromkeys(free, rest)


def _score(sizes: Sizes, axes: dict[str, int]) -> tuple[int, tuple[bool, ...], bool, int, int]:
    """Return the score of a layout, compared in this order: more of the written axes above 1; those of a higher
    priority; all of them exactly as written; more of the axes above 1 that take the rest; more of the written ones as
    written."""
    written = [axis for axis in PRIORITY if axis in axes and sizes[axis] not in (1, None)]
    above = tuple(axes[axis] > 1 for axis in written)
    exact = sum(axes[axis] == sizes[axis] for axis in written)
    rest = sum(axes[axis] > 1 for axis in axes if sizes[axis] is None)
    return sum(above), above, exact == len(written), rest, exact


def _left_out(sizes: Sizes, axes: dict[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in PRIORITY if sizes[axis] != 1 and axes[axis] == 1)


def _world(axes: dict[str, int]) -> int:
    return prod(axes[axis] for axis in DENSE_AXES)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
