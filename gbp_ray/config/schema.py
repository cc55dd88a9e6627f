"""The base of all sections of a job: marks on fields, faults in words, options without effect.

All faults of a job go into one line, with dotted paths and the nearest valid name.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

__all__ = [
    "MOST_EXAMPLES",
    "PLUG_IN",
    "Fraction",
    "Idle",
    "Section",
    "Switch",
    "Worded",
    "dotted",
    "explain_faults",
    "find_field",
    "find_idle_options",
    "is_matched",
    "match_names",
    "nearest_glob",
    "nearest_name",
    "plain",
    "refuse",
    "section_of",
]

PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""The name of code in a job: "module:attr"."""

MOST_EXAMPLES = 10**9
"""More examples than any data set has."""

_MOST_DEPTH = 100  # of lists and tables in a value
_MOST_FAULTS = 50
_MOST_SHOWN = 300  # characters of a value

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A part of a whole."""


@dataclass(frozen=True)
class Idle:
    """Marks a field that has no effect under a condition.

    Attributes:
        reason: Follows the section's name and a dot in the warning; {name} is a field's value.
        when: The condition; takes the section.
        of_job: The condition takes the whole job, and the reason names its own section.
    """

    reason: str
    when: Callable[[Any], bool]
    of_job: bool = False


@dataclass(frozen=True)
class Switch:
    """Marks a field of which one value turns off all others of its section."""

    off: object


@dataclass(frozen=True)
class Worded:
    """Marks a field whose faults are all worded in one way."""

    fault: str


Mark = TypeVar("Mark", Idle, Switch, Worded)


class Section(BaseModel):
    """A part of a job: frozen, without unknown keys, each field described by the text below it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Returns the section itself, which is frozen; pydantic copies defaults for every job."""
        return self

    @field_validator("*")
    @classmethod
    def _can_be_recorded(cls, value: Any) -> Any:
        is_plain = not value or (isinstance(value, str) and value.isascii())
        if isinstance(value, str | tuple | dict) and not is_plain:
            texts = list(value) if isinstance(value, dict) else value
            try:
                json.dumps(texts, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:
                raise ValueError("holds what is no UTF-8 text; use another name") from None
        # -0.0 would give a trial another name.
        return 0.0 if isinstance(value, float) and value == 0 else value


def refuse(*faults: str | bool) -> None:
    """Raises a ValueError with all faults that are text, written as `condition and text`."""
    if found := [fault for fault in faults if fault]:
        raise ValueError(*found)


def plain(value: Any) -> Any:
    """Converts a value to JSON and back, as it will reach workers and records.

    Raises:
        TypeError: It has no form in JSON.
        ValueError: It holds a number that is not finite, text that is not Unicode, or deep nesting.
        RecursionError: It is nested far too deeply.
    """
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner = [item for item in level if isinstance(item, dict | list | tuple)]
        level = [x for item in inner for x in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise ValueError(f"is nested more than {_MOST_DEPTH} deep")
    return json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """Returns a suggestion such as ", did you mean 'taylor'?", or "" where no name is near."""
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def match_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a glob matches; a name that is written out matches only itself."""
    names = list(names)
    return [pattern] if pattern in names else fnmatch.filter(names, pattern)


