"""The recipe reference: the committed page is what the docstrings generate, and it lists every key of a recipe."""

import dataclasses
import re
from pathlib import Path

from steptron.config.decode import encode
from steptron.config.reference import keys, markdown, sections
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
MAPPINGS = re.compile(r"^(stages|data\.sources)\.[^.]+")


def test_the_committed_page_is_what_the_docstrings_generate() -> None:
    assert PAGE.read_text() == markdown(), "docs/recipe.md is out of date: run `make reference`"


def test_every_key_of_a_resolved_recipe_is_on_the_page() -> None:
    """The keys come from a resolved recipe, the page is read as text: the generator takes no part in the comparison."""
    listed = _listed(PAGE.read_text())
    for key in _leaves(encode(resolve("step3p5_flash"))):
        general = re.sub(r"\.ramp\.\d+", ".ramp.N", MAPPINGS.sub(r"\1.NAME", key))
        general = re.sub(r"\.(mix|routed|shared)\..*", r".\1", general)
        general = re.sub(r"\.(layers|parts|keep_events|probes|addresses)\.\d+", r".\1", general)
        assert general in listed, key


def test_the_list_of_keys_has_those_of_the_page_that_hold_values() -> None:
    listed = {key.name for key in keys()}
    page = _listed(PAGE.read_text())
    assert listed == {key for key in page if not any(other.startswith(f"{key}.") for other in page)}
    peak = next(key for key in keys() if key.name == "stages.NAME.lr.peak")
    assert peak == ("stages.NAME.lr.peak", "number, at least 0", None, "The learning rate after warm-up.")


def test_every_link_leads_to_a_heading() -> None:
    text = PAGE.read_text()
    headings = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^#+ (.*)$", text, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links, "sections are linked"
    assert links <= headings


def test_every_field_says_what_it_is_in_a_full_sentence() -> None:
    for section in sections():
        assert section.cls is Recipe or section.keys[0]
        rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", _part(section.keys), re.M)
        assert [name for name, _ in rows] == [field.name for field in dataclasses.fields(section.cls)]
        for name, effect in rows:
            assert re.match(r"[A-Z].*[.]$", effect), f"{section.keys[0]}.{name}: {effect}"


def _part(keys: list[str]) -> str:
    """Return the part of the page under the heading of these keys; the part above all headings for the recipe
    itself."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))[", ".join(keys)]


def _listed(page: str) -> set[str]:
    """Return the full keys of all rows."""
    listed, prefixes = set(), [""]
    for line in page.splitlines():
        if line.startswith("## "):
            prefixes = [f"{key}." for key in line[3:].split(", ")]
        elif row := re.match(r"\| `(\w+)` \|", line):
            listed |= {prefix + row[1] for prefix in prefixes}
    return listed


def _leaves(values: object, path: str = "") -> list[str]:
    if isinstance(values, dict) and values:
        return [leaf for key, item in values.items() for leaf in _leaves(item, f"{path}.{key}" if path else str(key))]
    if isinstance(values, list) and values:
        return [leaf for i, item in enumerate(values) for leaf in _leaves(item, f"{path}.{i}")]
    return [path]
