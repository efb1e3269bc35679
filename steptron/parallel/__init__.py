"""Distribution of the network over ranks: meshes, parallelisms applied to a model, and sums over all ranks.

recipe.parallel ─ mesh.py ─► both views ─ rules.py ─► a layout that fits the model
                                            │
apply.py, in this order:                    ▼
  pipeline_split.py pp.py tied_embedding.py   pipeline: layers per stage, schedules, the embedding at both ends
  pipeline_stage.py turns.py                  gradients reduced in the last backward pass; pairs of passes in turns
  tp.py sequence.py                           tensor and sequence parallel
  ep.py                                       expert parallel: dispatch and combine
  cp.py ring.py                               context parallel: ring, gathered keys, halo
  recompute.py compile.py                     activation checkpointing, torch.compile
  fsdp.py                                     data parallel, dense and expert
                                            │
                                            ▼
network.py: a rank's part of the network, run on objective.py's loss ─► grad_norm.py: one norm, one clip

watchdog.py: names the lost rank · rank_status.py: each rank's step and phase · comm_timer.py: time spent waiting
flight_record.py: what NCCL's ranks waited for · collectives.py: one error for all ranks
"""
