"""What this machine, or all machines of a job, can run; and whether they can run a recipe.

machine   Python, packages, devices, memory       ─┐
network   gloo and NCCL, ports, interfaces        ─┤
files     locks, rename, fsync where runs live    ─┼─► [Finding] of a host ─ job: of all hosts, clocks ─► examine ─► cli/doctor.py
slurm     its commands, its nodes                 ─┤
recipe    layout, back ends, data, room           ─┘

Everything is tried rather than asked for, and what was tried is put back.
"""
