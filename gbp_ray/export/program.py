"""The deliverable: a pruned network that loads in plain PyTorch, checked before it is written.

    model.safetensors    the state dict, for the network's own class; see `weights`
    widths.json, load.py where whole channels or heads were removed, model.safetensors holds the
                         smaller network, and these make it of the class; see `compacted`
    model.pt2            the network as a program (torch.export), for those without the class; with
                         BatchNorm folded into the layers before it, if that is asked for; `traced`
    model.onnx           the same program for ONNX Runtime, if it is asked for; see `onnx`
    config.json and others beside model.safetensors, for transformers, if that is asked for; `hub`
    model.csr.safetensors, load_csr.py
                         the state dict with sparse linear layers as CSR, and what loads it, if it
                         is asked for and some are faster so; see `csr`
    masks.safetensors    which weights stay zero
    example.safetensors  prepared inputs with the outputs that belong to them
    measurements.json    speed and size beside the dense network's, if asked for; see `latency`
    README.md            the model card

Everything is made and compared in memory; a folder is written whole or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save as save_tensors
from torch import nn

from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import ConfigError, name_some
from gbp_ray.export.card import ExportFacts, write_card
from gbp_ray.export.compacted import COMPACT_FILES, check_loader
from gbp_ray.export.csr import CSR_FILES, CsrFile, make_csr
from gbp_ray.export.fold import fold_batchnorm
from gbp_ray.export.hub import HUB_FILES, HubFiles, check_hub, make_hub_files
from gbp_ray.export.latency import Deliverable, measure_networks
from gbp_ray.export.onnx import OnnxFile, check_onnx, make_onnx, missing_onnx
from gbp_ray.export.rebuilt import StoredRound, open_round
from gbp_ray.export.traced import Program, make_program
from gbp_ray.export.weights import (
    beside_tensors,
    check_state,
    complete_state,
    leave_out,
    shared_names,
)
from gbp_ray.results.folder import check_target, write_target
from gbp_ray.results.measurements import CSR, DENSE, PRUNED, MeasurementsRecord
from gbp_ray.results.records import RoundRecord
from gbp_ray.training.latency import BATCH_SIZES, check_threads
from gbp_ray.workloads.call import Call
from gbp_ray.workloads.contract import judged_split, num_examples

__all__ = [
    "FORMATS",
    "Export",
    "export_round",
]

FORMATS = ("program", "onnx", "csr", "hf")
"""What `to` may name: the program, which is always made, an ONNX file, CSR layers beside it, and
what makes it a folder of transformers'."""

_FILES = (
    "model.safetensors",
    "model.pt2",
    "model.onnx",
    *COMPACT_FILES,
    *CSR_FILES,
    *HUB_FILES,
    "masks.safetensors",
    "example.safetensors",
    "measurements.json",
    "README.md",
)
_NUM_EXAMPLES = 8

_FOLDED = "In {files} each BatchNorm is folded into the layer before it; no zero was lost."
_UNCALLED = (
    "The compared examples did not go through {paths}: of these cut layers nothing is proven."
)
_ONE_LENGTH = (
    "{files}: sequences of the length in `example.safetensors` only, since torch.export "
    "fixes that of recurrent layers."
)


@dataclass(frozen=True)
class Export:
    """The result of `export_round`.

    Attributes:
        folder: Where.
        files: Name to size in bytes.
        trial_id: Of the trial.
        round: Of it.
        difference: Greatest difference of the program's outputs from the pruned network's.
        program_fault: The reason for a missing program, or "".
        onnx_difference: Likewise of the ONNX file's outputs in ONNX Runtime; None without one.
        onnx_fault: The reason for a missing ONNX file that was asked for, or "".
        csr_ratios: Of layers that are CSR: by name and batch size, how many times as long they
            take dense.
        csr_fault: The reason for missing CSR layers that were asked for, or "".
        hub_difference: Likewise of the folder loaded by transformers; None where it cannot be.
        hub_fault: The reason why it cannot be though that was asked for, or "".
        measurements: What was measured, if that was asked for.
        is_compact: The files hold a network without its removed units.
        compact_fault: The reason why units that a job keeps as zeros are zeros here, too, or "".
    """

    folder: str
    files: dict[str, int]
    trial_id: str
    round: int
    difference: float
    program_fault: str
    onnx_difference: float | None = None
    onnx_fault: str = ""
    csr_ratios: dict[str, dict[int, float]] = field(default_factory=dict)
    csr_fault: str = ""
    hub_difference: float | None = None
    hub_fault: str = ""
    measurements: MeasurementsRecord | None = None
    is_compact: bool = False
    compact_fault: str = ""


