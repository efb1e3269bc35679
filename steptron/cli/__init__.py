"""The command line: a thin layer with one file per command.

    argv ──main.py──▶ one command's module ──add_parser, run──▶ train, data, export … ──▶ exit code
         imports nothing heavy: torch, Hydra and the rest are imported inside `run`

The module of a command has `add_parser(subparsers)`, which adds its parser or parsers, and `run(args) -> int`, which
returns the exit code.
"""
