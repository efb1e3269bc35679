"""Checkpoints: a folder a step, complete or absent.

tensors, sharded as they are ─ plan.py: whose rectangle ─ torch.distributed.checkpoint ─→ .tmp-step-N/ ─ manifest.json, rename ─→ step-N/
step-N/ ─ sizes and checksums against manifest.json, metadata.py: what tensors there are ─→ load in place, under any sharding
"""
