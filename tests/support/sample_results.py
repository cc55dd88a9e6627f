"""Results without training: jobs, records and files that fit each other, to write and read back."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from safetensors.numpy import save

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.results.records import CostRecord, LayerRecord, RoundRecord, TrialRecord
from gbp_ray.results.store import Store

SHAPES = {"a.weight": (10, 4), "b.weight": (60,)}


def sample_job(name: str = "try", **prune: Any) -> JobConfig:
    """Makes a job of two rounds; the seed may be given as `seed`."""
    top = {"seed": prune.pop("seed")} if "seed" in prune else {}
    tree = {
        "name": name,
        "workload": {"factory": "my_module:make", "options": {"width": 8}},
        "prune": {"criterion": "taylor", "sparsity": 0.5, "rounds": 2} | prune,
    }
    return JobConfig.model_validate(tree | top)


def sample_masks(sparsity: float, seed: int) -> dict[str, np.ndarray]:
    """Draws masks that remove exactly the asked share of each layer, rounded down."""
    draws = np.random.default_rng(seed)
    masks = {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        mask = np.ones(size, bool)
        mask[draws.permutation(size)[: int(sparsity * size)]] = False
        masks[name] = mask.reshape(shape)
    return masks


def sample_round(number: int, sparsity: float, seed: int) -> tuple[RoundRecord, dict[str, bytes]]:
    """Makes a round's record and files, consistent with each other."""
    draws = np.random.default_rng([seed, number])
    masks = sample_masks(sparsity, seed)
    weights = {
        name: (draws.uniform(0.5, 1.0, mask.shape) * mask).astype(np.float32)
        for name, mask in masks.items()
    }
    packed = {name: np.packbits(m.reshape(-1), bitorder="little") for name, m in masks.items()}
    digest = hashlib.sha256()
    for name, bits in sorted(packed.items()):
        shape = "x".join(map(str, SHAPES[name]))
        digest.update(name.encode() + b"\0" + shape.encode() + b"\0" + bits.tobytes())
    metadata = {
        "format": "gbp_ray.masks",
        "version": "1",
        "shapes": json.dumps(SHAPES),
        "digest": digest.hexdigest(),
        "parent": "",
        "round": str(number),
        "criterion": "taylor",
        "sparsity": repr(sparsity),
    }
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    layers = tuple(
        LayerRecord(
            name=name,
            shape=shape,
            num_weights=masks[name].size,
            num_nonzero=kept[name],
            macs=10 * masks[name].size,
            macs_nonzero=10 * kept[name],
        )
        for name, shape in SHAPES.items()
    )
    cost = CostRecord(
        num_parameters=110,
        num_nonzero=sum(kept.values()) + 10,
        macs=1000,
        macs_nonzero=10 * sum(kept.values()),
        num_bytes=440,
        num_bytes_sparse=150,
        layers=layers,
    )
    record = RoundRecord(
        round=number,
        sparsity_target=sparsity,
        accuracy=round(float(draws.uniform(0.5, 1.0)), 3),
        loss=round(float(draws.uniform(0.0, 1.0)), 3),
        accuracy_pruned=0.25 if number else None,
        cost=cost,
        mask_digest=digest.hexdigest(),
        seconds={"score": 0.5} if number else {"pretrain": 1.0},
    )
    files = {
        "weights.safetensors": save(weights, {"format": "pt"}),
        "masks.safetensors": save(packed, metadata),
        "state.pt": draws.bytes(64),
    }
    return record, files


def write_trial(store: Store, job: JobConfig, *, num_rounds: int | None = None) -> str:
    """Writes a trial, or its first rounds alone, as a driver would; gives its id."""
    name = trial_id(job)
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    store.claim(job)
    wanted = job.prune.rounds + 1 if num_rounds is None else num_rounds
    for number in range(len(store.read_rounds(name)), wanted):
        sparsity = job.prune.sparsity * number / job.prune.rounds
        store.write_round(name, *sample_round(number, sparsity, seed))
    if num_rounds is None:
        store.write_trial(sample_trial(job, tuple(store.read_rounds(name))))
    return name


def copy_results(source: Store, storage: str) -> Store:
    """Copies all objects of a job to another storage: cheaper than to write its trials again."""
    target = Store(storage, source.name)
    for entry in source.objects.entries():
        data = source.objects.get(entry.key)
        assert data is not None
        target.objects.put(entry.key, data)
    return target


def sample_trial(job: JobConfig, rounds: tuple[RoundRecord, ...]) -> TrialRecord:
    """Makes a finished trial's record."""
    return TrialRecord(
        trial_id=trial_id(job),
        job=job,
        rounds=rounds,
        seconds=1.5,
        num_workers=0,
        versions={"torch": "2.13.0"},
    )
