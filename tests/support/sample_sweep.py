"""A sweep without training, with numbers that look like one: curves that fall, seeds that differ.

Written with the store's own writer. Masks overlap as chosen: those of the gradient criteria share
more of their weights with each other than with random ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from safetensors.numpy import save

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.results.index import refresh_index
from gbp_ray.results.records import CostRecord, LayerRecord, RoundRecord, TrialRecord
from gbp_ray.results.store import Store

SHAPES: dict[str, tuple[int, ...]] = {
    "conv1.weight": (32, 1, 3, 3),
    "conv2.weight": (64, 32, 3, 3),
    "conv3.weight": (64, 64, 3, 3),
    "linear.weight": (10, 64),
}
CRITERIA = ("magnitude", "random", "taylor", "fisher")
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
_BEARS = {"magnitude": 0.96, "random": 0.80, "taylor": 0.975, "fisher": 0.985}


def sweep_job(name: str = "sweep", **fields: Any) -> JobConfig:
    """Makes a job; `criterion`, `sparsity`, `rounds`, ... are those of prune, others whole."""
    top = {key: fields.pop(key) for key in ("seed", "workload", "finetune") if key in fields}
    tree = {
        "name": name,
        "workload": {"factory": "gbp_ray.zoo:digits_convnet"},
        "pretrain": {"epochs": 20},
        "prune": {"criterion": "taylor", "sparsity": 0.9, "rounds": 4} | fields,
        "finetune": {"epochs": 2},
    }
    return JobConfig.model_validate(tree | top)


def write_sweep(
    storage: str | Path | Store,
    *,
    criteria: Sequence[str] = CRITERIA,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Iterable[int] = range(3),
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    **fields: Any,
) -> Store:
    """Writes every combination as a finished trial."""
    store = storage if isinstance(storage, Store) else Store(storage, "sweep")
    # Once at the end rather than after every few trials, which takes most of the time.
    with patch("gbp_ray.results.index.refresh_index"):
        for criterion, sparsity, seed in itertools.product(criteria, sparsities, list(seeds)):
            job = sweep_job(store.name, criterion=criterion, sparsity=sparsity, seed=seed, **fields)
            write_sweep_trial(store, job, shapes=shapes)
    refresh_index(store.objects)
    return store


def write_sweep_trial(
    store: Store,
    job: JobConfig,
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dense: Mapping[str, Any] | None = None,
    final: Mapping[str, Any] | None = None,
) -> TrialRecord:
    """Writes one trial as a driver would; some measurements of two rounds may be given."""
    name = trial_id(job)
    store.claim(job)
    rounds = []
    for number in range(job.prune.rounds + 1):
        record, files = _make_round(job, number, shapes)
        given = {0: dense, job.prune.rounds: final}.get(number)
        record = record.model_copy(update=dict(given or {}))
        rounds.append(store.write_round(name, record, files))
    trial = make_sweep_trial(job, tuple(rounds))
    store.write_trial(trial)
    return trial


def make_sweep_trial(job: JobConfig, rounds: tuple[RoundRecord, ...]) -> TrialRecord:
    """Makes a finished trial's record."""
    return TrialRecord(
        trial_id=trial_id(job),
        job=job,
        rounds=rounds,
        seconds=round(sum(sum(r.seconds.values()) for r in rounds) + 2.5, 1),
        num_workers=job.cluster.num_workers,
        versions={
            "python": "3.11.2",
            "gbp-ray": "0.1.0",
            "torch": "2.13.0",
            "ray": "2.60.0",
            "machine": "x86_64",
        },
    )


