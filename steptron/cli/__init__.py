"""The command line, thin: a file a command.

    argv ──main.py──▶ one command's module ──add_parser, run──▶ train, data, export … ──▶ exit code
         imports nothing heavy: torch, Hydra and the rest are imported inside `run`

A command's module has `add_parser(subparsers)`, which adds its parser or parsers, and `run(args) -> int`, which returns
the exit code.
"""
