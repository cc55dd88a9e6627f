from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_program import hard_masks, reports_of_world
from sharded_program import (
    DATA,
    RESNET_CASES,
    TrialProgram,
    blocks_program,
    failing_program,
    resnet_masks,
    resnet_program,
)
from small_networks import BlockNet, draw
from techniques import checkpoint_of, rounds_of, without_files
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from gbp_ray.distributed.gathering import unsharded_in_turn
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole, shard_network
from gbp_ray.pruning.checkpoint import SHARDS, Checkpoint
from gbp_ray.training.network import distinct_state

World = list[dict[str, Any]]


@pytest.fixture(scope="module")
def resnet_alone() -> dict[tuple[str, str, str], str]:
    if not (DATA / "checkpoints").is_dir():
        pytest.skip(f"no CIFAR-10 and checkpoints under '{DATA}'; set GBP_RAY_DATA to their folder")
    return resnet_masks(Ranks.current(), is_sharded=False)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_masks_of_a_sharded_resnet_are_those_of_a_replicated_one(
    world_size: int,
    resnet_alone: dict[tuple[str, str, str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    reports = reports_of_world(world_size, tmp_path_factory.mktemp("resnet"), resnet_program)
    hard = {tuple(report["hard masks"]) for report in reports if "hard masks" in report}
    assert hard == ({tuple(hard_masks(Ranks()))} if world_size % 2 else set())
    for case in RESNET_CASES:
        assert {report["masks"][case] for report in reports} == {resnet_alone[case]}, case


def test_the_resnet_cases_differ(resnet_alone: dict[tuple[str, str, str], str]) -> None:
    """Only snip decides like taylor, on purpose, and a whole pattern leaves scopes no choice.

    Along the inputs of one output kfac and obs differ by a factor, so patterns are the same.
    """
    num_rules = len({rule for rule, *_ in RESNET_CASES}) - 1
    assert len(set(resnet_alone.values())) == num_rules * (2 + 1 + 1) - 2
    for pattern in ("2:4", "1:4"):
        assert len({resnet_alone[rule, "global", pattern] for rule in ("kfac", "obs")}) == 1


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> World:
    return reports_of_world(2, tmp_path_factory.mktemp("blocks"), blocks_program)


def test_each_rank_holds_its_rows_alone(blocks: World) -> None:
    for report, outputs in zip(blocks, (2, 1), strict=True):
        assert report["are shards"]
        assert report["rows"]["blocks.0.first.weight"] == (24, 24)
        assert report["rows"]["head.weight"] == (outputs, 24)


def test_bits_are_gathered_alike_alone_and_together(blocks: World) -> None:
    for report in blocks:
        assert report["gathered bits"] == {1: True, 2000: True, 2**27: True}


def test_blocks_are_groups_but_for_those_that_share_a_weight(blocks: World) -> None:
    for report in blocks:
        assert report["groups"] == ["", "blocks.0", "blocks.2", "blocks.4"]


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Any]]:
    """The trial that all others must end like."""
    return rounds_of("in blocks", Ranks())


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same trial in shards of two ranks."""
    return go_on(2, tmp_path_factory)


def go_on(
    size: int, factory: pytest.TempPathFactory, resume: Checkpoint | None = None
) -> list[dict[str, Any]]:
    reports = reports_of_world(size, factory.mktemp("resumed"), TrialProgram(resume))
    assert all(without_files(r["rounds"]) == without_files(reports[0]["rounds"]) for r in reports)
    rounds: list[dict[str, Any]] = reports[0]["rounds"]
    return rounds


class _Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._folder,)


def test_shards_are_read_back_onto_any_number_of_ranks(
    whole: list[dict[str, Any]],
    spread: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert without_files(spread) == without_files(whole)
    names = {name for name in spread[1]["files"] if name.startswith("shards/")}
    assert names == {f"shards/shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    saved = checkpoint_of(spread, 1)
    # Onto three ranks, onto one replicated network, and from a replicated one onto two ranks.
    assert without_files(go_on(3, tmp_path_factory, saved)) == without_files(whole[2:])
    mark = tmp_path_factory.mktemp("pickle") / "ran"
    pickled = pickle.dumps(_Runs(str(mark)))
    # As torch.distributed.checkpoint keeps what it knows of shards in other formats.
    laced = {**saved.shards, ".metadata": pickled, "__0_0.distcp": pickled}
    again = rounds_of("in blocks", Ranks(), resume=replace(saved, shards=laced))
    assert without_files(again) == without_files(whole[2:])
    assert not mark.exists()
    from_one = go_on(2, tmp_path_factory, checkpoint_of(whole, 1))
    assert without_files(from_one) == without_files(whole[2:])


def test_shards_of_one_rank_are_written_and_read_like_those_of_more(
    whole: list[dict[str, Any]], spread: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In this very process, where what it runs through is seen."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        ranks = Ranks.current()
        one = rounds_of("in blocks", ranks, "fsdp")
        rest = rounds_of("in blocks", ranks, "fsdp", checkpoint_of(spread, 1))
        masks = hard_masks(ranks, is_sharded=True)
    finally:
        dist.destroy_process_group()
    assert without_files(one) == without_files(whole)
    assert without_files(rest) == without_files(whole[2:])
    assert masks == hard_masks(Ranks())
    assert any(name.startswith(SHARDS) for name in one[1]["files"])


def test_weights_are_gathered_while_a_pass_is_in_their_group_and_written_back(
    tmp_path: Path,
) -> None:
    plain, inputs = BlockNet(is_tied=False).eval(), draw(3, 18 * 4)
    model = copy.deepcopy(plain)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        shard_network(model, torch.device("cpu"), 1)
        gathered: list[list[int]] = []
        with unsharded_in_turn(model) as network, torch.no_grad():
            blocks = list(network.blocks)

            def look(block: nn.Module, given: object) -> None:
                gathered.append([n for n, b in enumerate(blocks) if not b.first.weight.is_meta])
                if block is blocks[2]:
                    block.first.weight.mul_(2)

            for block in blocks:
                block.register_forward_pre_hook(look)
            outputs = network(inputs)
        with torch.no_grad():
            plain.blocks[2].first.weight.mul_(2)
        assert gathered == [[0], [1], [2], [3], [4]]
        assert torch.equal(outputs, plain(inputs))
        for name, parameter in model.named_parameters():
            assert torch.equal(gather_whole(parameter.detach()), plain.get_parameter(name)), name
    finally:
        dist.destroy_process_group()


def test_exported_files_of_shards_are_those_of_a_replicated_network(
    whole: list[dict[str, Any]], spread: list[dict[str, Any]]
) -> None:
    for expected, found in zip(whole, spread, strict=True):
        for name in ("weights.safetensors", "masks.safetensors"):
            assert found["files"][name] == expected["files"][name]


def test_a_rank_that_fails_alone_hangs_up_on_the_others(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every rank went on to report, so none was left waiting for the lost one's weights."""
    others, last = reports_of_world(2, tmp_path_factory.mktemp("failing"), failing_program)
    assert last["failed with"] == "ZeroDivisionError: planted"
    assert others["failed with"].startswith("RuntimeError")


# -- more ranks than rows --------------------------------------------------------------------------


class TiedNet(nn.Module):
    """Two layers of five rows share a weight: of four ranks the last holds none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 10)
        self.second.weight = self.first.weight


def test_all_ranks_see_the_same_ties_whatever_rows_they_hold() -> None:
    """They gather tensor after tensor, so one that lists a tied weight twice is left alone."""
    listed = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            model = TiedNet()
            shard_network(model, torch.device("cpu"), 4)
            listed.append(list(distinct_state(model)))
        finally:
            dist.destroy_process_group()
    assert all(names == listed[0] for names in listed)
    assert "second.weight" not in listed[0]
    assert "second.bias" in listed[0]
