"""How the network is laid over ranks: the meshes, what is applied to a model for each axis, and quantities over all ranks.

recipe.parallel ─ mesh.py ─► both views ─ rules.py ─► a layout that fits the model
                                            │
apply.py, in this order:                    ▼
  stages.py pp.py tie.py    pipeline: layers a stage, schedules, the embedding at both ends
  tp.py sequence.py         tensor and sequence parallel
  ep.py                     experts: dispatch and return
  cp.py ring.py             context parallel: ring, gathered keys, halo
  recompute.py compile.py   activation checkpointing, torch.compile
  fsdp.py                   data parallel, dense and expert
                                            │
                                            ▼
network.py: a rank's share, run by objective.py's sums ─► grad_norm.py: one norm, one clip

watchdog.py: which rank was lost · collectives.py: one error for all ranks
"""
