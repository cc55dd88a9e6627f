"""The deliverable: a pruned network that loads in plain PyTorch, checked before it is written.

    model.safetensors    the state dict, for the network's own class
    model.pt2            the network as a program (torch.export), for those without the class; with
                         BatchNorm folded into the layers before it, if that is asked for
    masks.safetensors    which weights stay zero
    example.safetensors  prepared inputs with the outputs that belong to them
    README.md            the model card

Everything is made and compared in memory; a folder is written whole or not at all.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.agreement import check_data
from gbp_ray.errors import ExportError, in_one_line
from gbp_ray.export.card import ExportFacts, write_card
from gbp_ray.export.fold import fold_batchnorm
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results.folder import check_target, write_target
from gbp_ray.results.store import locate_finished
from gbp_ray.training.network import network_of_seed, rebuild_network
from gbp_ray.workloads.contract import judged_split, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.loading import admit_code, load_workload, warn_of_changed_code
from gbp_ray.workloads.weights import save_state, tensor_state

__all__ = [
    "Export",
    "export_round",
]

_FILES = ("model.safetensors", "model.pt2", "masks.safetensors", "example.safetensors", "README.md")
_NUM_EXAMPLES = 8
_TOLERANCE = 1e-5
"""Greatest difference of a program's outputs, against the greatest output."""

_FOLDED = "In `model.pt2` each BatchNorm is folded into the layer before it; no zero was lost."


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
    """

    folder: str
    files: dict[str, int]
    trial_id: str
    round: int
    difference: float
    program_fault: str


def export_round(
    uri: str | Path,
    folder: str | Path,
    *,
    is_folded: bool = False,
    code: str | Path = "",
    trust_code: Sequence[str] = (),
) -> Export:
    """Writes a round of a finished trial as files that need nothing of this package.

    Args:
        uri: A round's folder, or a trial's: that gives the round which the trial is for.
        folder: Receives the files; new, empty, or holding an earlier export.
        is_folded: Folds every BatchNorm of the program into the layer before it. The state dict
            stays that of the network's own class.
        code: A folder of the job's own modules, searched in addition to the working folder.
        trust_code: Code that may run though only the record names it; see `admit_code`.

    Raises:
        ConfigError: The record names code that is neither built in nor trusted.
        ExportError: What was made does not compute what the pruned network does.
        PruneError: A BatchNorm cannot be folded.
        StoreError: The round cannot be read, its trial has not finished, or the folder cannot be
            written.
    """
    target = check_target(folder, "DIR", "export", lambda target: set(_FILES))
    store, trial, record = locate_finished(uri)
    name = trial.trial_id
    admit_code(trial.job, store.trial_uri(name), trust_code, [code] if code else [])
    warn_of_changed_code(trial.sources, trial.trial_id, trial.job)
    workload = load_workload(trial.job.workload, trial.job.seed)
    known = trial.dense.fingerprints
    check_data(workload, known, store.trial_uri(name))
    weights = store.read_file(name, record, "weights.safetensors")
    packed = store.read_file(name, record, "masks.safetensors")
    masks = MaskSet.from_bytes(packed, "masks.safetensors")
    model = rebuild_network(workload, trial.job.seed, weights, "weights.safetensors", known)
    if (revived := masks.find_revived(model)) is not None:
        raise ExportError(f"'{revived}': has weights other than zero where its mask removes them")
    size = min(_NUM_EXAMPLES, num_examples(workload.test))
    inputs = take_batch(workload, workload.test, torch.arange(size)).inputs
    outputs = _outputs_of(model, inputs)
    state = _complete_state(model, weights)
    _check_state(trial.job, state, inputs, outputs)
    lean = fold_batchnorm(model, inputs) if is_folded else model
    program, difference, fault = _make_program(lean, model, inputs)
    files = {
        "model.safetensors": state,
        "masks.safetensors": packed,
        "example.safetensors": save_tensors(
            {"inputs": inputs.contiguous(), "outputs": outputs.contiguous()}
        ),
    }
    if program:
        files["model.pt2"] = program
    facts = ExportFacts(
        class_name=type(model).__name__,
        input_shape=tuple(inputs.shape[1:]),
        input_dtype=str(inputs.dtype),
        output_shape=tuple(outputs.shape[1:]),
        num_test=num_examples(workload.test),
        num_judged=num_examples(getattr(workload, judged_split(workload))),
        program_fault=fault,
        difference=difference,
        has_tied_weights=state != weights,
        notes=(
            *((_FOLDED,) if is_folded and program else ()),
            *(
                f"`{name}` is no tensor and not in `model.safetensors`; load with `strict=False`."
                for name in _beside_tensors(model)
            ),
        ),
    )
    files["README.md"] = write_card(trial, trial.rounds[record.round], facts).encode()
    write_target(target, files, "DIR", stale=_FILES)
    return Export(
        folder=str(target),
        files={name: len(data) for name, data in files.items()},
        trial_id=name,
        round=record.round,
        difference=difference,
        program_fault=fault,
    )


@torch.no_grad()
def _outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise ExportError(
            f"the network returns {type(outputs).__name__}, and only one that returns a tensor can "
            "be compared with what is exported"
        )
    return outputs


def _complete_state(model: nn.Module, weights: bytes) -> bytes:
    """Write a shared weight under each of its names, as the network's class loads it."""
    own = tensor_state(model)
    if set(own) == set(load_tensors(weights)):
        return weights
    return save_state(own)


