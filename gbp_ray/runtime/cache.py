"""Nothing twice: the dense network and its scores, computed by one trial and used by all of a job.

Both are found by a hash of everything that decides their bits, so that a trial that finds them ends
with the bits that it would have reached alone: the job's fields, the source of a user's functions,
and what picks the kernels (torch's version, the CPU's abilities, threads per worker). Of two trials
that want the same at once, one computes and the other waits. What is damaged is computed anew.

The dense network of a job with `movement`, which looks back on fine-tuning, is its own. Scores are
kept for criteria that pass over the data, and of the dense network alone: after the first prune no
two trials have the same weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config.job import SCHEMA_VERSION, JobConfig, trial_id
from gbp_ray.errors import StoreError
from gbp_ray.pruning.criteria import Criterion
from gbp_ray.results.records import RoundRecord, SharedRecord
from gbp_ray.results.store import Store
from gbp_ray.training.batchnorm import norm_batch_size
from gbp_ray.workloads.loading import digest_source, import_attribute
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
    """Says what decides the dense network of a job, or None where nobody else can have the same."""
    if job.prune.spec.needs_history:
        return None
    attack = job.attack.model_dump(mode="json", exclude_defaults=True)
    examples = job.prune.batchnorm_examples
    return {
        # Measured of round 0 as of any other, the second time with statistics re-estimated.
        **({"attack": attack} if job.attack.kind != "none" else {}),
        "workload": job.workload.model_dump(mode="json", exclude_defaults=True),
        "pretrain": job.pretrain.model_dump(mode="json", exclude_defaults=True),
        # Masks and measurements of round 0 cover what is not excluded.
        "exclude": sorted(job.prune.exclude),
        **({"batchnorm": [examples, norm_batch_size(job.prune)]} if examples else {}),
        **({"masks": pinned} if (pinned := job.prune.initial_masks_digest) else {}),
        **_surroundings(job, job.workload.factory),
    }


def dense_folder(job: JobConfig) -> str | None:
    """Says where the shared dense network of a job lies or will lie, or None as `dense_origin`."""
    origin = dense_origin(job)
    return None if origin is None else _folder("dense", origin)


def scores_key(job: JobConfig, dense: str) -> str | None:
    """Tells the shared scores of a dense network from others; None where none are kept."""
    if not job.prune.spec.needs_data:
        return None
    fields = _fields_of_scores(job)
    return f"{dense} {job.prune.model_dump_json(include=fields, exclude_defaults=True)}"


def adopt_dense(store: Store, job: JobConfig) -> RoundRecord | None:
    """Makes the shared dense network this trial's round 0; None where there is none."""
    origin = dense_origin(job)
    found = None if origin is None else _read(store, _folder("dense", origin))
    if found is None or found[0].round is None:
        return None
    record, files = found
    assert record.round is not None
    # Whoever trained it has the time on record; this trial took none.
    own = record.round.model_copy(update={"seconds": {}})
    return store.write_round(trial_id(job), own, files)


@contextmanager
def share_dense(store: Store, job: JobConfig) -> Iterator[Callable[[RoundRecord], None]]:
    """Keeps others from training the dense network of this job while the block does.

    Yields:
        What shares it, given the record of this trial's round 0.
    """
    origin = dense_origin(job)
    assert origin is not None
    folder = _folder("dense", origin)

    def share(record: RoundRecord) -> None:
        name = trial_id(job)
        files = {file: store.read_file(name, record, file) for file in record.files}
        store.write_shared(folder, files, origin, record)

    with store.await_lease(folder):
        yield share


class SharedScores:
    """Scores of dense networks in a job's store: a `ScoreCache` for `run_rounds`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(
        self, job: JobConfig, model: nn.Module, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """Reads the scores, or computes and keeps them; see `ScoreCache`."""
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
    if not prune.spec.needs_data:
        return None
    plug_ins = [job.workload.factory]
    if ":" in prune.criterion:
        plug_ins.append(prune.criterion)
    fields = _fields_of_scores(job)
    return {
        "weights": _digest_state(model),
        "workload": job.workload.model_dump(mode="json", include={"factory", "options"})
        | job.workload.model_dump(
            # The weights say nothing of what these make of the data and of the passes.
            mode="json",
            include={"tie", "validation", "encoding"},
            exclude_defaults=True,
        ),
        "prune": prune.model_dump(mode="json", include=fields, exclude_defaults=True),
        **_surroundings(job, *plug_ins),
    }


def _fields_of_scores(job: JobConfig) -> set[str]:
    """Names the fields of [prune] that decide the scores of given weights."""
    prune = job.prune
    if ":" in prune.criterion and isinstance(
        import_attribute(prune.criterion, "prune.criterion"), Criterion
    ):
        # Its statistics are shown the whole section; a plain function sees nothing of it.
        return set(type(prune).model_fields)
    return {
        "criterion",
        "calibration_examples",
        "calibration_batch_size",
        "calibration_augment",
        "exclude",
        *prune.spec.options,
    }


def _surroundings(job: JobConfig, *plug_ins: str) -> dict[str, Any]:
    return {
        "seed": job.seed,
        "threads": job.cluster.threads_per_worker,
        "device": _name_device(job),
        "kernels": [
            torch.__version__,
            platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
        ],
        "sources": {name: digest_source(name) for name in plug_ins},
        "schema_version": SCHEMA_VERSION,
    }


def _name_device(job: JobConfig) -> str:
    if not job.cluster.use_gpu:
        return "cpu"
    # A driver may sit on a machine without one, and only tells trials apart by this.
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"


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
            # A storage that does not answer says nothing about what is on it.
            raise
        warnings.warn(f"{error}; it is computed anew", stacklevel=2)
        return None