def make_sweep_round(
    job: JobConfig, number: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> RoundRecord:
    """Makes a round's record alone, without files."""
    sparsity = _sparsity_after(job, number)
    shares = _layer_sparsities(sparsity, job.prune.criterion, shapes)
    kept = {name: size - round(size * shares[name]) for name, size in _sizes(shapes).items()}
    return _make_record(job, number, sparsity, shapes, kept)


def _sparsity_after(job: JobConfig, number: int) -> float:
    return 1 - (1 - job.prune.sparsity) ** (number / job.prune.rounds)


def _layer_sparsities(
    sparsity: float, criterion: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    # The first and the last layer keep more, as they do in earnest; the others make up for it.
    sizes = _sizes(shapes)
    ends = (0.3 + 0.15 * (len(criterion) % 4)) * sparsity
    if criterion == "random" or len(sizes) < 3:
        return dict.fromkeys(sizes, sparsity)
    first, *middle, last = sizes
    inner = sum(sizes[name] for name in middle)
    rest = sparsity * sum(sizes.values()) - ends * (sizes[first] + sizes[last])
    return {first: ends, **dict.fromkeys(middle, min(1.0, rest / inner)), last: ends}


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _make_record(
    job: JobConfig,
    number: int,
    sparsity: float,
    shapes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, int],
    digest: str = "0",
) -> RoundRecord:
    criterion = job.prune.criterion
    dense = 0.99 + 0.0015 * float(np.random.default_rng(job.seed).normal())
    key = int(hashlib.sha256(trial_id(job).encode()).hexdigest()[:8], 16)
    draws = np.random.default_rng([key, number])
    bears = _BEARS.get(criterion, 0.95)
    # Halvings of the weights beyond what the criterion bears.
    beyond = math.log2(1 - bears) - math.log2(1 - sparsity) if number else -99.0
    fall = 0.88 / (1 + math.exp(-2.2 * (beyond - 1)))
    accuracy = dense - fall + (0.0015 + 0.03 * fall) * float(draws.normal()) * bool(number)
    accuracy = round(min(1.0, max(0.1, accuracy)), 4)
    layers = tuple(
        LayerRecord(
            name=name,
            shape=shape,
            num_weights=math.prod(shape),
            num_nonzero=kept[name],
            macs=30 * math.prod(shape),
            macs_nonzero=30 * kept[name],
        )
        for name, shape in shapes.items()
    )
    total = sum(layer.num_weights for layer in layers)
    left = sum(layer.num_nonzero for layer in layers)
    seconds: dict[str, float] = {"evaluate": round(float(draws.uniform(0.2, 0.3)), 3)}
    if number:
        seconds |= {
            "score": round(float(draws.uniform(0.1, 0.8)), 3) * (criterion not in _BEARS or 1),
            "select": 0.02,
            "batchnorm": 0.11,
            "finetune": round(float(draws.uniform(1.8, 2.2)), 3),
        }
    else:
        seconds["pretrain"] = round(float(draws.uniform(8, 9)), 3)
    return RoundRecord(
        round=number,
        sparsity_target=sparsity,
        accuracy=accuracy,
        loss=round(4 * (1 - accuracy), 4),
        accuracy_pruned=round(max(0.1, accuracy - 0.3 * sparsity**6), 4) if number else None,
        loss_pruned=round(6 * (1 - accuracy), 4) if number else None,
        train_loss=round(1.5 * (1 - accuracy), 4),
        cost=CostRecord(
            num_parameters=total + 330,
            num_nonzero=left + 330,
            macs=30 * total,
            macs_nonzero=30 * left,
            num_bytes=4 * (total + 330),
            num_bytes_sparse=5 * left,
            layers=layers,
        ),
        mask_digest=digest,
        seconds=seconds,
    )


def _make_round(
    job: JobConfig, number: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[RoundRecord, dict[str, bytes]]:
    sparsity = _sparsity_after(job, number)
    # Random draws share nothing; the others share what their network decides.
    network = np.random.default_rng(job.seed)
    key = int(hashlib.sha256(job.prune.criterion.encode()).hexdigest()[:8], 16)
    own = np.random.default_rng([key, job.seed])
    share = 0.0 if job.prune.criterion == "random" else 0.7
    masks, weights, kept = {}, {}, {}
    shares = _layer_sparsities(sparsity, job.prune.criterion, shapes)
    for name, size in _sizes(shapes).items():
        scores = share * network.normal(size=size) + (1 - share) * own.normal(size=size)
        gone = round(size * shares[name])
        mask = np.ones(size, bool)
        mask[np.argsort(scores)[:gone]] = False
        masks[name] = np.packbits(mask, bitorder="little")
        weights[name] = np.where(mask, 0.5, 0).astype(np.float32).reshape(shapes[name])
        kept[name] = int(mask.sum())
    if number == 0:
        weights = {name: value + np.float32(0.001 * job.seed) for name, value in weights.items()}
    digest = hashlib.sha256()
    for name, bits in sorted(masks.items()):
        shape = "x".join(map(str, shapes[name]))
        digest.update(name.encode() + b"\0" + shape.encode() + b"\0" + bits.tobytes())
    metadata = {
        "format": "gbp_ray.masks",
        "version": "1",
        "shapes": json.dumps(dict(shapes)),
        "digest": digest.hexdigest(),
        "parent": "",
        "round": str(number),
        "criterion": job.prune.criterion,
        "sparsity": repr(sparsity),
    }
    record = _make_record(job, number, sparsity, shapes, kept, digest.hexdigest())
    files = {
        "weights.safetensors": save(weights, {"format": "pt"}),
        "masks.safetensors": save(masks, metadata),
        "state.pt": b"",
    }
    return record, files
