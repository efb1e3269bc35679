"""The published 196B model on 4,096 ranks that are not there: each stage as a rank would hold it, on the meta
device."""

import json
import subprocess
import sys

SCRIPT = """
import json
from dataclasses import replace
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from steptron.config.resolve import resolve
from steptron.model.transformer import Transformer
from steptron.nn.to_local import local
from steptron.nn.shard_geometry import rectangle_at
from steptron.parallel.apply import distribute
from steptron.parallel.mesh import build_meshes, resolve_layout
from steptron.parallel.rules import check_layout
from steptron.parallel.pipeline_split import cut

WORLD, PP = 4096, 8
recipe = resolve("step3p5_flash")
recipe = replace(recipe, stages={name: replace(stage, mtp_heads=None) for name, stage in recipe.stages.items()})
layout = resolve_layout(recipe.parallel, WORLD)
check_layout(recipe, layout)
parts = cut(recipe, PP)


def build(stage):
    dist.init_process_group("fake", store=FakeStore(), rank=stage * (WORLD // PP), world_size=WORLD)
    meshes = build_meshes(layout, "cpu")
    with torch.device("meta"):
        model = Transformer(recipe.model, parts[stage])
    distribute(model, recipe, meshes)
    return model


def elements(p):
    '''Of this rank; over all ranks of the stage, counting copies once.'''
    shape, mesh = tuple(p.shape), tuple(p.device_mesh.shape)
    sizes = {c: prod(rectangle_at(shape, mesh, p.placements, c).size) for c in product(*map(range, mesh))}
    assert sizes[tuple(p.device_mesh.get_coordinate())] == local(p).numel()
    copies = prod(n for n, placement in zip(mesh, p.placements) if placement.is_replicate())
    return local(p).numel(), sum(sizes.values()) // copies


layers, copies = sum(len(part.ffns) for part in parts), sum(bool(part.blocks) for part in parts)
found = {"layers": layers, "copies": copies, "whole": 0, "local": [], "copied": 0}
for stage in range(PP):
    model = build(stage)
    counts = {name: elements(p) for name, p in model.named_parameters()}
    found["local"].append(sum(mine for mine, _ in counts.values()))
    copy = not parts[stage].first and "embedding.weight" in counts
    found["copied"] += counts["embedding.weight"][1] if copy else 0
    found["whole"] += sum(whole for _, whole in counts.values())
    dist.destroy_process_group()
print(json.dumps(found))
"""


def test_flash_on_4096_ranks_is_whole():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["layers"] == 45
    assert found["copies"] == 2, "MTP blocks are on two stages"
    assert found["copied"] == 2 * 128_896 * 4096, "each of them reads a copy of the embedding"
    assert found["whole"] - found["copied"] == 199_384_289_280
    # 512 ranks share a stage: the dearest in memory holds less than twice the mean.
    assert max(found["local"]) < 2 * 199_384_289_280 / 4096
