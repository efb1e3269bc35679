"""The fields of a record that make a document: its text, its metadata, and the spans of it that are not trained on.

    record ─ Fields.document ─► text, with its prefix and spans if it has any
    schema of Arrow or Parquet ─ Fields.columns ─► the columns to read

A metadata prefix is one line of text in front of the document, such as `type: code | language: python`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steptron.data.opening import NotReadable
from steptron.errors import DataError

_NAMES = 20
"""The largest number of field names in a message."""
_PLAIN = re.compile(r"[^\x00-\x1f\x7f\u2028\u2029|]+")
"""A value of metadata: it can stand in the line of a prefix."""


class MarkedText(str):
    """The text of a document that has a metadata prefix or masked spans. Any other text is a plain str."""

    prefix: str
    """The line of metadata in front of the text, with its end. Empty for none."""
    spans: tuple[tuple[int, int], ...]
    """The ranges of characters of the text that are not trained on."""

    def __new__(cls, text: str, prefix: str, spans: tuple[tuple[int, int], ...] = ()) -> "MarkedText":
        marked = super().__new__(cls, text)
        marked.prefix, marked.spans = prefix, spans
        return marked


@dataclass(frozen=True)
class Metadata:
    """One entry of a prefix."""

    key: str
    """The word before the colon."""
    field: str
    """The field of a record that holds the value. Empty if the value is the same for the whole source."""
    value: str = ""
    """The value of the whole source."""


@dataclass(frozen=True)
class Fields:
    """The fields of a record. "a.b" names the field of that name, or else the field b of the object a."""

    text: str = "text"
    """The field that holds the text."""
    metadata: tuple[Metadata, ...] = ()
    """The entries of the prefix, in order."""
    masks: str | None = None
    """The field that holds the spans of characters that are not trained on. None means no spans."""

    @property
    def marks(self) -> str:
        """Return a text that identifies metadata and masks, empty without them."""
        entries = "".join(
            f" {one.key}={one.value!r}" if one.value else f" {one.key}:{one.field}" for one in self.metadata
        )
        return (f" metadata{entries}" if entries else "") + (f" masks {self.masks}" if self.masks else "")

    @property
    def origin(self) -> str:
        """Return a text that identifies all fields."""
        return self.text + self.marks

    @property
    def options(self) -> dict[str, str]:
        """Return the fields that are read, each with the option that names it."""
        masks = {self.masks: "--mask-field"} if self.masks else {}
        return masks | {one.field: "--metadata" for one in self.metadata if one.field} | {self.text: "--text-field"}

    def document(self, record: Mapping[str, Any]) -> str:
        """Return the text of a record, marked if it has a prefix or spans. Raises NotReadable."""
        text = _text(_value(record, self.text, "--text-field"), self.text)
        prefix = self._prefix(record)
        spans = _spans(_value(record, self.masks, "--mask-field"), self.masks, len(text)) if self.masks else ()
        return MarkedText(text, prefix, spans) if prefix or spans else text

    def plain(self, text: str) -> str:
        """Return the text of a file that is one document. Raises NotReadable if other fields are asked for."""
        if self.masks:
            raise NotReadable(f"is text, without a field {self.masks!r}: leave out --mask-field, or the file")
        if without := next((one.field for one in self.metadata if one.field), None):
            raise NotReadable(f"is text, without a field {without!r}: give it a value, --metadata {without}=VALUE")
        prefix = self._prefix({})
        return MarkedText(text, prefix) if prefix else text

    def columns(self, schema: Any) -> list[str]:
        """Return the columns of an Arrow schema that hold the fields: the name itself, or its first part for a field of
        a struct. Raises NotReadable if there is no such field, or the text is none."""
        return list(dict.fromkeys(_column(schema, name, option) for name, option in self.options.items()))

    def _prefix(self, record: Mapping[str, Any]) -> str:
        entries = []
        for one in self.metadata:
            value = one.value or _plain(_value(record, one.field, "--metadata"), one.field)
            if value:
                entries.append(f"{one.key}: {value}")
        return " | ".join(entries) + "\n" if entries else ""


PLAIN = Fields()
"""A record with its text in the field `text`, without metadata and masks."""


def parse_metadata(options: Sequence[str]) -> tuple[Metadata, ...]:
    """Return the entries of `--metadata`: FIELD, or KEY=VALUE for the whole source, with commas between them."""
    found: dict[str, Metadata] = {}
    for entry in (entry.strip() for option in options for entry in option.split(",")):
        name, sign, value = (part.strip() for part in entry.partition("="))
        key = name if sign else name.rpartition(".")[2]
        if not re.fullmatch(r"[\w.-]+", name) or not key or (sign and not _PLAIN.fullmatch(value)):
            raise DataError(
                f"--metadata {entry!r} must be a field, such as language or doc.language, or KEY=VALUE in one line "
                "without `|`, such as domain=wiki; put commas between several"
            )
        if key in found:
            raise DataError(f"--metadata {entry!r}: {key} is given twice: leave one out")
        found[key] = Metadata(key, "" if sign else name, value)
    return tuple(found.values())


def no_field(name: str, names: Sequence[str], option: str = "--text-field") -> str:
    """Return the reason why a record without the field is not read."""
    known = [*map(repr, names[:_NAMES]), *(["…"] if len(names) > _NAMES else [])]
    return f"has no field {name!r}; there are {', '.join(known) or 'none'}: name one with {option}"


def _value(record: Mapping[str, Any], name: str, option: str) -> Any:
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise NotReadable(no_field(name, list(_field_names(record)), option))
        value = value[part]
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise NotReadable(f"the field {name!r} must be text, not {found}: fix it or leave it out")
    _check_encodable(value, name)
    if not value:
        raise NotReadable(f"the field {name!r} is empty: leave it out")
    return value


def _plain(value: Any, name: str) -> str:
    """Return a value of metadata, empty for null and for empty text."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise NotReadable(f"the field {name!r} must be text or a whole number, not a {type(value).__name__}: fix it")
    if not _PLAIN.fullmatch(str(value)):
        raise NotReadable(f"the field {name!r} must be one line without `|`, it is metadata: fix it")
    _check_encodable(str(value), name)
    return str(value)


