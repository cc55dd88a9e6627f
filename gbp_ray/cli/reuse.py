"""`gbp-ray apply`, `export` and `explain`: what is done with a pruned network afterwards."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from typing import Annotated

import typer

from gbp_ray.cli.measured import print_measurements
from gbp_ray.cli.tables import make_table
from gbp_ray.cli.terminal import (
    AsJson,
    IsQuiet,
    console,
    print_json,
    progress_printer,
    say,
    warnings_in_lines,
)
from gbp_ray.errors import ConfigError

__all__ = [
    "add_reuse_verbs",
]

Round = Annotated[
    str,
    typer.Argument(
        help="A round's folder, or a trial's: that gives the round which the trial is for.",
        metavar="URI",
    ),
]

Code = Annotated[
    str,
    typer.Option(
        "--folder",
        metavar="DIR",
        help="Where the job's own modules lie, if not in the working folder.",
    ),
]

Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code",
        metavar="NAME",
        help="Code that the record names and that may run: MODULE:ATTR, MODULE, or the job file "
        "that names it; repeatable. What is built in needs none.",
    ),
]


def add_reuse_verbs(app: typer.Typer) -> None:
    """Puts the verbs on the command line."""
    app.command("apply")(apply_to_checkpoint)
    app.command("export")(export_network)
    app.command("explain")(explain_network)


def apply_to_checkpoint(
    masks: Annotated[
        str, typer.Argument(help="A mask file, or a round's or a trial's folder.", metavar="MASKS")
    ],
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Weights: .safetensors, .pt, .pth, .ckpt, ..., or a round or a trial.",
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
    from gbp_ray.export.apply import apply_masks

    applied = apply_masks(masks, checkpoint, to)
    if as_json:
        print_json({**asdict(applied), "sparsity": applied.sparsity})
        return
    say(
        f"{applied.file}: {applied.num_pruned:,} of {applied.num_units:,} masked weights are zero "
        f"({applied.sparsity:.2%}), {applied.num_changed:,} of them were not before"
    )


def explain_network(
    uri: Round,
    code: Code = "",
    trusted: Trusted = None,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Find out what a pruned network does differently from the dense one.

    Accuracy by class, the answers that changed, the parts of an input that
    the right answer is sensitive to, saliency by layer before and after. The
    findings are kept with the trial; gbp-ray report draws them.

    Examples:

      gbp-ray explain gbp-results/digits

      gbp-ray report gbp-results/digits --to my-report
    """
    # torch takes seconds to import; --help and a mistyped option should not.
    from gbp_ray.runtime.explain import explain_round

    with warnings_in_lines():
        explained = explain_round(
            uri, code=code, trust_code=trusted or (), on_progress=progress_printer(is_quiet)
        )
    found = explained.findings
    if as_json:
        print_json({"uri": explained.uri, **found.to_dict()})
        return
    if found.classes:
        rows = []
        for item in found.classes:
            dense = item.num_right_dense / item.num_examples
            pruned = item.num_right_pruned / item.num_examples
            shares = f"{dense:.2%}", f"{pruned:.2%}", f"{100 * (pruned - dense):+.2f}"
            rows.append((str(item.label), f"{item.num_examples:,}", *shares))
        headings = ("class", "examples", "dense", "pruned", "points")
        console().print(make_table(rows, (), headings))
        say(
            f"{found.num_changed:,} of {found.num_examples:,} answers changed: {found.num_hurt:,} "
            f"from right to wrong, {found.num_helped:,} from wrong to right"
        )
    if found.agreement:
        words = ", ".join(f"{name} answers {value:.2f}" for name, value in found.agreement.items())
        say(f"cosine of the input gradients: {words}")
    for text in found.left_out:
        say(f"left out: {text}")
    say(f"kept in {explained.uri}; gbp-ray report {explained.trial_uri} shows it")


