"""What runs on a CUDA device gives what the host gives: decisions to the bit, the rest closely."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load
from selections import dense
from small_networks import ConvNet, built, draw, images, prune_config
from techniques import case_of, checkpoint_of, digest
from test_thresholds import decide, misleading_scores
from torch import Tensor

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.job import JobConfig, load_job
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole, shard_network
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.thresholds import exact_threshold
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.loading import load_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HOST, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def exact_kernels() -> Iterator[None]:
    """Has convolutions add in one order, and in float32 throughout, as on the host."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


# -- decisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", misleading_scores())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_thresholds_are_those_of_sorting(case: str, dtype: torch.dtype) -> None:
    values_N = torch.from_numpy(misleading_scores()[case]).to(dtype)
    values_N = values_N.nan_to_num(posinf=6e4, neginf=-6e4)
    ordered = np.sort(values_N.numpy())
    for k in (1, len(values_N) // 3, len(values_N) // 2, len(values_N)):
        below = int(np.count_nonzero(values_N.numpy() < ordered[k - 1]))
        expected = float(ordered[k - 1]), k - below
        assert exact_threshold(values_N.to(GPU), k) == expected


def many_scores(dtype: torch.dtype) -> dict[str, Tensor]:
    """Enough for a bracket, with ties, and more than a GPU looks at in one stretch."""
    free = draw(1024, 1024, seed=1)
    tied = draw(36_000, 1024, seed=2).mul(50).round().div(50)
    return {"free.weight": free.to(dtype), "small.weight": free[:8].to(dtype), "tied.weight": tied}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decisions_are_those_of_the_host(scope: str, granularity: str, dtype: torch.dtype) -> None:
    scores = many_scores(dtype)
    config = prune_config(
        sparsity=0.5,
        scope=scope,
        granularity=granularity,
        layer_max_sparsity={"small.*": 0.3},
        layer_min_sparsity={"free.*": 0.2},
    )
    found = []
    for device in (HOST, GPU):
        masks = dense(scores).to(device)
        for sparsity in (0.25, 0.4):  # the second over what the first left
            there = {name: values.to(device) for name, values in scores.items()}
            masks = select_masks(there, masks, config, sparsity).masks
        assert all(mask.device.type == device.type for mask in masks.values())
        found.append(masks)
    assert found[0].digest == found[1].digest


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_decisions_among_ranks_are_those_of_the_host(granularity: str) -> None:
    scores = {f"{name}.weight": draw(64, 8, seed=ord(name)).mul(4).round() for name in "abc"}
    on_gpu = {name: values.to(GPU) for name, values in scores.items()}
    expected = decide(scores, 1, [0.25, 0.5], granularity=granularity)
    for world_size in (1, 2, 3, 4):
        assert decide(on_gpu, world_size, [0.25, 0.5], granularity=granularity) == expected


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [name for name in CRITERIA if name != "movement"])
def test_scores_are_close_to_those_of_the_host(rule: str) -> None:
    config = prune_config(
        rule, calibration_examples=32, calibration_batch_size=8, hutchinson_probes=2
    )
    found = []
    for device in (HOST, GPU):
        model = built(ConvNet).to(device)
        units = prunable_parameters(model)
        sliced = score(model, units, images(), config, Ranks(device=device))
        found.append(sliced.gather(Ranks()))
        assert all(values.device.type == device.type for values in sliced.values)
    for name, values in found[0].items():
        assert torch.allclose(
            values, found[1][name], rtol=1e-3, atol=1e-3 * float(values.abs().max())
        )


# -- trials ----------------------------------------------------------------------------------------


def reports(
    job: JobConfig, workload: Workload, ranks: Ranks, resume: Checkpoint | None = None
) -> list[dict[str, Any]]:
    """Runs rounds; gives of each its mask, its weights, its files and its record."""
    found = []
    for state in run_rounds(job, workload, ranks, resume=resume):
        weights = {n: gather_whole(t).cpu() for n, t in state.model.state_dict().items()}
        found.append(
            {
                "mask": state.masks.digest,
                "weights": digest(weights),
                "files": {name: bytes(data) for name, data in state.to_files().items()},
                "record": state.record,
            }
        )
    return found


CASES = ("everything", "everything in bfloat16", "attacked, frozen, matched", "taught once")


@pytest.mark.parametrize("case", CASES)
def test_a_trial_repeats_itself_and_goes_on_from_any_round(case: str) -> None:
    job, workload = case_of(case)
    ranks = Ranks(device=GPU)
    first, again = reports(job, workload, ranks), reports(job, workload, ranks)
    assert [(r["mask"], r["weights"]) for r in first] == [(r["mask"], r["weights"]) for r in again]
    for record in (r["record"] for r in first[1:]):
        assert record.sparsity == pytest.approx(record.sparsity_target, abs=1e-3)
    middle = checkpoint_of(first, 1)
    (last,) = reports(job, workload, ranks, resume=middle)
    assert (last["mask"], last["weights"]) == (first[2]["mask"], first[2]["weights"])
    # The same checkpoint serves a host without a GPU.
    (on_host,) = reports(job, workload, Ranks(), resume=middle)
    assert on_host["record"].sparsity == last["record"].sparsity


def test_a_sharded_trial_on_one_gpu_is_that_of_the_replicated_network(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        job, workload = case_of("everything")
        ranks = Ranks.current(GPU)
        expected = reports(job, workload, ranks)
        found = reports(*case_of("everything", "fsdp"), ranks)
        model = built(ConvNet)
        shard_network(model, GPU, 1)
        assert all(p.device.type == "cuda" for p in model.parameters())
    finally:
        dist.destroy_process_group()
    assert [r["mask"] for r in found] == [r["mask"] for r in expected]
    assert [r["weights"] for r in found] == [r["weights"] for r in expected]


def test_the_embedded_job_reaches_its_accuracy() -> None:
    job = load_job()
    workload = load_workload(job.workload, job.seed)
    states = reports(job, workload, Ranks(device=GPU))
    dense_record, last = states[0]["record"], states[-1]["record"]
    assert dense_record.accuracy > 0.97
    assert last.sparsity == pytest.approx(0.9, abs=1e-4)
    assert last.accuracy > dense_record.accuracy - 0.015
    weights = load(states[-1]["files"]["weights.safetensors"])
    masks = MaskSet.from_bytes(states[-1]["files"]["masks.safetensors"], "")
    assert all(not weights[name][~mask].any() for name, mask in masks.items())


def test_a_decision_holds_little_beside_the_scores_and_the_masks() -> None:
    num_weights = 2**27
    scores = {f"layer{i}.weight": torch.rand(2**12, 2**12, device=GPU) for i in range(8)}
    masks = dense(scores)
    config = prune_config(sparsity=0.9)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select_masks(scores, masks, config, 0.5)
    extra = torch.cuda.max_memory_allocated() - before
    # The new masks, a byte a weight; stretches of 2^25 scores, and what they are compared with.
    assert extra < num_weights + 2**25 * 16