def is_matched(name: str, patterns: Iterable[str]) -> bool:
    """Checks whether a name equals one of the patterns or matches it as a glob."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def nearest_glob(pattern: str, names: Iterable[str]) -> str:
    """Returns a suggestion like `nearest_name`: the glob with its brackets escaped, or a name so.

    The first where that matches a name; the second is a glob of exactly the nearest name.
    """
    names = list(names)
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5)
    escaped = pattern.replace("[", "[[]")
    if match_names(escaped, names):
        suggested = escaped
    elif near:
        suggested = glob.escape(near[0])
    else:
        return ""
    note = " ([[] stands for a bracket in a name)" if "[[]" in suggested else ""
    return f", did you mean '{suggested}'{note}?"


def dotted(path: Iterable[int | str]) -> str:
    """Joins a path as in TOML, with quotes around parts that are not bare keys."""
    return ".".join(
        str(part) if re.fullmatch(r"[\w-]+", str(part)) else json.dumps(part) for part in path
    )


def explain_faults(error: ValidationError, whole: type[Section]) -> list[str]:
    """Describes the faults of a job of the class `whole`, each once."""
    faults = error.errors(include_url=False)
    texts = [_explain_fault(dict(fault), whole) for fault in faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        texts.append(f"and {len(faults) - _MOST_FAULTS:,} more faults")
    # The branches of a union each find their own fault in one value.
    return list(dict.fromkeys(texts))


def _explain_fault(fault: dict[str, Any], whole: type[Section]) -> str:
    where = dotted(fault["loc"])
    given, kind, context = fault["input"], fault["type"], fault.get("ctx", {})
    for depth in range(1, len(fault["loc"])):
        field = find_field(fault["loc"][:depth], whole)
        if field and (marks := _marks(field, Worded)):
            return f"{dotted(fault['loc'][:depth])}: {marks[0].fault}"
    if kind == "extra_forbidden":
        section = _section_at(fault["loc"][:-1], whole)
        assert section is not None
        names = list(section.model_fields)
        return (
            f"{where}: no such key{nearest_name(str(fault['loc'][-1]), names)} "
            f"(allowed: {', '.join(names)})"
        )
    if kind == "missing":
        return f"{where}: is required"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        near = nearest_name(given, allowed) if isinstance(given, str) else ""
        return f"{where} = {_show(given)}: not allowed{near} (allowed: {', '.join(allowed)})"
    if kind == "value_error":
        messages = [str(message) for message in context["error"].args]
        if _section_at(fault["loc"], whole) is not None:
            return "; ".join(f"{where}.{message}" if where else message for message in messages)
        return f"{where} = {_show(given)}: {'; '.join(messages)}"
    reason = fault["msg"].removeprefix("Input ")
    return f"{where} = {_show(given)}: {reason}"


def _show(value: Any) -> str:
    """Formats a value, shortened where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an endless number, or a deep list
        return f"a {type(value).__name__} too large to show"
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[: _MOST_SHOWN - 20]}[... {len(text) - _MOST_SHOWN + 20:,} more]"


def section_of(field: FieldInfo | None) -> type[Section] | None:
    """Returns the class of the section in a field; None where it holds a value."""
    inner = field.annotation if field else None
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def _section_at(path: tuple[int | str, ...], whole: type[Section]) -> type[Section] | None:
    return section_of(find_field(path, whole)) if path else whole


def find_field(path: Iterable[int | str], whole: type[Section]) -> FieldInfo | None:
    """Finds the field at a path; None where there is none, as inside a table of options."""
    section: type[Section] | None = whole
    field: FieldInfo | None = None
    for part in path:
        field = section.model_fields.get(str(part)) if section else None
        section = section_of(field)
    return field


def find_idle_options(job: Section) -> list[tuple[str, str]]:
    """Lists options that are set and have no effect, as (dotted key, reason).

    Values equal to the default are left out, because the job of a record has all fields set.
    """
    return list(_find_idle(job, job, ""))


def _find_idle(job: Section, section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    fields = type(section).model_fields
    switched_off = [
        f"{prefix}{name} = {mark.off}"
        for name, field in fields.items()
        for mark in _marks(field, Switch)
        if getattr(section, name) == mark.off
    ]
    for name, field in fields.items():
        value = getattr(section, name)
        if name not in section.model_fields_set or value == field.default:
            continue
        reasons = switched_off + [
            mark.reason if mark.of_job else prefix + mark.reason.format_map(dict(section))
            for mark in _marks(field, Idle)
            if mark.when(job if mark.of_job else section)
        ]
        if reasons:
            yield f"{prefix}{name}", reasons[0]
        elif isinstance(value, Section):
            yield from _find_idle(job, value, f"{prefix}{name}.")


def _marks(field: FieldInfo, kind: type[Mark]) -> list[Mark]:
    return [mark for mark in field.metadata if isinstance(mark, kind)]