def export_network(
    uri: Round,
    folder: Annotated[str, typer.Argument(help="Folder that receives it.", metavar="DIR")],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="onnx: adds model.onnx, for ONNX Runtime; csr: adds linear layers as compressed "
            "sparse rows, where they are faster so; hf: adds what from_pretrained of transformers "
            "reads; program: what is always written; repeatable.",
        ),
    ] = None,
    is_folded: Annotated[
        bool,
        typer.Option(
            "--fold-batchnorm", help="Fold BatchNorm into the layers, in model.pt2 and model.onnx."
        ),
    ] = False,
    is_measured: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time this and the dense network on this machine, and compare their sizes; takes "
            "seconds, of a large network minutes.",
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads of what is timed; 1.")
    ] = None,
    code: Code = "",
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Write a pruned network for plain PyTorch, with a model card.

    As a program (model.pt2) that loads without this package and without the
    network's class, and as a state dict (model.safetensors). Both are loaded
    again and compared with the pruned network before anything is written.

    --to onnx adds model.onnx, which is opened in ONNX Runtime and compared
    as well; it needs this package's extra "onnx". Weights that were pruned
    one by one are stored as zeros: they make no file smaller and no pass
    faster by themselves. Whole channels and heads that were removed leave the
    network; load.py, beside it, cuts the network's class to what is left, by
    widths.json. --to csr leaves zeros out of linear layers that are 90 % sparse
    and that are faster so on this machine, which is measured.

    --to hf adds config.json and the tokenizer to a model of transformers, so
    that from_pretrained loads the folder; of whole units all layers must have
    kept as many, as with prune.scope = "layer".

    --measure shows what a pass takes: median and range of dense and pruned in
    turn, for 1 and 32 examples, in PyTorch and, if it is installed, in ONNX
    Runtime.

    Examples:

      gbp-ray export gbp-results/digits my-network

      gbp-ray export gbp-results/digits my-network --to onnx --measure

      python -c "import torch; torch.export.load('my-network/model.pt2').module()"
    """
    if threads is not None and not is_measured and "csr" not in (to or ()):
        raise ConfigError(f"--threads = {threads}: is for --measure and --to csr; give one as well")
    # torch takes seconds to import; --help and a mistyped option should not.
    from gbp_ray.export.program import export_round

    with warnings_in_lines():
        export = export_round(
            uri,
            folder,
            to=to or ("program",),
            is_folded=is_folded,
            is_measured=is_measured,
            threads=1 if threads is None else threads,
            code=code,
            trust_code=trusted or (),
        )
        if export.compact_fault:
            warnings.warn(f"removed units are zeros: {export.compact_fault}", stacklevel=1)
        if export.program_fault:
            warnings.warn(f"no model.pt2: {export.program_fault}", stacklevel=1)
        if export.onnx_fault:
            warnings.warn(f"no model.onnx: {export.onnx_fault}", stacklevel=1)
        if export.csr_fault:
            warnings.warn(f"no model.csr.safetensors: {export.csr_fault}", stacklevel=1)
        if export.hub_fault:
            warnings.warn(f"no config.json: {export.hub_fault}", stacklevel=1)
    measured = export.measurements
    if as_json:
        print_json(
            asdict(replace(export, measurements=None))
            | {"measurements": measured.model_dump(mode="json") if measured else None}
        )
        return
    same = "to the bit" if export.difference == 0 else f"to within {export.difference:.1e}"
    if export.onnx_difference is not None:
        same += f", in ONNX Runtime to within {export.onnx_difference:.1e}"
    if export.hub_difference is not None:
        same += f", by from_pretrained to within {export.hub_difference:.1e}"
    say(
        f"{export.folder}: round {export.round} of {export.trial_id}, outputs as the pruned "
        f"network's {same}"
    )
    for name, num_bytes in export.files.items():
        say(f"  {name}  {num_bytes:,} bytes")
    for name, ratios in export.csr_ratios.items():
        listed = ", ".join(f"{ratio:.2f} (batch {size})" for size, ratio in ratios.items())
        say(f"{name} as CSR, measured, dense / CSR: {listed}")
    if measured is not None:
        print_measurements(measured)
