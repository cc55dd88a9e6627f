"""Options of built-in workloads: each refusal in one line, worded alike, and extras imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import WorkloadError

__all__ = ["check_choice", "check_count", "check_flag", "import_extra"]


def check_flag(option: str, value: object) -> None:
    """Raises WorkloadError for an option that is neither true nor false."""
    if not isinstance(value, bool):
        raise WorkloadError(f"workload.options.{option} = {value!r}: must be true or false")


def check_count(
    option: str, value: object, advice: str, *, least: int = 1, most: int | None = None
) -> None:
    """Raises WorkloadError for an option that is no whole number from `least` to `most`.

    Args:
        advice: Ends the message, such as "the default is 32".
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        bounds = f", at least {least}" if most is None else f" from {least} to {most}"
        raise WorkloadError(
            f"workload.options.{option} = {value!r}: must be a whole number{bounds}; {advice}"
        )


def check_choice(option: str, value: object, allowed: Sequence[str]) -> None:
    """Raises WorkloadError for an option that is none of the names allowed."""
    if value not in allowed:
        raise WorkloadError(
            f"workload.options.{option} = {value!r}: there is none such"
            f"{nearest_name(str(value), allowed)} (allowed: {', '.join(allowed)})"
        )


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports a library of an extra; raises WorkloadError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise WorkloadError(
            f"workload.factory: needs {module}, which cannot be imported ({error}); "
            f"pip install 'gbp-ray[{extra}]'"
        ) from error
