"""`gbp-ray criteria` and `fields`: the criteria and the fields of a job."""

from __future__ import annotations

from typing import Annotated

import typer

from gbp_ray.cli.tables import make_table
from gbp_ray.cli.terminal import AsJson, console, print_json, say
from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.job import describe_fields
from gbp_ray.errors import ConfigError

__all__ = ["add_reference_verbs"]


def add_reference_verbs(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("criteria")(list_criteria)
    app.command("fields")(list_fields)


def list_criteria(as_json: AsJson = False) -> None:
    """List the criteria: what each computes, what it costs, where it comes from.

    Examples:

      gbp-ray criteria

      gbp-ray prune --set prune.criterion=fisher
    """
    fields = ("name", "formula", "summed", "cost", "is_signed", "gate", "source")
    rows = [{field: getattr(rule, field) for field in fields} for rule in CRITERIA.values()]
    if as_json:
        print_json({"criteria": rows})
        return
    for row in rows:
        row["score"] = row["formula"] + (", signed" if row["is_signed"] else "")
        row["score"] += f"; of a whole unit {row['gate']}" if row["gate"] else ""
    names = ("name", "score", "cost", "source")
    cells = ([str(row[name]) for name in names] for row in rows)
    console().print(make_table(cells, ("criterion", *names[1:])))
    say(
        "The lowest scores are removed first. Cost counts forward and backward passes over the",
        'calibration examples. Your own criterion: prune.criterion = "module:function".',
        "w weight, g gradient of the mean loss of a batch, g_i of one example, H Hessian,",
        "b batches of n_b examples, n in all, z random signs; d gradient in a whole unit's gate, a",
        "factor on all that reads it. A criterion without d sums the scores of the unit's weights;",
        "magnitude takes the L2 norm of them. Of a layer: x one of the r rows of its inputs (an",
        "example, a token, a patch), y = W x, e the gradient in y; w multiplies x_j, adds to y_i.",
    )


def list_fields(
    section: Annotated[
        str | None, typer.Argument(help="Only this section, such as prune.", metavar="SECTION")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a job file may say: every field, its default and its meaning.

    Examples:

      gbp-ray fields prune

      gbp-ray prune --set prune.scope=layer
    """
    fields = describe_fields()
    rows = [
        row
        for row in fields
        if section is None or row[0].startswith((f"{section}.", f"[{section}]"))
    ]
    if not rows:
        names = (row[0].strip("[]") for row in fields if row[0].startswith("["))
        sections = [name for name in names if "." not in name]
        raise ConfigError(
            f"SECTION = '{section}': no such section (allowed: {', '.join(sections)})"
        )
    if as_json:
        keys = ("field", "default", "description")
        print_json({"fields": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    console().print(make_table(rows, ("field", "default", "meaning")))
