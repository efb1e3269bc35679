"""Checks of this machine, or of all machines of a job, and of whether they can run a recipe.

    machine   Python, packages, devices, memory    ─┐
    network   gloo and NCCL, ports, interfaces     ─┤
    files     locks, rename, fsync where runs live ─┼─► [Finding] of a host ─ job: all hosts ─► examine ─► cli/doctor.py
    slurm     its commands, its nodes              ─┤
    recipe    layout, back ends, data, room        ─┘

The checks try things instead of asking for versions, and remove what they made.
"""
