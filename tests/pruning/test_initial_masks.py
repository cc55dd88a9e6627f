"""Masks from elsewhere: what they start, what they refuse, and how a trial is known by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_networks import ConvNet, built, images, job_config
from torch import nn

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.config.prune import sparsity_schedule
from gbp_ray.config.training import PretrainConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, StoreError, WorkloadError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import MaskSet, read_initial_masks, read_masks_at
from gbp_ray.pruning.rounds import RoundState, run_rounds
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.runtime.pinning import pin_files
from gbp_ray.workloads.weights import start_from


def half_masks(seed: int = 0, model: nn.Module | None = None) -> MaskSet:
    units = prunable_parameters(model or built(ConvNet))
    generator = torch.Generator().manual_seed(seed)
    return MaskSet(
        {u.name: torch.rand(u.parameter.shape, generator=generator) < 0.5 for u in units}
    )


def file_of(masks: MaskSet, folder: Path, name: str = "masks.safetensors") -> str:
    path = folder / name
    path.write_bytes(masks.to_bytes())
    return str(path)


def job_from(source: str, **prune: Any) -> JobConfig:
    fields = {"initial_masks": source, "calibration_examples": 16, "batchnorm_examples": 16}
    return job_config(pretrain=PretrainConfig(epochs=1, batch_size=12), prune=fields | prune)


def rounds_of(job: JobConfig) -> list[RoundState]:
    return list(run_rounds(job, images(), Ranks()))


def test_the_masks_hold_from_the_first_weights_on(tmp_path: Path) -> None:
    masks = half_masks()
    job = job_from(file_of(masks, tmp_path), sparsity=0.9, rounds=2)
    seen = []
    for state in run_rounds(job, images(), Ranks()):
        assert masks.find_revived(state.model) is None
        seen.append((state.record.sparsity, state.masks))
    assert seen[0][1] == masks, "round 0 has the masks themselves"
    assert seen[0][0] >= masks.sparsity
    assert 0 < masks.sparsity < seen[1][0] < seen[2][0] == pytest.approx(0.9, abs=0.005)
    assert seen[2][1].difference(masks).num_pruned == seen[2][1].num_units, "nothing came back"


def test_pretraining_under_masks_is_not_training_and_masking(tmp_path: Path) -> None:
    masks = half_masks()
    job = job_from(file_of(masks, tmp_path), sparsity=0.9)
    ticket = next(run_rounds(job, images(), Ranks())).model
    plain = next(run_rounds(job_from("", sparsity=0.9), images(), Ranks())).model
    masks.apply_(plain)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(ticket.parameters(), plain.parameters(), strict=True)
    )


def test_a_job_that_asks_for_the_sparsity_of_its_masks_only_trains(tmp_path: Path) -> None:
    masks = half_masks()
    job = job_from(file_of(masks, tmp_path), sparsity=masks.sparsity, rounds=2)
    assert [state.masks.digest for state in rounds_of(job)] == [masks.digest] * 3


@pytest.mark.parametrize("kind", ["linear", "cubic", "geometric", "one_shot"])
def test_a_schedule_goes_on_from_where_it_starts(kind: str) -> None:
    steps = sparsity_schedule(kind, 0.9, 4, start=0.5)
    assert steps == sorted(steps)
    assert steps[0] > 0.5
    assert steps[-1] == 0.9
    assert sparsity_schedule(kind, 0.5, 3, start=0.5) == pytest.approx([0.5] * 3)
    # As if the rounds before had led there.
    if kind == "geometric":
        assert sparsity_schedule(kind, 0.75, 1, start=0.5) == [0.75]
        assert steps[1] == pytest.approx(1 - 0.5 * 0.2**0.5)


def test_masks_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    masks = half_masks()
    renamed = MaskSet({"convolution1.weight": masks["conv1.weight"]})
    reshaped = MaskSet({"conv1.weight": torch.ones(8, 2, 5, 5, dtype=torch.bool)})
    for other, fault in (
        (renamed, r"masks 'convolution1.weight', which is no prunable .* 'conv1.weight'"),
        (reshaped, r"'conv1.weight' has shape \(8, 2, 5, 5\), the weights have \(8, 2, 3, 3\)"),
    ):
        with pytest.raises(ConfigError, match=fault):
            check_job(job_from(file_of(other, tmp_path), sparsity=0.9), images())
    with pytest.raises(ConfigError, match=r"prune.sparsity = 0.3: is below the 0\.\d+ of"):
        check_job(job_from(file_of(masks, tmp_path), sparsity=0.3), images())
    with pytest.raises(ConfigError, match=r"prune\.initial_masks = 'nowhere'"):
        check_job(job_from("nowhere", sparsity=0.9), images())
    units = {"granularity": "channel", "target": {"macs": 0.3}}
    with pytest.raises(ConfigError, match=r"prune\.initial_masks = '.*no whole units of this"):
        check_job(job_from(file_of(masks, tmp_path), **units), images())
    with pytest.raises(ValueError, match="masks of single weights"):
        job_config(prune={"initial_masks": "x", "granularity": "2:4", "sparsity": 0.5})


def test_excluded_parameters_stay_whole_and_others_without_a_mask_start_whole(
    tmp_path: Path,
) -> None:
    masks = half_masks()
    partial = MaskSet({name: masks[name] for name in ("conv1.weight", "head.weight")})
    job = job_from(file_of(partial, tmp_path), sparsity=0.9, exclude=["head.*"])
    units = prunable_parameters(built(ConvNet), ["head.*"])
    found = read_initial_masks(job, units)
    assert found is not None
    assert list(found) == ["conv1.weight", "conv2.weight"]
    assert torch.equal(found["conv1.weight"], masks["conv1.weight"])
    assert bool(found["conv2.weight"].all())


def test_a_trial_is_known_by_its_masks_and_not_by_where_they_lie(tmp_path: Path) -> None:
    one = file_of(half_masks(0), tmp_path, "one.safetensors")
    copy = file_of(half_masks(0), tmp_path, "copy.safetensors")
    other = file_of(half_masks(1), tmp_path, "other.safetensors")
    pinned = [pin_files(job_from(source, sparsity=0.9)) for source in (one, copy, other)]
    names = [trial_id(job) for job in pinned]
    assert names[0] == names[1] != names[2]
    assert trial_id(job_from("", sparsity=0.9)) not in names
    assert pin_files(pinned[0]) is pinned[0]
    assert trial_id(load_job(pinned[0])) == names[0], "a record's job keeps its id"
    # Whoever reads them later makes sure that they are the same.
    Path(one).write_bytes(half_masks(1).to_bytes())
    with pytest.raises(ConfigError, match="holds other masks than when the job was made"):
        check_job(pinned[0], images())


def test_a_trial_is_known_by_the_weights_that_it_names_and_not_by_where_they_lie(
    tmp_path: Path,
) -> None:
    def weights(name: str, seed: int) -> str:
        save_file(built(ConvNet, seed).state_dict(), tmp_path / name)
        return str(tmp_path / name)

    files = [
        weights(f"{name}.safetensors", seed) for name, seed in (("one", 0), ("two", 0), ("b", 1))
    ]

    def jobs(section: Callable[[str], dict[str, Any]]) -> list[JobConfig]:
        return [pin_files(job_config(**section(file))) for file in files]

    def started(file: str) -> dict[str, Any]:
        return {"workload": {"transfer": {"checkpoint": file}}}

    def taught(file: str) -> dict[str, Any]:
        return {"finetune": {"epochs": 1, "distillation": {"weight": 0.5, "teacher": file}}}

    for section in (started, taught):
        one, copy, other = jobs(section)
        assert trial_id(one) == trial_id(copy) != trial_id(other)
        assert trial_id(load_job(one)) == trial_id(one)
        assert pin_files(one) is one
    started_one, taught_one = jobs(started)[0], jobs(taught)[0]
    weights("one.safetensors", 2)
    with pytest.raises(WorkloadError, match="holds other weights than when the job was made"):
        start_from(ConvNet, started_one.workload.transfer)
    with pytest.raises(WorkloadError, match="holds other weights than when the job was made"):
        check_job(taught_one, images())


def test_a_job_without_masks_keeps_its_id() -> None:
    assert trial_id(load_job(None)) == "taylor_squared-s0.90-r5-316b39ff"


def test_masks_that_are_not_there_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such folder"):
        read_masks_at(str(tmp_path / "nothing"))
    (tmp_path / "broken").write_bytes(b"no masks")
    with pytest.raises(StoreError, match="not a readable safetensors file"):
        read_masks_at(str(tmp_path / "broken"))
