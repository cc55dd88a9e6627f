"""Whole trials in one process: resumed or not they end alike, and records tell the truth."""

import dataclasses
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_model
from small_networks import ConvNet, SharedWeightNet, TanhNet, images, regression
from techniques import TECHNIQUES, case_of, checkpoint_of, ranged_images, rounds_of
from torch import nn
from torch.nn import functional

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, PruneError, StoreError, WorkloadError
from gbp_ray.pruning import rounds
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import RoundState, run_rounds
from gbp_ray.pruning.units import measure, prunable_parameters
from gbp_ray.training.passes import count_macs
from gbp_ray.workloads.data import derive_seed, seeded, shuffled_indices

TAUGHT = {"distillation": {"weight": 0.8}}


def job_of(**sections: dict[str, Any]) -> JobConfig:
    tree: dict[str, Any] = {
        "name": "small",
        "workload": {"factory": "unused:here", "eval_batch_size": 8},
        "pretrain": {"epochs": 1, "batch_size": 12},
        "prune": {
            "criterion": "taylor",
            "sparsity": 0.75,
            "rounds": 3,
            "calibration_examples": 24,
            "calibration_batch_size": 8,
            "batchnorm_examples": 24,
        },
        "finetune": {"epochs": 0.7, "batch_size": 12},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return JobConfig.model_validate(tree)


def run(job: JobConfig) -> list[tuple[Any, dict[str, bytes]]]:
    """Runs a trial and keeps each round's record and files."""
    return [
        (state.record.model_dump(exclude={"seconds"}), state.to_files())
        for state in run_rounds(job, ranged_images(), Ranks())
    ]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_resumed_trial_ends_as_an_uninterrupted_one(name: str) -> None:
    whole = rounds_of(name, Ranks())
    assert [report["record"]["round"] for report in whole] == list(range(len(whole)))
    for number in range(len(whole) - 1):
        rest = rounds_of(name, Ranks(), resume=checkpoint_of(whole, number))
        assert len(rest) == len(whole) - number - 1
        for expected, found in zip(whole[number + 1 :], rest, strict=True):
            for key in ("record", "mask", "weights"):
                assert found[key] == expected[key]
            for file in ("weights.safetensors", "masks.safetensors"):
                assert found["files"][file] == expected["files"][file], f"{file} after {number}"


def test_nothing_follows_the_last_round() -> None:
    whole = rounds_of("plain", Ranks())
    assert rounds_of("plain", Ranks(), resume=checkpoint_of(whole, len(whole) - 1)) == []


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_the_dense_network_is_measured_as_pruned_ones_are_and_stays_as_it_was(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        network = ConvNet()
        # What hardly moves is stale after a few steps.
        network.norm1.momentum = network.norm2.momentum = 1e-4
        return network

    workload = dataclasses.replace(images(build), augment=None)
    job = job_of(prune={"criterion": criterion})
    states = [(s.record, s.to_files()) for s in run_rounds(job, workload, Ranks())]
    dense, files = states[0]

    # By torch alone: the statistics of the one batch that 24 examples make.
    model = build()
    model.load_state_dict(load(files["weights.safetensors"]))
    model.eval()
    chosen = shuffled_indices(46, derive_seed(job.seed, "batchnorm"))[:24]
    inputs, labels = workload.test
    with torch.no_grad():
        stored = model(inputs)
        for norm in (model.norm1, model.norm2):
            norm.train().momentum = 1.0
        model(workload.train[0][chosen])
        anew = model.eval()(inputs)
    for outputs, accuracy, loss in (
        (stored, dense.accuracy, dense.loss),
        (anew, dense.accuracy_recalibrated, dense.loss_recalibrated),
    ):
        assert accuracy == (outputs.argmax(1) == labels).sum().item() / 29
        assert loss == pytest.approx(functional.cross_entropy(outputs, labels).item(), rel=1e-6)
    assert dense.reference.accuracy == max(dense.accuracy, dense.accuracy_recalibrated or 0)
    assert all(record.accuracy_recalibrated is None for record, _ in states[1:])

    monkeypatch.setattr(rounds._Run, "_evaluate_recalibrated", lambda run: None)
    for (_, ours), other in zip(states, run_rounds(job, workload, Ranks()), strict=True):
        theirs = other.to_files()
        assert all(ours[name] == theirs[name] for name in ours if name != "state.pt")
    plain = images(lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    assert next(run_rounds(job, plain, Ranks())).record.accuracy_recalibrated is None


def test_the_dense_network_teaches_where_the_job_says_so() -> None:
    taught, plain = run(job_of(finetune=TAUGHT)), run(job_of())
    assert taught[0] == plain[0]
    assert taught[1][0]["mask_digest"] == plain[1][0]["mask_digest"]
    assert taught[1][1]["weights.safetensors"] != plain[1][1]["weights.safetensors"]


def test_a_network_without_logits_cannot_be_taught() -> None:
    inputs = torch.randn(20, 3)
    workload = regression(
        lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), inputs, inputs[:, 0]
    )
    with pytest.raises(ConfigError, match=r"finetune\.distillation\.weight: needs .*logits"):
        check_job(job_of(finetune=TAUGHT), workload)


def test_the_same_job_twice_gives_the_same_bytes_and_another_seed_does_not() -> None:
    first, second = run(job_of())[-1][1], run(job_of())[-1][1]
    assert first["masks.safetensors"] == second["masks.safetensors"]
    tree = job_of().model_dump(exclude_unset=True) | {"seed": 1}
    assert (
        run(JobConfig.model_validate(tree))[-1][1]["weights.safetensors"]
        != (first["weights.safetensors"])
    )


def test_the_recorded_sparsity_is_counted_in_the_weights() -> None:
    for record, files in run(job_of()):
        weights = load(files["weights.safetensors"])
        names = [layer["name"] for layer in record["cost"]["layers"]]
        zeros = sum(int((weights[name] == 0).sum()) for name in names)
        total = sum(weights[name].numel() for name in names)
        assert record["sparsity"] == pytest.approx(zeros / total, abs=1e-12)
        assert zeros == round(record["sparsity_target"] * total)
        masks = MaskSet.from_bytes(files["masks.safetensors"])
        assert masks.num_pruned == zeros
        assert masks.digest == record["mask_digest"]


def test_masks_name_their_parent_and_only_shrink() -> None:
    rounds = [MaskSet.from_bytes(files["masks.safetensors"]) for _, files in run(job_of())]
    for before, after in pairwise(rounds):
        assert after.parent == before.digest
        assert after.difference(before).num_pruned == after.num_units


def test_rewinding_puts_kept_weights_back_to_their_dense_values() -> None:
    job = job_of(prune={"rewind": "weights"}, finetune={"epochs": 0})
    rounds = run(job)
    dense = load(rounds[0][1]["weights.safetensors"])
    for _, files in rounds[1:]:
        weights = load(files["weights.safetensors"])
        masks = MaskSet.from_bytes(files["masks.safetensors"])
        for name, mask in masks.items():
            assert torch.equal(weights[name][mask], dense[name][mask])
            assert not weights[name][~mask].any()


def test_movement_is_the_sum_over_steps_of_minus_weight_times_gradient() -> None:
    """By plain torch: one part a batch, and every batch is the whole data."""
    inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    workload = regression(TanhNet, inputs, inputs[:, :2].square())
    training = {"epochs": 3, "batch_size": 10, "microbatches": 1, "lr_schedule": "constant"}
    job = job_of(
        pretrain={"epochs": 0},
        prune={"criterion": "movement"},
        finetune={**training, "learning_rate": 0.1, "weight_decay": 0.01},
    )
    with seeded(derive_seed(0, "model")):
        model = TanhNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    expected = torch.zeros(20)
    for _ in range(3):
        optimizer.zero_grad()
        workload.loss(model(inputs), workload.train[1]).backward()
        weights = (model[0].weight, model[2].weight)
        expected -= torch.cat([(w * w.grad).detach().flatten() for w in weights])
        optimizer.step()
    dense, pruned, *_ = run_rounds(job, workload, Ranks())
    state = torch.load(io.BytesIO(dense.to_files()["state.pt"]), weights_only=True)
    found = torch.cat([state["movement"][name].flatten() for name in ("0.weight", "2.weight")])
    torch.testing.assert_close(found.float(), expected)
    lowest = expected.argsort()[: pruned.masks.num_pruned]
    assert sorted((~pruned.masks.flat()).nonzero().flatten().tolist()) == sorted(lowest.tolist())


def test_one_shot_prunes_once_and_then_trains_on() -> None:
    records = [record for record, _ in run(job_of(prune={"schedule": "one_shot"}))]
    assert [r["sparsity"] for r in records[1:]] == [records[1]["sparsity"]] * 3
    assert len({r["mask_digest"] for r in records[1:]}) == 1
    assert len({r["loss"] for r in records[1:]}) == 3


def test_fine_tuning_after_the_last_round_starts_where_pruning_ends() -> None:
    last = run(job_of(finetune={"after": "last"}))
    untrained = run(job_of(finetune={"epochs": 0}))
    for (record, files), (other, expected) in zip(last[:-1], untrained[:-1], strict=True):
        assert record == other
        assert files["weights.safetensors"] == expected["weights.safetensors"]
    (record, files), (other, expected) = last[-1], untrained[-1]
    assert record["mask_digest"] == other["mask_digest"]
    assert record["accuracy_pruned"] == other["accuracy"]
    assert record["train_loss"] is not None
    assert files["weights.safetensors"] != expected["weights.safetensors"]


def test_movement_needs_fine_tuning_in_each_round() -> None:
    with pytest.raises(ValueError, match=r'set finetune\.after to "each"'):
        job_of(prune={"criterion": "movement"}, finetune={"after": "last"})


def test_a_layer_held_back_is_recorded() -> None:
    job = job_of(prune={"layer_max_sparsity": {"conv2.*": 0.1}, "rounds": 1, "sparsity": 0.3})
    record = run(job)[-1][0]
    assert record["held_back"] == ("conv2.weight",)
    layers = {layer["name"]: layer["sparsity"] for layer in record["cost"]["layers"]}
    assert layers["conv2.weight"] <= 0.1


@pytest.fixture(scope="module")
def saved() -> Checkpoint:
    return checkpoint_of(rounds_of("plain", Ranks()), 1)


@pytest.mark.parametrize("name", ["weights", "masks", "state"])
@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_damaged_checkpoint_is_refused(name: str, length: int, saved: Checkpoint) -> None:
    job, workload = case_of("plain")
    damaged = Checkpoint(**(vars(saved) | {name: getattr(saved, name)[:length]}))
    with pytest.raises(StoreError) as caught:
        next(run_rounds(job, workload, Ranks(), resume=damaged))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused_by_name(saved: Checkpoint) -> None:
    job, _ = case_of("plain")
    other = images(lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    with pytest.raises(StoreError, match="does not fit the model at '"):
        next(run_rounds(job, other, Ranks(), resume=saved))


def test_weights_load_without_the_package_also_when_tied(tmp_path: Path) -> None:
    state = last(run_rounds(job_of(), images(), Ranks()))
    plain = ConvNet()
    plain.load_state_dict(load(state.to_files()["weights.safetensors"]))
    for ours, theirs in zip(state.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    tied = SharedWeightNet()
    masks = MaskSet.dense(prunable_parameters(tied))
    files = RoundState(state.record, tied, masks).to_files()
    fresh = SharedWeightNet()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(files["weights.safetensors"])
    load_model(fresh, path)
    assert torch.equal(fresh.first.weight, tied.first.weight)
    assert fresh.second.weight is fresh.first.weight


def last(states: Any) -> RoundState:
    *_, state = states
    return state


def test_a_diverging_network_is_refused_with_the_field_to_lower() -> None:
    job = job_of(pretrain={"learning_rate": 1e30})
    with pytest.raises(PruneError, match=r"pretrain\.learning_rate|test loss"):
        run(job)


def test_a_job_is_checked_against_the_model_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"conv1\.weight"):
        check_job(job_of(prune={"granularity": "2:4", "sparsity": 0.5}), images())
    with pytest.raises(ConfigError, match=r"prune\.exclude = 'no_such'"):
        check_job(job_of(prune={"exclude": ["no_such"]}), images())
    with pytest.raises(ConfigError, match=r"prune\.sparsity = 0\.75: .*'conv2\.weight' 57 of 576"):
        check_job(job_of(prune={"layer_max_sparsity": {"conv2.*": 0.1}}), images())


def test_a_factory_without_a_network_is_refused_on_every_path() -> None:
    workload = images(lambda: None)
    for run_it in (
        lambda: check_job(job_of(), workload),
        lambda: next(run_rounds(job_of(), workload, Ranks())),
    ):
        with pytest.raises(WorkloadError, match=r"build_model returned NoneType.*nn\.Module"):
            run_it()


def test_costs_agree_with_a_count_by_hand() -> None:
    """conv1: 2 to 8 channels, 3x3, 6x6 outputs; conv2: 8 to 8, 4x4 outputs; head: 32 to 3."""
    model = ConvNet().eval()
    macs = count_macs(model, torch.zeros(1, 2, 6, 6))
    by_hand = {
        "conv1": 8 * 2 * 9 * 36,
        "conv2": 8 * 8 * 9 * 16,
        "head": 32 * 3,
    }
    assert macs.by_parameter == {f"{name}.weight": number for name, number in by_hand.items()}
    assert macs.total == sum(by_hand.values())
    units = prunable_parameters(model)
    with torch.no_grad():
        model.conv2.weight[:4] = 0
    cost = measure(model, units, macs)
    assert cost.num_parameters == 8 * 18 + 8 + 8 * 72 + 2 * 16 + 96 + 3
    assert cost.macs - cost.macs_nonzero == by_hand["conv2"] // 2
    assert cost.sparsity == pytest.approx(288 / (144 + 576 + 96))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert cost.num_bytes == 4 * cost.num_parameters + buffers
    assert cost.num_bytes_sparse == cost.num_bytes - 4 * 288 + (144 + 576 + 96) // 8


def test_a_module_used_twice_costs_twice_and_counts_once() -> None:
    model = SharedWeightNet()
    macs = count_macs(model, torch.zeros(1, 3))
    cost = measure(model, prunable_parameters(model), macs)
    assert cost.num_parameters == 9
    assert cost.macs == 18


def test_derived_seeds_decide_the_model() -> None:
    with seeded(derive_seed(0, "model")):
        expected = ConvNet()
    state = next(run_rounds(job_of(pretrain={"epochs": 0}), images(), Ranks()))
    assert torch.equal(state.model.conv1.weight, expected.conv1.weight)


def test_regression_without_classes_runs_too() -> None:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    workload = regression(lambda: nn.Linear(4, 2), inputs, inputs[:, :2] * 2)
    job = job_of(prune={"sparsity": 0.5, "rounds": 1})
    assert last(run_rounds(job, workload, Ranks())).record.sparsity == 0.5
