"""Networks that do what most do not end alike on two ranks and in shards, or are refused alike."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from rank_program import reports_of_world
from unusual_program import CASES, UNSHARDABLE, bits, case_of, outcome, unusual_program

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import GbpError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.network import network_of_seed

# By hand: of 8 inputs, in 5 steps where there is a sequence, to 6 or 8 and then to 4.
LAYERS = 8 * 6 + 6 * 4
ATTENTION = 5 * 8 * 24 + 5 * 8 * 8 + 2 * (5 * 5 * 8)
MACS = {
    **dict.fromkeys(CASES, LAYERS),
    "attention": ATTENTION + 8 * 4,
    "encoder": 2 * (ATTENTION + 2 * (5 * 8 * 64)) + 8 * 4,
    "lstm": 5 * 4 * 6 * (8 + 6) + 6 * 4,
    "lstm with projections": 5 * 4 * 6 * (8 + 3 + 3 + 3) + 5 * 2 * (6 * 3) + 3 * 4,
    "gru": 5 * 3 * 6 * (8 + 6) + 6 * 4,
    "rnn": 5 * 6 * (8 + 6) + 6 * 4,
    "cell": 5 * 4 * 6 * (8 + 6) + 6 * 4,
    # Forward, and back to the inputs.
    "differentiates": 2 * LAYERS,
    "chooses": LAYERS + 2 * (6 * 90),
    "hides products": 0,
    # u W v
    "spectral norm": LAYERS + 4 * 6 + 4,
    "old spectral norm": LAYERS + 4 * 6 + 4,
    # A square matrix times four reflections.
    "orthogonal": LAYERS + 6 * 6 * 4,
    "tied to an embedding": 8 * 8 + 8 * 12,
    "words, pruned": 8 * 12,
    "only gru, pruned": 5 * 3 * 4 * (8 + 4),
    "weight norm, pruned": LAYERS,
    "old spectral norm, pruned": LAYERS + 4 * 6 + 4,
    # Outputs are 4 x 6, 6 x 2 x 7 and 4 x 1 x 6; the turned one counts by its 4 x 6 inputs.
    "convolutions": 4 * 6 * 5 * 3 + 4 * 6 * 3 * 4 + 4 * 6 * 3 * 4 + 4 * 4,
}
MACS |= {f"{n}, pruned": MACS[n] for n in ("attention", "lstm with projections", "gru", "cell")}
GROWS = "buffer 'peak' has shape (8,) after a forward pass and (0,) before it; give it its shape"
REFUSED = {
    "only gru": "ConfigError: workload.factory: the network has nothing to prune: ",
    "weight norm not excluded": "PruneError: 'b.weight': is computed from other tensors ",
    "complex not excluded": "PruneError: 'wave.weight': is of torch.complex64, and criteria rank ",
}
LEFT_OUT = "some passes leave out layers that others go through"
IN_SHARDS = {
    "chooses": LEFT_OUT,
    "complex": "cannot spread this network over workers (AssertionError: FSDP expects uniform",
    "scalar": "cannot spread this network over workers (ValueError: fully_shard doesn't support",
    "empty": "'side.weight' has no elements, and FSDP2 cannot spread that",
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one rank makes of each case."""
    return {name: outcome(name, Ranks()) for name in CASES}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each of two ranks makes of each case, in one piece and in shards."""
    return reports_of_world(2, tmp_path_factory.mktemp("pair"), unusual_program)


@pytest.mark.parametrize("strategy", ["replicated", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_a_trial_ends_alike_on_two_ranks(
    name: str, strategy: str, alone: dict[str, Any], pair: list[dict[tuple[str, str], Any]]
) -> None:
    if strategy == "fsdp" and name in UNSHARDABLE:
        pytest.skip("FSDP2 cannot spread it")
    for report in pair:
        assert report[name, strategy] == alone[name]


def test_ranks_that_went_through_other_layers_record_nothing(
    pair: list[dict[tuple[str, str], Any]],
) -> None:
    """Each had rows of one block for those of another."""
    for report in pair:
        told = report["chooses", "fsdp"]
        assert told.startswith(f"PruneError: cluster.strategy = fsdp: {LEFT_OUT}")


def test_what_cannot_be_trained_is_refused_by_name(alone: dict[str, Any]) -> None:
    refused = {name: told for name, told in alone.items() if isinstance(told, str)}
    assert refused.pop("grows").startswith(f"PruneError: {GROWS}")
    assert refused.keys() == REFUSED.keys()
    for name, told in refused.items():
        assert told.startswith(REFUSED[name])


@pytest.mark.parametrize("name", CASES)
def test_a_job_is_refused_before_training_for_the_same_on_any_workers(name: str) -> None:
    told = []
    for cluster in (
        {"num_workers": 0},
        {"num_workers": 2},
        {"num_workers": 2, "strategy": "fsdp"},
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                check_job(*case_of(name, **cluster))
                told.append("")
            except GbpError as error:
                told.append(f"{type(error).__name__}: {error}")
        told[-1] += " / ".join(str(warning.message) for warning in caught)
    assert told[0] == told[1]
    if name in IN_SHARDS:
        assert "Error" not in told[0]
        assert told[2].startswith(f"ConfigError: cluster.strategy = fsdp: {IN_SHARDS[name]}")
        assert ("(as to 'blocks.0', 'blocks.1')" in told[2]) == (name == "chooses")
        return
    assert told[2] == told[0]
    assert told[0].startswith(REFUSED.get(name, ""))


def test_products_are_those_counted_by_hand(alone: dict[str, Any]) -> None:
    counted = {name: rounds for name, rounds in alone.items() if not isinstance(rounds, str)}
    for name, rounds in counted.items():
        for cost in (state["record"]["cost"] for state in rounds):
            assert cost["macs"] == MACS[name], name
            assert bool(cost["macs_fault"]) == (name == "hides products")
    assert "_trilinear" in counted["hides products"][0]["record"]["cost"]["macs_fault"]


def test_layers_that_a_job_includes_lose_weights_with_the_rest(alone: dict[str, Any]) -> None:
    for name in (name for name in CASES if name.endswith(", pruned")):
        cost = alone[name][-1]["record"]["cost"]
        layers = {layer["name"]: layer for layer in cost["layers"]}
        added = layers.keys() - {"head.weight", "a.weight", "attention.out_proj.weight"}
        assert added, name
        assert not any("include" in reason for _, reason in cost["unpruned"].values()), name
        total = sum(layer["num_weights"] for layer in layers.values())
        assert sum(layer["num_nonzero"] for layer in layers.values()) == total - (total + 1) // 2
        lost = 0
        for layer in added:
            found = value_of(alone[name][-1], layer)
            assert np.count_nonzero(found) == layers[layer]["num_nonzero"]
            lost += found.size - np.count_nonzero(found)
        assert lost > 0


def value_of(found: dict[str, Any], name: str) -> np.ndarray:
    dtype, shape, data = found["tensors"][name]
    return np.frombuffer(data, dtype).reshape(shape)


def test_buffers_hold_what_four_steps_of_twelve_examples_leave(alone: dict[str, Any]) -> None:
    last = alone["observes"][-1]
    assert {name: value_of(last, name).tolist() for name in ("seen", "calls", "place")} == {
        "seen": 48,
        "calls": 4,
        "place": [1],
    }
    table = np.array([[0, 2, 2, 2], [0, 1, 1, 1], [0, 1, 1, 1]])
    assert np.array_equal(value_of(last, "table"), table)
    assert value_of(last, "table").dtype == np.uint8
    assert value_of(last, "queue.is_ready")
    assert -math.inf < value_of(last, "low") < value_of(last, "high") < math.inf
    assert value_of(alone["norm"][-1], "1.num_batches_tracked") == 4


def test_what_no_pass_uses_keeps_its_bits(alone: dict[str, Any]) -> None:
    job, workload = case_of("spare layers")
    spare = network_of_seed(workload, job.seed)[0].get_parameter("spare.weight").detach()
    for state in alone["spare layers"]:
        assert state["tensors"]["spare.weight"] == bits(spare)
        unpruned = {
            name: (size, "no pass reaches it") for name, size in (("spare", 25), ("aux", 32))
        }
        cost = state["record"]["cost"]
        assert cost["unpruned"] == {f"{name}.weight": reason for name, reason in unpruned.items()}
        assert {layer["name"] for layer in cost["layers"]} == {"a.weight", "b.weight", "odd.weight"}


def test_listing_what_is_prunable_leaves_a_spectral_norm_as_it_was() -> None:
    case = CASES["spectral norm"]
    model = case.build()
    before = {name: bits(buffer) for name, buffer in model.named_buffers()}
    assert [unit.name for unit in prunable_parameters(model, case.exclude)] == ["a.weight"]
    assert {name: bits(buffer) for name, buffer in model.named_buffers()} == before != {}
