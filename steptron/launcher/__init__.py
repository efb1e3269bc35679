"""The start and the end of ranks: torch's elastic agent with the exit codes of this project, and the end of a process.

torchrun.py  `python -m steptron.launcher.torchrun`, used by launch/ and slurm/
leave.py     how a process runs its exit functions, writes what it printed, and ends
"""
