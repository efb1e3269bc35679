"""Shared by all tests: jaxtyped signatures of the maths are checked at every call."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("WANDB_SILENT", "true")

install_import_hook(["steptron.nn", "steptron.moe", "steptron.optim"], "beartype.beartype")
