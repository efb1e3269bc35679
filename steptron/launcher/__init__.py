"""The launcher: torch's elastic agent with the exit codes of this project, and the orderly end of a process.

torchrun.py  `python -m steptron.launcher.torchrun`, used by launch/ and slurm/
leave.py     runs a process's exit functions, flushes its output, and exits
"""
