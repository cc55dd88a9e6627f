"""Whole units of a network in memory: masked as a job does, then taken out by `gbp_ray.compact`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import ConvNet, built, images, job_config
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from unit_rounds import Attending

import gbp_ray
from gbp_ray.distributed.ranks import Ranks, fixed_kernels
from gbp_ray.errors import GbpError
from gbp_ray.pruning.masks import read_masks_at
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.passes import count_macs
from gbp_ray.workloads.data import derive_seed

EXAMPLES = {"calibration_examples": 30, "calibration_batch_size": 8}
DATA = images().train
HALF = {"granularity": "channel", "target": {"macs": 0.5}}


def network(build: Callable[[], nn.Module] = ConvNet) -> nn.Module:
    """Builds the network as a job under seed 3 does."""
    return built(build, derive_seed(3, "model"))


def round_of_job(build: Callable[[], nn.Module] = ConvNet, **prune: Any) -> Any:
    """Returns the first round of a job that trains nothing."""
    off = {"pretrain": {"epochs": 0}, "finetune": {"epochs": 0}}
    fields = {**EXAMPLES, "batchnorm_examples": 0, "sparsity": 0.0, **prune}
    job = job_config(seed=3, prune=fields, **off)
    workload = dataclasses.replace(images(build), augment=None)
    with fixed_kernels(1):
        *_, last = run_rounds(job, workload, Ranks())
    return last


def prune(model: nn.Module, data: Any = DATA, **fields: Any) -> gbp_ray.MaskSet:
    return gbp_ray.prune_model(model, data, **{"seed": 3, **EXAMPLES, **HALF, **fields})


def outputs_of(model: nn.Module, inputs: Tensor = DATA[0]) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gate": (ConvNet, {**HALF, "criterion": "taylor_squared"}),
    "example": (ConvNet, {**HALF, "criterion": "fisher", "round_to": 2}),
    "sum": (ConvNet, {**HALF, "criterion": "taylor", "unit_score": "sum", "min_width": 3}),
    "norm": (
        ConvNet,
        {"granularity": "channel", "sparsity": 0.5, "criterion": "magnitude", "scope": "layer"},
    ),
    "drawn": (ConvNet, {"granularity": "channel", "sparsity": 0.4, "criterion": "random"}),
    "bound": (
        ConvNet,
        {**HALF, "criterion": "taylor", "layer_max_sparsity": {"conv1.*": 0.2}},
    ),
    "heads": (
        Attending,
        {"granularity": "channel+head", "target": {"parameters": 0.6}, "criterion": "taylor"},
    ),
    "zeros": (Attending, {"granularity": "head", "target": {"bytes": 0.9}, "criterion": "taylor"}),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_a_job_and_the_network_shrinks_as_its_did(name: str) -> None:
    build, fields = CASES[name]
    wanted = round_of_job(build, **fields)
    model = network(build)
    found = prune(model, **{"target": None, **fields})
    assert found == wanted.masks
    assert (found.round, found.parent) == (1, wanted.masks.parent)
    assert found.criterion == fields["criterion"]
    assert found.find_revived(model) is None
    masked = copy.deepcopy(model)
    result = gbp_ray.compact(model, found, DATA)
    units = wanted.record.cost.units
    assert (result.macs, result.num_parameters) == (units.macs, units.num_parameters)
    assert result.difference == units.difference
    others = set(result.widths) - set(units.widths)
    assert len(result.widths) - len(units.widths) == len(others)
    assert all(width.num_kept == width.num_units for width in others), "of other kinds"
    assert result.macs == count_macs(model, DATA[0][:1]).total
    assert result.macs_before == count_macs(masked, DATA[0][:1]).total
    assert result.num_parameters == sum(p.numel() for p in model.parameters())
    assert result.num_parameters_before == sum(p.numel() for p in masked.parameters())
    torch.testing.assert_close(outputs_of(model), outputs_of(masked), rtol=1e-5, atol=1e-6)


def test_a_network_trained_with_masks_and_adam_goes_on_smaller_and_alike() -> None:
    """The masked twin trains on beside it: the optimizer's state was cut with the weights."""
    model = network()
    masks = prune(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: Any, masks: gbp_ray.MaskSet | None) -> None:
        for _ in range(4):
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(DATA[0]), DATA[1]).backward()
            optimizer.step()
            if masks is not None:
                masks.apply_(model)

    def without_dropout(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    train(without_dropout(model), optimizer, masks)
    twin = copy.deepcopy(model)
    twins = torch.optim.Adam(twin.parameters(), lr=0.01)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    result = gbp_ray.compact(model, masks, DataLoader(TensorDataset(*DATA)), optimizer=optimizer)
    assert result.difference <= 1e-5
    assert 0 < result.macs <= 0.5 * result.macs_before
    assert result.attributes["conv1.out_channels"] == model.conv1.weight.shape[0]
    torch.testing.assert_close(outputs_of(model), outputs_of(twin), rtol=1e-5, atol=1e-6)
    train(model, optimizer, None)
    train(twin, twins, masks)
    torch.testing.assert_close(outputs_of(model), outputs_of(twin), rtol=1e-4, atol=1e-5)
    assert repr(result).startswith("<CompactResult ")
    assert f"{result.num_parameters_before:,} -> {result.num_parameters:,} par" in repr(result)


def test_masks_of_a_round_remove_from_a_network_with_its_weights(tmp_path: Path) -> None:
    state = round_of_job(criterion="taylor_squared", compact=False, **HALF)
    file = tmp_path / "masks.safetensors"
    file.write_bytes(state.masks.to_bytes())
    inputs = DATA[0]
    wanted = outputs_of(state.model)
    for masks in (read_masks_at(str(file)), gbp_ray.MaskSet.from_bytes(file.read_bytes())):
        model = network()
        model.load_state_dict(state.model.state_dict())
        # One batch of inputs is enough.
        result = gbp_ray.compact(model, masks, inputs)
        assert result.widths == state.record.cost.units.widths
        torch.testing.assert_close(outputs_of(model), wanted, rtol=1e-5, atol=1e-6)


def test_more_units_go_in_a_second_call_and_all_leave_at_once() -> None:
    model = network()
    first = prune(model, target={"macs": 0.8})
    second = prune(model, masks=first)
    assert (second.round, second.parent) == (2, first.digest)
    assert all((second[name] <= first[name]).all() for name in first)
    assert second.sparsity > first.sparsity
    result = gbp_ray.compact(model, second, DATA)
    assert result.macs <= 0.5 * result.macs_before


class Named(nn.Module):
    """Takes a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(pixels)}


@pytest.mark.parametrize("kind", ["compiled", "DataParallel", "dict", "list", "forward"])
def test_wrappers_and_batches_of_every_kind(kind: str) -> None:
    plain = network(Named)
    items = [{"pixels": x, "labels": y} for x, y in zip(*DATA, strict=True)]
    fields = {
        "forward": lambda model, batch: model(batch["pixels"]),
        "loss": lambda outputs, batch: functional.cross_entropy(outputs["logits"], batch["labels"]),
    }
    masks = prune(plain, items, **fields)
    wanted = outputs_of(plain, DATA[0])["logits"]
    model: nn.Module = plain
    batch: Any = {"pixels": DATA[0]}
    more: dict[str, Any] = {}
    if kind == "compiled":
        model = torch.compile(plain, backend="eager")
        model(DATA[0])
    elif kind == "DataParallel":
        model = nn.DataParallel(plain)
    elif kind == "list":
        batch = [DATA[0], DATA[1]]
    elif kind == "forward":
        batch, more = items, {"forward": fields["forward"]}
    result = gbp_ray.compact(model, masks, batch, **more)
    assert result.macs <= 0.5 * result.macs_before
    torch.testing.assert_close(outputs_of(model)["logits"], wanted, rtol=1e-5, atol=1e-6)


def test_masks_that_keep_everything_remove_nothing() -> None:
    model = network()
    masks = prune(model, target=None, sparsity=0.0)
    before = copy.deepcopy(model.state_dict())
    result = gbp_ray.compact(model, masks, DATA)
    assert (result.difference, result.attributes) == (0.0, {})
    assert result.macs == result.macs_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    file = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_network_in_shards_is_refused_by_name(one_rank: None) -> None:
    masks = prune(network())
    model = fully_shard(network())
    before = {n: v.clone() for n, v in get_model_state_dict(model).items()}
    for call in (
        lambda: prune(model),
        lambda: gbp_ray.compact(model, masks, DATA),
        lambda: gbp_ray.Pruner(model, end=1, **HALF),
    ):
        with pytest.raises(GbpError, match=r"^model: is sharded by fully_shard, and .* in one "):
            call()
    assert all(torch.equal(v, before[n]) for n, v in get_model_state_dict(model).items())


def test_a_ddp_that_holds_parameters_that_are_gone_refuses_to_train(one_rank: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(network())
    masks = prune(wrapped)
    masked = outputs_of(wrapped.module)
    gbp_ray.compact(wrapped, masks, DATA)
    torch.testing.assert_close(outputs_of(wrapped), masked, rtol=1e-5, atol=1e-6)
    with pytest.raises(GbpError, match=r"^model: this DistributedDataParallel was made before "):
        wrapped.train()(DATA[0])
    again = nn.parallel.DistributedDataParallel(wrapped.module)
    functional.cross_entropy(again(DATA[0]), DATA[1]).backward()


# -- what cannot be right --------------------------------------------------------------------------


class Stiff(nn.Module):
    """Its code knows the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(72, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1))
        assert hidden.shape[1] == 8
        return self.head(self.second(hidden).relu())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sparsity": ({"target": None}, "sparsity: "),
    "weights": (
        {"granularity": "weight"},
        "target.macs = 0.5: is met by removing whole units, not with granularity = ",
    ),
    "kind": ({"granularity": "chanel"}, "granularity = 'chanel': must be "),
    "target": ({"target": {"flops": 0.5}}, "target.flops: "),
    "targets": ({"target": {"macs": 0.5, "bytes": 0.5}}, "target"),
    "both": ({"target": {"sparsity": 0.5}, "sparsity": 0.4}, "target.sparsity = 0.5: contradicts "),
    "no heads": ({"granularity": "head"}, "granularity = 'head': the network has no such units "),
    "no data": (
        {"data": None, "criterion": "magnitude"},
        "data: granularity = 'channel' finds units by passing an example through the network; ",
    ),
    "shapes": (
        {"data": (DATA[0].flatten(1), DATA[1]), "criterion": "magnitude"},
        "data: a pass of 8 examples failed with ",
    ),
    "too little": ({"target": {"macs": 0.001}}, "target.macs: allows "),
    "too much": ({"target": {"macs": 1e12}}, "target.macs = 1e+12: is more than the "),
    "idle": (
        {"granularity": "weight", "target": None, "sparsity": 0.5, "round_to": 8},
        "round_to: is of whole units, and granularity = 'weight' has none; ",
    ),
    "include": ({"include": ("conv1.bias",)}, "include: is of single weights, and granularity = "),
    "exclude": ({"exclude": "konv1.*"}, "exclude = 'konv1.*': matches no parameter, did you mean "),
    "masks": ({"masks": 3}, "masks: must be a MaskSet, as prune_model returns, not int"),
    "glob": ({"layer_max_sparsity": {"konv*": 0.5}}, "layer_max_sparsity.'konv*': matches no "),
    "movement": ({"criterion": "movement"}, "criterion = movement: is gathered while "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_of_units_that_cannot_be_right_are_refused(name: str) -> None:
    fields, text = REFUSED[name]
    model = network(fields.get("model", ConvNet))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GbpError) as caught:
        prune(model, **{k: v for k, v in fields.items() if k != "model"})
    told = str(caught.value)
    assert told.startswith(text), told
    assert "\n" not in told
    assert "prune." not in told
    assert "workload." not in told
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_units_that_the_code_of_a_network_cannot_go_without_stay_and_are_named() -> None:
    model = network(Stiff)
    masks = prune(model, target=None, sparsity=0.5)
    assert "first.weight" not in masks
    assert "without its removed units it fails with" in masks.unpruned["first.weight"][1]


