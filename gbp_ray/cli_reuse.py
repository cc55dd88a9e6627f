"""`gbp-ray apply`, `export` and `explain`: what is done with a pruned network afterwards."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Annotated

import typer

from gbp_ray.terminal import AsJson, print_json, say, show_warning

__all__ = ["add_reuse_verbs"]

Round = Annotated[
    str,
    typer.Argument(
        help="A round's folder, or a trial's: that gives the round which the trial is for.",
        metavar="URI",
    ),
]


def add_reuse_verbs(app: typer.Typer) -> None:
    """Puts the verbs on the command line."""
    app.command("apply")(apply_to_checkpoint)
    app.command("export")(export_network)


def apply_to_checkpoint(
    masks: Annotated[
        str, typer.Argument(help="A mask file, or a round's or a trial's folder.", metavar="MASKS")
    ],
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Weights: .safetensors, .pt, .pth, .th, or a round or a trial.",
            metavar="CHECKPOINT",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Receives them, as safetensors; CHECKPOINT-masked."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put the masks of one network on other weights of the same shapes.

    Every parameter that has a mask must be there with the same shape;
    everything else is copied as it is. To train on under masks, start a job
    from them: prune.initial_masks.

    Examples:

      gbp-ray apply gbp-results/digits other.safetensors --to sparse.safetensors

      gbp-ray prune job.toml --set prune.initial_masks=gbp-results/digits
    """
    # torch takes seconds to import; --help and a mistyped option should not.
    from gbp_ray.reuse import apply_masks

    applied = apply_masks(masks, checkpoint, to)
    if as_json:
        print_json({**asdict(applied), "sparsity": applied.sparsity})
        return
    say(
        f"{applied.file}: {applied.num_pruned:,} of {applied.num_units:,} masked weights are zero "
        f"({applied.sparsity:.2%}), {applied.num_changed:,} of them were not before"
    )


def export_network(
    uri: Round,
    folder: Annotated[str, typer.Argument(help="Folder that receives it.", metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """Write a pruned network for plain PyTorch, with a model card.

    As a program (model.pt2) that loads without this package and without the
    network's class, and as a state dict (model.safetensors). Both are loaded
    again and compared with the pruned network before anything is written.

    Examples:

      gbp-ray export gbp-results/digits my-network

      python -c "import torch; torch.export.load('my-network/model.pt2').module()"
    """
    # torch takes seconds to import; --help and a mistyped option should not.
    from gbp_ray.export import export_round

    with warnings.catch_warnings():
        warnings.showwarning = show_warning  # type: ignore[assignment]
        export = export_round(uri, folder)
        if export.program_fault:
            warnings.warn(f"no model.pt2: {export.program_fault}", stacklevel=1)
    if as_json:
        print_json(asdict(export))
        return
    same = "to the bit" if export.difference == 0 else f"to within {export.difference:.1e}"
    say(
        f"{export.folder}: round {export.round} of {export.trial_id}, outputs as the pruned "
        f"network's {same}"
    )
    for name, num_bytes in export.files.items():
        say(f"  {name}  {num_bytes:,} bytes")