def export_round(
    uri: str | Path,
    folder: str | Path,
    *,
    to: Sequence[str] = ("program",),
    is_folded: bool = False,
    is_measured: bool = False,
    threads: int = 1,
    code: str | Path = "",
    trust_code: Sequence[str] = (),
) -> Export:
    """Writes a round of a finished trial as files that need nothing of this package.

    Args:
        uri: A round's folder, or a trial's: that gives the round which the trial is for.
        folder: Receives the files; new, empty, or holding an earlier export.
        to: Formats, see `FORMATS`.
        is_folded: Folds every BatchNorm of the program into the layer before it, and of the ONNX
            file. The state dict stays that of the network's own class.
        is_measured: Times this and the dense network, and writes measurements.json; takes seconds.
        threads: Of the engines and layers that are timed.
        code: A folder of the job's own modules, searched in addition to the working folder.
        trust_code: Code that may run though only the record names it; see `admit_code`.

    Raises:
        ConfigError: A format is unknown or needs what is not installed, or the record names code
            that is neither built in nor trusted.
        ExportError: What was made does not compute what the pruned network does, or its units
            cannot be removed.
        PruneError: A BatchNorm cannot be folded.
        StoreError: The round cannot be read, its trial has not finished, or the folder cannot be
            written.
    """
    _check_formats(to)
    if is_measured or "csr" in to:
        check_threads(threads, "--threads")
    target = check_target(folder, "DIR", "export", lambda target: set(_FILES))
    source = open_round(uri, code=code, trust_code=trust_code)
    trial, record, workload = source.trial, source.record, source.workload
    weights, packed = source.read("weights.safetensors"), source.read("masks.safetensors")
    masked, masks = source.rebuild_masked(weights, packed)
    compact, compact_fault = source.compact(masked, masks)
    model = masked if compact is None else compact.model
    call = Call.of(model, workload, _NUM_EXAMPLES)
    outputs = call.run(model)
    if "hf" in to:
        check_hub(model)
    whole = state = complete_state(model, weights) if compact is None else compact.state()
    hub: HubFiles | None = None
    tied: frozenset[str] = frozenset()
    if "hf" in to:
        shapes = {} if compact is None else compact.widths["shapes"]
        hub = make_hub_files(model, masked, shapes, whole, call)
        state, tied = hub.files.get("model.safetensors", whole), hub.tied
    loader_difference = None
    if compact is None:
        check_state(trial.job, state, call, outputs, is_whole=not tied)
    else:
        loader_difference = check_loader(trial.job, compact, state, call, masked)
    # What is measured has an ONNX file where it can have one, whether or not it is written.
    with_onnx = "onnx" in to or (is_measured and not missing_onnx())
    made = _make(model, masked, call, is_folded=is_folded, with_onnx=with_onnx)
    given = call.tensors()
    example = {**given, "outputs": outputs}
    files = {
        "model.safetensors": state,
        "masks.safetensors": packed,
        "example.safetensors": save_tensors({n: t.contiguous() for n, t in example.items()}),
    }
    own = made.files_of("onnx" in to)
    files |= own
    csr = CsrFile()
    if compact is not None:
        files |= compact.files()
    if "csr" in to and compact is not None:
        csr = CsrFile(fault="whole units were removed, and what is left is dense")
    elif "csr" in to:
        csr = make_csr(trial.job, model, whole, call, threads=threads)
        files |= csr.files()
    if hub is not None:
        files |= hub.files
    measurements = None
    if is_measured:
        data = source.read("weights.safetensors", trial.dense)
        dense = source.rebuild(data)
        beside = _make(dense, dense, call, is_folded=is_folded, with_onnx=with_onnx)
        macs = None if compact is None else _count_macs(source, model)
        sides = {
            DENSE: beside.deliver(leave_out(complete_state(dense, data), tied), trial.dense),
            PRUNED: made.deliver(state, record, macs),
        }
        if csr.model is not None:
            sides[CSR] = _deliver_csr(csr, csr.model, record)
        sample = Call.of(model, workload, max(BATCH_SIZES))
        measurements = measure_networks(sides, sample, threads=threads)
        files["measurements.json"] = measurements.model_dump_json(indent=1).encode() + b"\n"
    uncalled = compact.uncalled if compact is not None else ()
    program, onnx = made.program, made.onnx if "onnx" in to else None
    listed = " and ".join(f"`{file}`" for file in own)
    one_length = {
        "model.pt2": program.has_one_length,
        "model.onnx": onnx is not None and onnx.has_one_length,
    }
    fixed = " and ".join(f"`{file}`" for file, is_fixed in one_length.items() if is_fixed)
    facts = ExportFacts(
        class_name=type(model).__name__,
        inputs={name: (str(t.dtype), tuple(t.shape[1:])) for name, t in given.items()},
        arguments=call.in_code(),
        output_shape=tuple(outputs.shape[1:]),
        num_test=num_examples(workload.test),
        num_judged=num_examples(getattr(workload, judged_split(workload))),
        program_fault=program.fault,
        difference=program.difference,
        has_tied_weights=compact is None and bool(shared_names(model) - tied),
        stored_once=tuple(sorted(tied)),
        loader_difference=loader_difference,
        compact_fault=compact_fault,
        notes=(
            *((_FOLDED.format(files=listed),) if is_folded and own else ()),
            *((_ONE_LENGTH.format(files=fixed),) if fixed else ()),
            *((_UNCALLED.format(paths=name_some(uncalled)),) if uncalled else ()),
            *(
                f"`{name}` is no tensor and not in `model.safetensors`; load with `strict=False`."
                for name in (beside_tensors(model) if compact is None else ())
            ),
        ),
        onnx_difference=onnx.difference if onnx and onnx.data else None,
        onnx_fault=onnx.fault if onnx else "",
        onnx_inputs=tuple(call.leaves()),
        csr_ratios=csr.ratios,
        csr_fault=csr.fault,
        hub_class=hub.class_name if hub else "",
        hub_difference=hub.difference if hub and hub.files else None,
        hub_fault=hub.fault if hub else "",
        no_tokenizer=hub.missing if hub else "",
        base_model=hub.base_model if hub else "",
        license=hub.license if hub else "",
        measurements=measurements,
    )
    files["README.md"] = write_card(trial, trial.rounds[record.round], facts).encode()
    write_target(target, files, "DIR", stale=_FILES)
    return Export(
        folder=str(target),
        files={name: len(data) for name, data in files.items()},
        trial_id=trial.trial_id,
        round=record.round,
        is_compact=compact is not None,
        compact_fault=compact_fault,
        difference=program.difference,
        program_fault=program.fault,
        onnx_difference=facts.onnx_difference,
        onnx_fault=facts.onnx_fault,
        csr_ratios=csr.ratios,
        csr_fault=csr.fault,
        hub_difference=facts.hub_difference,
        hub_fault=facts.hub_fault,
        measurements=measurements,
    )