def _beside_tensors(model: nn.Module) -> list[str]:
    tensors = tensor_state(model)
    return [name for name in model.state_dict() if name not in tensors]


def _check_state(job: JobConfig, state: bytes, inputs: Tensor, outputs: Tensor) -> None:
    """Check that a fresh network of the class with this state dict gives the same outputs."""
    # As the class makes it: whoever loads it knows nothing of layers that the job has tied.
    workload = load_workload(job.workload.model_copy(update={"tie": ()}), job.seed + 1)
    fresh, _ = network_of_seed(workload, job.seed + 1)
    try:
        fresh.load_state_dict(load_tensors(state), strict=not _beside_tensors(fresh))
    except RuntimeError as error:
        raise ExportError(
            f"a fresh network does not take the stored weights: {' '.join(str(error).split())}"
        ) from error
    if not torch.equal(_outputs_of(fresh.eval(), inputs), outputs):
        raise ExportError(
            "a fresh network with the stored weights gives other outputs: what it computes is not "
            "in its state dict alone, or is drawn at random"
        )


def _make_program(lean: nn.Module, model: nn.Module, inputs: Tensor) -> tuple[bytes, float, str]:
    """Export a network for any number of examples; return it, its error, and a fault or "".

    Args:
        lean: The network to export.
        model: The pruned network to compare with.

    Raises:
        ExportError: The program gives other outputs, for these examples or for a single one.
    """
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Two examples and more: a size of one would be taken for a constant.
            batch = torch.export.Dim("batch", min=1)
            traced = torch.export.export(lean, (inputs,), dynamic_shapes=({0: batch},))
            torch.export.save(traced, buffer)
            loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        return b"", 0.0, in_one_line(error)[:160]
    largest = difference = 0.0
    for count in (len(inputs), 1):
        with torch.no_grad():
            wanted, found = model(inputs[:count]), loaded(inputs[:count])
        if found.shape != wanted.shape:
            raise ExportError(
                f"model.pt2: gives outputs of shape {tuple(found.shape)} for {count} examples, "
                f"the pruned network {tuple(wanted.shape)}"
            )
        largest = max(largest, float(wanted.abs().max()))
        difference = max(difference, float((found - wanted).abs().max()))
    if not difference <= _TOLERANCE * largest:
        raise ExportError(
            f"model.pt2: its outputs differ by {difference:.3g} from those of the pruned network, "
            f"whose greatest is {largest:.3g}; nothing was written"
        )
    return buffer.getvalue(), difference, ""
