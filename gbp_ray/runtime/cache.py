"""A cache of dense networks and their scores, shared by the trials of a job.

The key is a hash of everything that decides the bits: the job's fields, the source of a user's
functions, and what selects the kernels (torch's version, the CPU's capability, threads per worker).
So a trial that hits the cache ends with the same bits as one that does not. If two trials need the
same entry at once, one computes it and the other waits. A damaged entry is computed again.

`movement` fine-tunes before the first prune, so its dense network is not shared. Scores are kept
only for criteria that pass over the data, and only for the dense network: after the first prune no
two trials have the same weights. Scores of whole units are not kept.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config.job import SCHEMA_VERSION, JobConfig, list_code, trial_id
from gbp_ray.errors import StoreError
from gbp_ray.pruning.criteria import Criterion
from gbp_ray.results.records import RoundRecord, SharedRecord, locate_files
from gbp_ray.results.store import Store
from gbp_ray.training.batchnorm import norm_batch_size
from gbp_ray.workloads.code import digest_source, import_attribute
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "SharedScores",
    "adopt_dense",
    "dense_folder",
    "dense_origin",
    "scores_key",
    "share_dense",
]

_SCORES = "scores.safetensors"


def dense_origin(job: JobConfig) -> dict[str, Any] | None:
    """Returns what decides the dense network of a job; None if it cannot be shared."""
    if job.prune.spec.needs_history:
        return None
    attack = job.attack.model_dump(mode="json", exclude_defaults=True)
    examples = job.prune.norm_examples
    return {
        # Round 0 is measured under the attack, too.
        **({"attack": attack} if job.attack.kind != "none" else {}),
        "workload": job.workload.model_dump(mode="json", exclude_defaults=True),
        "pretrain": job.pretrain.model_dump(mode="json", exclude_defaults=True),
        # Since then, layers that no pass reaches have no masks.
        "units": 2,
        # The masks and measurements of round 0 depend on it.
        "exclude": sorted(job.prune.exclude),
        **({"include": sorted(job.prune.include)} if job.prune.include else {}),
        # Masks and costs of round 0 are those of whole units.
        **(_fields_of_units(job) if job.prune.unit_kinds else {}),
        **({"batchnorm": [examples, norm_batch_size(job.prune)]} if examples else {}),
        **({"masks": pinned} if (pinned := job.prune.initial_masks_digest) else {}),
        **_surroundings(job, [job.workload.factory]),
    }


def dense_folder(job: JobConfig) -> str | None:
    """Returns the folder of a job's shared dense network, present or not; None if not shared."""
    origin = dense_origin(job)
    return None if origin is None else _folder("dense", origin)


def scores_key(job: JobConfig, dense: str) -> str | None:
    """Returns a key of the shared scores of a dense network; None if none are kept."""
    if not job.prune.spec.needs_data or job.prune.unit_kinds:
        return None
    fields = _fields_of_scores(job)
    return f"{dense} {job.prune.model_dump_json(include=fields, exclude_defaults=True)}"


def adopt_dense(store: Store, job: JobConfig) -> RoundRecord | None:
    """Copies the shared dense network into this trial's round 0; None if there is none."""
    origin = dense_origin(job)
    folder = "" if origin is None else _folder("dense", origin)
    found = _read(store, folder) if folder else None
    if found is None or found[0].round is None:
        return None
    record, files = found
    assert record.round is not None
    # The time is on record in the trial that trained it.
    own = record.round.model_copy(update={"seconds": {}})
    return store.write_round(trial_id(job), own, files, locate_files(folder, record.files))


@contextmanager
def share_dense(store: Store, job: JobConfig) -> Iterator[Callable[[RoundRecord], None]]:
    """Holds the lease of this job's dense network while the block trains it.

    Yields:
        A function that shares it, given the record of this trial's round 0.
    """
    origin = dense_origin(job)
    assert origin is not None
    folder = _folder("dense", origin)

    def share(record: RoundRecord) -> None:
        name = trial_id(job)
        files = {file: store.read_file(name, record, file) for file in record.files}
        twins = locate_files(f"trials/{name}/round_{record.round:03d}", record.files)
        store.write_shared(folder, files, origin, record, twins)

    with store.await_lease(folder):
        yield share