def _spans(value: Any, name: str, length: int) -> tuple[tuple[int, int], ...]:
    """Return the spans of a record. null means none."""
    if value is None:
        return ()
    wanted = f"the field {name!r} must be a list of spans [start, end] of characters"
    if not isinstance(value, list | tuple):
        raise NotReadable(f"{wanted}, not a {type(value).__name__}: fix it")
    spans, before = [], 0
    for span in value:
        whole = isinstance(span, list | tuple) and all(type(bound) is int for bound in span)
        if not whole or len(span) != 2:
            raise NotReadable(f"{wanted}, not {span!r:.40}: fix it")
        start, end = span
        if not 0 <= start < end <= length:
            raise NotReadable(f"{wanted} with 0 ≤ start < end ≤ {length}, the length of the text, not {span}: fix it")
        if start < before:
            raise NotReadable(f"{wanted} in order and apart, and {[start, end]} begins before {before}: fix it")
        spans.append((start, end))
        before = end
    return tuple(spans)


def _check_encodable(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotReadable(f"the field {name!r} has half of a surrogate pair: fix it or leave it out") from error


def _column(schema: Any, name: str, option: str) -> str:
    import pyarrow.types as types

    column, *rest = [name] if name in schema.names else name.split(".")
    if column not in schema.names:
        raise NotReadable(no_field(name, [field.name for field in schema], option))
    kind = schema.field(column).type
    for part in rest:
        if not types.is_struct(kind) or kind.get_field_index(part) < 0:
            inner = [f"{column}.{field.name}" for field in kind] if types.is_struct(kind) else []
            raise NotReadable(no_field(name, [*(other for other in schema.names if other != column), *inner], option))
        kind = kind.field(part).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if option == "--text-field" and not is_text:
        raise NotReadable(f"has no text in the field {name!r}, but {kind}: name another with --text-field")
    return column


def _field_names(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, Mapping) and prefix.count(".") < 3:
            yield from _field_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name