def _count_macs(source: StoredRound, model: nn.Module) -> int:
    """Counts the multiply-adds of a compacted network, and warns where its record has others."""
    counted, units = source.count_macs(model), source.record.cost.units
    if counted and units is not None and counted != units.macs:
        warnings.warn(
            f"multiply-adds: {counted:,} were counted in the exported network, and {units.macs:,} "
            "are on record; measurements.json has the former",
            stacklevel=2,
        )
    return counted


def _deliver_csr(csr: CsrFile, model: nn.Module, record: RoundRecord) -> Deliverable:
    layers = {layer.name.removesuffix(".weight"): layer for layer in record.cost.layers}
    chosen = [layers[name] for name in csr.ratios if name in layers]
    saved = sum(layer.macs - layer.macs_nonzero for layer in chosen)
    return Deliverable(model, record, {CSR_FILES[0]: len(csr.data)}, macs_saved=saved)


def _check_formats(to: Sequence[str]) -> None:
    for name in to:
        if name not in FORMATS:
            raise ConfigError(
                f"--to = '{name}': there is no such format{nearest_name(name, FORMATS)} "
                f"(allowed: {', '.join(FORMATS)})"
            )
    if "onnx" in to:
        check_onnx("--to = 'onnx'")


@dataclass(frozen=True)
class _Made:
    """A network and the files made of it."""

    lean: nn.Module
    program: Program
    onnx: OnnxFile | None

    def files_of(self, with_onnx: bool) -> dict[str, bytes]:
        found = {"model.pt2": self.program.data}
        if with_onnx and self.onnx is not None:
            found["model.onnx"] = self.onnx.data
        return {name: data for name, data in found.items() if data}

    def deliver(self, state: bytes, record: RoundRecord, macs: int | None = None) -> Deliverable:
        """Lists it for measuring, with the size of its weights."""
        files = {"model.safetensors": state, **self.files_of(True)}
        sizes = {name: len(data) for name, data in files.items()}
        return Deliverable(self.lean, record, sizes, self.onnx, macs=macs)


def _make(
    model: nn.Module, masked: nn.Module, call: Call, *, is_folded: bool, with_onnx: bool
) -> _Made:
    """Makes the program of a network, and its ONNX file.

    Args:
        masked: What both are compared with: the network itself, or what it was compacted from.
    """
    lean = fold_batchnorm(model, call.run) if is_folded else model
    program = make_program(lean, masked, call)
    onnx = None
    if with_onnx:
        onnx = OnnxFile(b"", fault=program.fault)
        if program.traced is not None:
            onnx = make_onnx(program.traced, masked, call)
    return _Made(lean, program, onnx)
