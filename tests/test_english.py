"""Docstrings open with a sentence that a reader understands without the code: subject or verb first, not a fragment."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "steptron"
FRAGMENT = re.compile(r"(Of|What|How|Which|Whose|Whether|As|By|Have|So|The same)\b")
MOST = 0.007
"""The largest share of docstrings that may open with a fragment."""

PACKAGES = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a module, those under fields and constants included."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(found))):
                    yield statement.lineno, found


def opening_fragments(folder: Path) -> tuple[int, list[str]]:
    """Return the number of docstrings below a folder, and where those stand that open with a fragment."""
    count, fragments = 0, []
    for path in sorted(folder.rglob("*.py")):
        for line, found in docstrings(path.read_text()):
            count += 1
            if FRAGMENT.match(found.strip()):
                fragments.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {found.strip().splitlines()[0]}")
    return count, fragments


def test_docstrings_of_the_single_files_do_not_open_with_a_fragment() -> None:
    for path in PACKAGE.glob("*.py"):
        for line, found in docstrings(path.read_text()):
            assert not FRAGMENT.match(found.strip()), f"{path.name}:{line}: {found}"


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_do_not_open_with_a_fragment(package: str) -> None:
    count, fragments = opening_fragments(PACKAGE / package)
    assert count > 0
    assert len(fragments) <= MOST * count, "\n".join([f"{len(fragments)} of {count} open with a fragment:", *fragments])


def test_docstrings_of_fields_constants_and_functions_are_counted() -> None:
    text = (
        '"""a"""\nA = 1\n"""b"""\nclass C:\n    """c"""\n    x: int\n    """d"""\n    def f(self):\n        """e"""\n'
    )
    assert sorted(found for _, found in docstrings(text)) == ["a", "b", "c", "d", "e"]