class Deciding(nn.Module):
    """Goes one way or another by the values of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(72, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1)).relu()
        return self.head(hidden * 2 if hidden.mean().item() > 9 else hidden)


def test_a_network_that_cannot_be_followed_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(GbpError, match=r"torch\.export cannot follow this network") as caught:
        prune(network(Deciding))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_masks_of_units_below_those_of_a_call_before_are_refused() -> None:
    model = network()
    masks = prune(model)
    with pytest.raises(GbpError, match=r"^target.macs = 0.9: leaves .*, masks .*, and masks only"):
        prune(model, target={"macs": 0.9}, masks=masks)


def test_score_and_select_are_of_weights_only() -> None:
    for call in (
        lambda: gbp_ray.score(network(), DATA, granularity="channel"),
        lambda: gbp_ray.select({"a": torch.ones(3, 3)}, sparsity=0.5, granularity="head"),
    ):
        with pytest.raises(GbpError, match=r"^granularity = '\w+': \w+\(\) is of single weights"):
            call()


def test_masks_that_remove_no_whole_units_are_refused_and_change_nothing() -> None:
    model = network()
    masks = prune(model)
    mixed = {name: mask.clone() for name, mask in masks.items()}
    cut = [name for name, mask in masks.items() if not mask.all()]
    mixed[cut[0]][:] = True
    partial = {name: mask for name, mask in masks.items() if name != cut[-1]}
    assert len(cut) > 2
    of_weights = gbp_ray.prune_model(network(), DATA, sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    for wrong in (gbp_ray.MaskSet(mixed), gbp_ray.MaskSet(partial), of_weights):
        of_wrong = copy.deepcopy(model)
        wrong.apply_(of_wrong)
        with pytest.raises(GbpError, match=r"^mask of '.*': removes weights, but no whole units "):
            gbp_ray.compact(of_wrong, wrong, DATA)
    with pytest.raises(GbpError, match=r"^'.*': has weights other than zero that the masks "):
        gbp_ray.compact(network(), masks, DATA)
    with pytest.raises(GbpError, match=r"^masks: must be a MaskSet, as prune_model returns"):
        gbp_ray.compact(model, dict(masks), DATA)
    with pytest.raises(GbpError, match=r"^masks: that of '.*' has shape .* and the network has "):
        gbp_ray.compact(network(Attending), masks, DATA)
    with pytest.raises(GbpError, match=r"^data: a pass of 8 examples failed with "):
        gbp_ray.compact(model, masks, DATA[0][:, :, :2].flatten(1))
    with pytest.raises(GbpError, match=r"^optimizer: must be a torch.optim.Optimizer, not int"):
        gbp_ray.compact(model, masks, DATA, optimizer=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gbp_ray.compact(model, masks, DATA)
    with pytest.raises(GbpError, match="give the dense network, from which no unit has left"):
        gbp_ray.compact(model, masks, DATA)


def test_a_network_that_cannot_shrink_keeps_its_zeros() -> None:
    model = network(Stiff)
    masks = prune(model, compact=False)
    before = outputs_of(model)
    with pytest.raises(GbpError, match="keep its units as zeros, or prune again with the layer"):
        gbp_ray.compact(model, masks, DATA)
    assert torch.equal(outputs_of(model), before)
