"""A corpus that needs no download: the standard library of the running Python.

    code    its modules without tests, one document per file
    prose   their docstrings, one document per module, and the topics of `pydoc`'s help

The same Python gives the same corpus; the hash order and a bound in bytes are the same on every machine.
"""

import ast
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from steptron.data.documents import by_hash
from steptron.data.readers import Item
from steptron.errors import DataError

_LEFT_OUT = frozenset(["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"])
_MOST_BYTES = 16_000_000
"""The bound of the code in bytes. Twelve to fourteen million bytes are usual."""


@dataclass(frozen=True)
class Module:
    """A source file, unchanged."""

    root: Path
    path: Path
    num_bytes: int

    @property
    def origin(self) -> str:
        return f"{self.path} {self.num_bytes}"

    def documents(self) -> Iterator[str]:
        # tokenize.open decodes as the file's own coding line says.
        with tokenize.open(self.root / self.path) as file:
            yield from filter(None, [file.read()])


@dataclass(frozen=True)
class Docstrings:
    """The documentation strings of a source file, in order, as one document."""

    root: Path
    path: Path
    num_bytes: int

    @property
    def origin(self) -> str:
        return f"docstrings of {self.path} {self.num_bytes}"

    def documents(self) -> Iterator[str]:
        tree = ast.parse((self.root / self.path).read_bytes())
        yield from filter(None, ["\n\n".join(filter(None, _docstrings(tree)))])


@dataclass(frozen=True)
class HelpTopics:
    """The topics that `help()` explains: the language reference in plain text, one document per topic."""

    num_bytes: int

    @property
    def origin(self) -> str:
        return f"help topics {self.num_bytes}"

    def documents(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield topics[name]


def demo_items() -> dict[str, list[Item]]:
    """Return the items of the two sources, `prose` and `code`. Raises DataError if Python lacks its library's
    sources."""
    root = Path(sysconfig.get_path("stdlib"))
    # The help topics are a module of nothing but prose: each topic is a document there, and the module is no code.
    topics = root / "pydoc_data" / "topics.py"
    modules: list[Module] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if path != topics and not _LEFT_OUT.intersection(relative.parts):
            modules.append(Module(root, relative, path.stat().st_size))
    if not modules:
        raise DataError(f"{root} holds no source files, the demo's text: give `data build` a folder of text instead")
    modules = by_hash(modules, lambda module: module.path.as_posix())
    reached = accumulate(module.num_bytes for module in modules)
    modules = [module for module, total in zip(modules, reached, strict=True) if total <= _MOST_BYTES]
    prose: list[Item] = [Docstrings(root, module.path, module.num_bytes // 6) for module in modules]
    if topics.is_file():
        prose.append(HelpTopics(topics.stat().st_size))
    return {"prose": prose, "code": list(modules)}


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
