"""The rows of an index without what no two runs have alike: how long things took."""

from __future__ import annotations

from typing import Any

from gbp_ray.results.query import open_results

__all__ = ["untimed_rows"]


def untimed_rows(uri: str) -> list[dict[str, Any]]:
    """Lists the index, trial by trial and round by round, all but the seconds.

    An index holds no address. What is left includes every field of the job, every measurement, the
    digest of each mask and the SHA-256 of all weights.
    """
    table = open_results(uri).table
    columns = [
        name
        for name in table.column_names
        if name != "trial_seconds" and not name.startswith("seconds.")
    ]
    return [
        {name: value for name, value in row.items() if value is not None}
        for row in table.select(columns).to_pylist()
    ]
