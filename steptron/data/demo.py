"""A corpus that needs no download: the standard library of the running Python.

    code    its modules without tests, one document per file
    prose   their docstrings, one document per module, and the topics of `pydoc`'s help

The same Python gives the same corpus; the hash order and a bound in bytes are the same on every machine. Documents have
the fields of `_CODE` or `_PROSE`, from which `--metadata` takes.
"""

import ast
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from steptron.data.documents import by_hash
from steptron.data.fields import PLAIN, Fields
from steptron.data.readers import Item
from steptron.errors import DataError

_LEFT_OUT = frozenset(["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"])
_MOST_BYTES = 16_000_000
"""The bound of the code in bytes. Twelve to fourteen million bytes are usual."""
_CODE = {"type": "code", "language": "python", "domain": "programming", "source": "stdlib"}
_PROSE = {"type": "documentation", "language": "english", "domain": "programming", "source": "stdlib"}


@dataclass(frozen=True)
class Module:
    """A source file, unchanged."""

    root: Path
    path: Path
    num_bytes: int
    fields: Fields = PLAIN

    @property
    def origin(self) -> str:
        return f"{self.path} {self.num_bytes}{self.fields.marks}"

    def documents(self) -> Iterator[str]:
        # tokenize.open decodes as the file's own coding line says.
        with tokenize.open(self.root / self.path) as file:
            yield from _documents([file.read()], _CODE, self.fields)


@dataclass(frozen=True)
class Docstrings:
    """The documentation strings of a source file, in order, as one document."""

    root: Path
    path: Path
    num_bytes: int
    fields: Fields = PLAIN

    @property
    def origin(self) -> str:
        return f"docstrings of {self.path} {self.num_bytes}{self.fields.marks}"

    def documents(self) -> Iterator[str]:
        tree = ast.parse((self.root / self.path).read_bytes())
        yield from _documents(["\n\n".join(filter(None, _docstrings(tree)))], _PROSE, self.fields)


@dataclass(frozen=True)
class HelpTopics:
    """The topics that `help()` explains: the language reference in plain text, one document per topic."""

    num_bytes: int
    fields: Fields = PLAIN

    @property
    def origin(self) -> str:
        return f"help topics {self.num_bytes}{self.fields.marks}"

    def documents(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        yield from _documents((topics[name] for name in sorted(topics)), _PROSE, self.fields)


def demo_items(fields: Fields = PLAIN) -> dict[str, list[Item]]:
    """Return the items of the two sources, `prose` and `code`. The text field of `fields` does not matter.

    Raises DataError if Python lacks its library's sources, or a field is asked for that the demo does not have.
    """
    unknown = [name for name in fields.options if name not in (fields.text, *_CODE)]
    if unknown:
        raise DataError(f"demo has no field {unknown[0]!r}: its metadata are {', '.join(_CODE)}")
    root = Path(sysconfig.get_path("stdlib"))
    # The help topics are a module of nothing but prose: each topic is a document there, and the module is no code.
    topics = root / "pydoc_data" / "topics.py"
    modules: list[Module] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if path != topics and not _LEFT_OUT.intersection(relative.parts):
            modules.append(Module(root, relative, path.stat().st_size, fields))
    if not modules:
        raise DataError(f"{root} holds no source files, the demo's text: give `data build` a folder of text instead")
    modules = by_hash(modules, lambda module: module.path.as_posix())
    reached = accumulate(module.num_bytes for module in modules)
    modules = [module for module, total in zip(modules, reached, strict=True) if total <= _MOST_BYTES]
    prose: list[Item] = [Docstrings(root, module.path, module.num_bytes // 6, fields) for module in modules]
    if topics.is_file():
        prose.append(HelpTopics(topics.stat().st_size, fields))
    return {"prose": prose, "code": list(modules)}


def _documents(texts: Iterable[str], record: Mapping[str, str], fields: Fields) -> Iterator[str]:
    """Yield the texts that are not empty, with the metadata of the record."""
    yield from (fields.document({**record, fields.text: text}) for text in texts if text)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