class SharedScores:
    """Scores of dense networks in a job's store: a `ScoreCache` for `run_rounds`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(
        self, job: JobConfig, model: nn.Module, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """Reads the scores, or computes and stores them; None if they are not shared."""
        origin = _scores_origin(job, model)
        if origin is None:
            return None
        folder = _folder("scores", origin)
        if (scores := self._find(folder)) is None:
            with self._store.await_lease(folder):
                if (scores := self._find(folder)) is None:
                    scores = {name: values.contiguous() for name, values in compute().items()}
                    self._store.write_shared(folder, {_SCORES: save_tensors(scores)}, origin)
        return scores

    def _find(self, folder: str) -> dict[str, Tensor] | None:
        found = _read(self._store, folder)
        return None if found is None else load_tensors(found[1][_SCORES])


def _scores_origin(job: JobConfig, model: nn.Module) -> dict[str, Any] | None:
    prune = job.prune
    if not prune.spec.needs_data or prune.unit_kinds:
        return None
    fields = _fields_of_scores(job)
    return {
        "weights": _digest_state(model),
        "workload": job.workload.model_dump(mode="json", include={"factory", "options"})
        | job.workload.model_dump(
            # These change the data or the passes, but not the weights.
            mode="json",
            include={"tie", "validation", "encoding", "channels_last"},
            exclude_defaults=True,
        ),
        "prune": prune.model_dump(mode="json", include=fields, exclude_defaults=True),
        **_surroundings(job, list_code(job).values()),
    }


def _fields_of_scores(job: JobConfig) -> set[str]:
    """Lists the fields of [prune] that decide the scores of given weights."""
    prune = job.prune
    if ":" in prune.criterion and isinstance(
        import_attribute(prune.criterion, "prune.criterion"), Criterion
    ):
        # A criterion receives the whole section, a plain function nothing of it.
        return set(type(prune).model_fields)
    return {
        "criterion",
        "calibration_examples",
        "calibration_batch_size",
        "calibration_augment",
        "calibration_precision",
        "exclude",
        "include",
        *prune.spec.options,
    }


_GROUPS = 2
"""Raised when other groups of units are found in the same network."""


def _fields_of_units(job: JobConfig) -> dict[str, Any]:
    """Returns the fields of [prune] that decide which units a dense network has."""
    prune = job.prune
    # What initial masks have removed is recorded as a part of the target's cost.
    of_masks = {"cost": prune.target.kind or "sparsity"} if prune.initial_masks_digest else {}
    return {
        "granularity": prune.granularity,
        "compact": prune.compact,
        "groups": _GROUPS,
        **of_masks,
    }


def _surroundings(job: JobConfig, plug_ins: Iterable[str]) -> dict[str, Any]:
    device = "cpu"
    if job.cluster.use_gpu:
        # A driver without a GPU only groups trials by this key.
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "seed": job.seed,
        "threads": job.cluster.threads_per_worker,
        "device": device,
        "kernels": [torch.__version__, platform.machine(), cpu],
        "sources": {name: digest_source(name) for name in plug_ins},
        "schema_version": SCHEMA_VERSION,
    }


def _digest_state(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensor_state(model).items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _folder(kind: str, origin: dict[str, Any]) -> str:
    text = json.dumps(origin, sort_keys=True, separators=(",", ":"))
    return f"{kind}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _read(store: Store, folder: str) -> tuple[SharedRecord, dict[str, bytes]] | None:
    try:
        return store.read_shared(folder)
    except StoreError as error:
        if type(error) is not StoreError:
            raise  # the storage did not answer; the entry may be whole
        warnings.warn(f"{error}; it is computed anew", stacklevel=2)
        return None
