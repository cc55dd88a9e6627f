"""What the sections of a job have in common: how they are declared, how faults are worded.

All faults of a job go into one line, with dotted paths and the nearest valid name.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

__all__ = [
    "MOST_EXAMPLES",
    "PLUG_IN",
    "Fraction",
    "Section",
    "dotted",
    "explain_faults",
    "is_matched",
    "match_names",
    "nearest_glob",
    "nearest_name",
    "plain",
]

PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""How code is named: "module:attr"."""

MOST_EXAMPLES = 10**9
"""More examples than any data set has."""

_MOST_DEPTH = 100  # of lists and tables in a value
_MOST_FAULTS = 50
_MOST_SHOWN = 300  # characters of a value
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole."""

_LAYER_BOUNDS = ("layer_min_sparsity", "layer_max_sparsity")


class Section(BaseModel):
    """A part of a job: frozen, without unknown keys, each field described by the text below it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Returns itself, as what is frozen may; pydantic copies defaults for every job."""
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
        # A trial would be called otherwise with -0.0.
        return 0.0 if isinstance(value, float) and value == 0 else value


def plain(value: Any) -> Any:
    """Makes of a value what JSON makes of it, as which it travels to workers and into records.

    Raises:
        TypeError: It is none of JSON's.
        ValueError: A number is not finite, text is none that can be written, or it is nested too
            deeply.
        RecursionError: It is nested far too deeply.
    """
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner = [item for item in level if isinstance(item, dict | list | tuple)]
        level = [x for item in inner for x in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise ValueError(f"is nested more than {_MOST_DEPTH} deep")
    return json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())


def nearest_name(name: str, allowed: tuple[str, ...] | list[str]) -> str:
    """Words a suggestion: ", did you mean 'taylor'?", or nothing where none is near."""
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def match_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Finds the names that a glob matches; a name that is written out matches itself only."""
    names = list(names)
    return [pattern] if pattern in names else fnmatch.filter(names, pattern)


def is_matched(name: str, patterns: Iterable[str]) -> bool:
    """Tells whether a name is one of some, or matches one of them as a glob."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def nearest_glob(pattern: str, names: Iterable[str]) -> str:
    """Words a suggestion as `nearest_name`, written so that it is a glob of that very name."""
    near = difflib.get_close_matches(pattern, list(names), n=1, cutoff=0.5)
    if not near:
        return ""
    glob_of_it = glob.escape(near[0])
    note = "" if glob_of_it == near[0] else " ([[] stands for a bracket in a name)"
    return f", did you mean '{glob_of_it}'{note}?"


def dotted(path: Iterable[int | str]) -> str:
    """Joins a path as TOML writes it: what is no bare key gets quotes."""
    return ".".join(
        str(part) if re.fullmatch(r"[\w-]+", str(part)) else json.dumps(part) for part in path
    )


def explain_faults(error: ValidationError, whole: type[BaseModel]) -> list[str]:
    """Words what is wrong with a job, each fault once.

    Args:
        whole: What was being validated.
    """
    faults = error.errors(include_url=False)
    texts = [_explain_fault(dict(fault), whole) for fault in faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        texts.append(f"and {len(faults) - _MOST_FAULTS:,} more faults")
    # The branches of a union each find their own fault in one value.
    return list(dict.fromkeys(texts))


def _explain_fault(fault: dict[str, Any], whole: type[BaseModel]) -> str:
    where = dotted(fault["loc"])
    given, kind, context = fault["input"], fault["type"], fault.get("ctx", {})
    if (bound := next((n for n in fault["loc"] if n in _LAYER_BOUNDS), None)) and (
        fault["loc"][-1] != bound
    ):
        where = f"prune.{bound}"
        return f"{where}: must be a number, or a table of name globs with a number each"
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
    """Writes a value, not all of a long one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an endless number, or a deep list
        return f"a {type(value).__name__} too large to show"
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[: _MOST_SHOWN - 20]}[... {len(text) - _MOST_SHOWN + 20:,} more]"


def _section_at(path: tuple[int | str, ...], whole: type[BaseModel]) -> type[BaseModel] | None:
    """Finds the section that a path leads to, or None where it leads to a value."""
    section = whole
    for part in path:
        field = section.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        section = inner
    return section
