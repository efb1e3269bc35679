"""Checkpoints: one folder per step, complete or absent.

save: sharded tensors ─ plan.py: this rank's rectangles ─ torch.distributed.checkpoint ─► .tmp-step-N/ ─ manifest.json
      ─ rename ─► step-N/
load: step-N/ ─ sizes and checksums against manifest.json ─ metadata.py: its tensors ─► in place, under any sharding
"""
