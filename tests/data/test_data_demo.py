import ast
import textwrap
from pathlib import Path

import pytest
from steptron.data.demo import Docstrings, Module, demo_items
from steptron.data.fields import Fields, MarkedText, parse_metadata
from steptron.errors import DataError


def test_the_corpus_is_the_librarys_code_and_its_documentation() -> None:
    items = demo_items()
    assert list(items) == ["prose", "code"]
    assert 9e6 < sum(item.num_bytes for item in items["code"]) <= 16e6
    modules = {item.path.as_posix(): item for item in items["code"] if isinstance(item, Module)}
    assert {"textwrap.py", "json/decoder.py"} <= set(modules)
    assert not any("test" in Path(path).parts or "site-packages" in path for path in modules)
    assert "pydoc_data/topics.py" not in modules
    [code] = modules["textwrap.py"].documents()
    assert code == Path(textwrap.__file__).read_text()


def test_prose_is_docstrings_by_module_and_help_topics() -> None:
    prose = demo_items()["prose"]
    [item] = [item for item in prose if isinstance(item, Docstrings) and item.path == Path("textwrap.py")]
    [document] = item.documents()
    assert textwrap.__doc__ is not None
    assert document.startswith(textwrap.__doc__.strip())
    assert "Remove any common leading whitespace" in document
    assert "def dedent" not in document
    topics = list(prose[-1].documents())
    assert len(topics) > 50
    assert any(topic.startswith('The "if" statement') for topic in topics)


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    source = '"""Module."""\nclass A:\n    """Class.\n\n    More.\n    """\n    def f(self):\n        "Method."\nx = "no docstring"\n'
    (tmp_path / "m.py").write_text(source)
    assert ast.parse(source)
    assert list(Docstrings(tmp_path, Path("m.py"), 0).documents()) == ["Module.\n\nClass.\n\nMore.\n\nMethod."]


def test_metadata_of_the_demo_are_those_of_its_kind_of_text() -> None:
    prose, code = demo_items(Fields(metadata=parse_metadata(["type,language"]))).values()
    for items, prefix in (
        (prose, "type: documentation | language: english\n"),
        (code, "type: code | language: python\n"),
    ):
        marked = next(iter(items[-1].documents()))
        assert isinstance(marked, MarkedText)
        assert marked.prefix == prefix
        assert marked == next(iter(demo_items()["prose" if items is prose else "code"][-1].documents()))
    with pytest.raises(DataError, match=r"^demo has no field 'year': its metadata are type, language, domain, source"):
        demo_items(Fields(masks="year"))


def test_the_order_is_always_the_same() -> None:
    assert demo_items() == demo_items()
