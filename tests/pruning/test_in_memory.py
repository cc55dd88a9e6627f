"""A network in memory: its masks are a job's to the bit, and nothing else of it changes."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import ConvNet, Tagger, built, draw, images, job_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import gbp_ray
from gbp_ray.config.criteria import CRITERIA
from gbp_ray.distributed.ranks import Ranks, fixed_kernels
from gbp_ray.errors import GbpError
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload

EXAMPLES = {"calibration_examples": 30, "calibration_batch_size": 8}
PLAIN = dataclasses.replace(images(), augment=None)
IN_MEMORY = [name for name, spec in CRITERIA.items() if not spec.needs_history]


def network() -> nn.Module:
    """Builds the network as a job under seed 3 does."""
    from gbp_ray.workloads.data import derive_seed

    return built(ConvNet, derive_seed(3, "model"))


def masks_of_job(workload: Workload = PLAIN, **prune: Any) -> list[gbp_ray.MaskSet]:
    """Runs the rounds of a job that trains nothing; returns the masks after each."""
    off = {"pretrain": {"epochs": 0}, "finetune": {"epochs": 0}}
    fields = {**EXAMPLES, "batchnorm_examples": 0, **prune}
    job = job_config(seed=3, prune=fields, **off)
    with fixed_kernels(1):
        return [state.masks for state in run_rounds(job, workload, Ranks())][1:]


@pytest.mark.parametrize(
    ("criterion", "fields"),
    [
        *((name, {"sparsity": 0.8}) for name in IN_MEMORY),
        ("taylor", {"sparsity": 0.8, "scope": "layer"}),
        ("taylor", {"sparsity": 0.5, "granularity": "2:4", "exclude": ["conv1.*"]}),
        ("fisher", {"sparsity": 0.7, "scope": "layer", "layer_max_sparsity": {"head*": 0.7}}),
        ("obd", {"sparsity": 0.8, "hutchinson_probes": 2}),
        ("kfac", {"sparsity": 0.8, "reconstruct_positions": 5}),
    ],
)
def test_the_mask_is_that_of_a_job(criterion: str, fields: dict[str, Any]) -> None:
    (wanted,) = masks_of_job(criterion=criterion, **fields)
    model = network()
    given = {"criterion": criterion, "seed": 3, **EXAMPLES}
    found = gbp_ray.prune_model(model, PLAIN.train, **given, **fields)
    assert found == wanted
    assert (found.round, found.parent, found.criterion) == (1, wanted.parent, criterion)
    assert found.find_revived(model) is None
    read = ("exclude", "hutchinson_probes", "reconstruct_positions")
    of_scores = {k: v for k, v in fields.items() if k in read}
    scores = gbp_ray.score(network(), PLAIN.train, **given, **of_scores)
    choice = {k: v for k, v in fields.items() if k not in of_scores}
    selected = gbp_ray.select(scores, **choice)
    assert selected == wanted
    assert (selected.criterion, selected.unpruned) == (criterion, found.unpruned)


def test_taylor_is_what_plain_torch_computes() -> None:
    inputs, targets = PLAIN.train
    model = network().eval()
    functional.cross_entropy(model(inputs), targets).backward()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    wanted = {name: (p * p.grad).abs().detach() for name, p in weights.items()}
    scores = gbp_ray.score(network(), PLAIN.train, calibration_batch_size=7)
    assert scores.keys() == wanted.keys()
    for name, values in scores.items():
        assert values.dtype is torch.float32
        torch.testing.assert_close(values, wanted[name], rtol=1e-4, atol=1e-9)
    flat = torch.cat([scores[name].reshape(-1) for name in sorted(scores)])
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.sort(stable=True).indices[: round(0.8 * len(flat))]] = False
    assert torch.equal(gbp_ray.select(scores, sparsity=0.8).flat(), kept)
    assert torch.equal(gbp_ray.select(dict(scores), sparsity=0.8).flat(), kept)


class Items:
    """The examples as dicts, one by one."""

    def __len__(self) -> int:
        return len(PLAIN.train[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": PLAIN.train[0][index], "labels": PLAIN.train[1][index]}


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*PLAIN.train), batch_size=5, **options)


@pytest.mark.parametrize(
    ("make", "functions"),
    [
        (lambda: TensorDataset(*PLAIN.train), {}),
        (lambda: tuple(column.numpy() for column in PLAIN.train), {}),
        (loader, {}),
        (lambda: loader(shuffle=True, drop_last=True), {}),
        (
            Items,
            {
                "forward": lambda model, batch: model(batch["inputs"]),
                "loss": lambda outputs, batch: functional.cross_entropy(outputs, batch["labels"]),
            },
        ),
        (
            Items,
            {
                "collate": lambda items: (
                    torch.stack([item["inputs"] for item in items]),
                    torch.stack([item["labels"] for item in items]),
                )
            },
        ),
    ],
)
def test_data_may_be_what_a_split_is(make: Callable[[], Any], functions: dict[str, Any]) -> None:
    wanted = gbp_ray.prune_model(network(), PLAIN.train, sparsity=0.8, **EXAMPLES)
    found = gbp_ray.prune_model(network(), make(), sparsity=0.8, **EXAMPLES, **functions)
    assert found == wanted


def test_a_sampler_that_draws_from_some_examples_is_said_to_be_left_out() -> None:
    some = loader(sampler=SubsetRandomSampler(range(9)))
    with pytest.warns(UserWarning, match=r"^data: the DataLoader's SubsetRandomSampler") as caught:
        gbp_ray.score(network(), some, **EXAMPLES)
    assert [warning.filename for warning in caught] == [__file__]


def everything(model: nn.Module) -> dict[str, Any]:
    """Notes all that a call may leave behind, weights apart."""
    return {
        "modes": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "draws": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
        "threads": torch.get_num_threads(),
        "gradients are on": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("criterion", IN_MEMORY)
def test_nothing_else_of_the_network_changes(criterion: str) -> None:
    model = network()
    model(draw(4, 2, 6, 6)).sum().backward()
    model.conv2.eval()
    model.conv1.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    before = everything(model)
    scores = gbp_ray.score(model, PLAIN.train, criterion=criterion, **EXAMPLES)
    after = everything(model)
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, twin.state_dict()[name])
    masks = gbp_ray.prune_model(model, PLAIN.train, sparsity=0.8, criterion=criterion, **EXAMPLES)
    for found in (after, everything(model)):
        gradients = found.pop("gradients")
        assert all(one is other for one, other in zip(gradients, before["gradients"], strict=True))
        for key, value in found.items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert masks == gbp_ray.select(scores, sparsity=0.8)
    for name, weights in model.state_dict().items():
        kept = masks[name] if name in masks else torch.ones_like(weights, dtype=torch.bool)
        assert torch.equal(weights, twin.state_dict()[name].masked_fill(~kept, 0))


def test_a_surrounding_context_changes_no_bit() -> None:
    wanted = gbp_ray.score(network(), PLAIN.train, **EXAMPLES)
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model = network()
        with context:
            found = gbp_ray.score(model, PLAIN.train, **EXAMPLES)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pruning_goes_on_from_masks_as_a_job_of_several_rounds() -> None:
    wanted = masks_of_job(sparsity=0.8, rounds=2, schedule="linear")
    model = network()
    first = gbp_ray.prune_model(model, PLAIN.train, sparsity=0.4, seed=3, **EXAMPLES)
    second = gbp_ray.prune_model(model, PLAIN.train, sparsity=0.8, masks=first, seed=3, **EXAMPLES)
    assert [first, second] == wanted
    assert (second.round, second.parent) == (2, first.digest)


class Mixed(nn.Module):
    """Has an embedding and a recurrent layer beside what is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True)
        self.head, self.spare = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cell(self.table(tokens))[0][:, -1])


def test_the_masks_say_what_was_left_alone_in_a_short_repr() -> None:
    tokens = torch.arange(40).view(10, 4) % 9
    model, data = built(Mixed), (tokens, torch.arange(10) % 3)
    masks = gbp_ray.prune_model(model, data, sparsity=0.5, exclude="spare.*")
    assert masks.unpruned["table.weight"] == (72, "Embedding, not in include")
    assert masks.unpruned["spare.weight"] == (32, "exclude")
    left_alone = set(masks.unpruned) | set(masks)
    assert left_alone == {name for name, p in model.named_parameters() if p.ndim > 1}
    assert repr(masks).startswith("<MaskSet 50.00% of ")
    assert "'table.weight' (72, Embedding, not in include)" in repr(masks)
    assert len(repr(masks)) < 300
    scores = gbp_ray.score(model, data, exclude=["spare.*"], include=("table.*",))
    assert scores.keys() == {"head.weight", "table.weight"}
    assert repr(scores) == "<Scores of 96 weights in 2 tensors by taylor>"


def test_weights_that_no_pass_reaches_are_warned_of_and_left_alone() -> None:
    tokens = torch.arange(40).view(10, 4) % 9
    data = tokens, torch.arange(10) % 3
    with pytest.warns(UserWarning, match=r"^model: 'spare.weight' \(32\) takes no .* in include"):
        masks = gbp_ray.prune_model(built(Mixed), data, sparsity=0.5)
    assert masks.keys() == {"head.weight"}
    assert masks.unpruned["spare.weight"] == (32, "no pass reaches it")
    with pytest.warns(UserWarning, match=r"^model: 'spare.weight' \(32\) gets no .* in exclude"):
        masks = gbp_ray.prune_model(built(Mixed), data, sparsity=0.5, include=["spare.*"])
    assert masks.keys() == {"head.weight", "spare.weight"}


def test_wrappers_are_seen_through() -> None:
    wanted = gbp_ray.prune_model(network(), PLAIN.train, sparsity=0.8, **EXAMPLES)
    model = torch.nn.DataParallel(network())
    assert gbp_ray.prune_model(model, PLAIN.train, sparsity=0.8, **EXAMPLES) == wanted
    assert wanted.find_revived(model.module) is None


def test_n_m_groups_run_along_the_inputs_of_transposed_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 3, 2), nn.Flatten(), nn.Linear(27, 3))
    data = (draw(9, 8, 2, 2), torch.arange(9) % 3)
    masks = gbp_ray.prune_model(model, data, sparsity=0.5, granularity="2:4", exclude=["2.*"])
    assert (masks["0.weight"].view(2, 4, -1).sum(dim=1) == 2).all()


def test_masks_of_a_tagger_count_labels() -> None:
    """Batches whose labels are mostly ignored weigh as many labels as they have."""
    inputs, labels = draw(12, 3, 6), torch.arange(72).view(12, 6) % 3
    labels[:6, 1:] = -100
    model = built(Tagger)
    functional.cross_entropy(model(inputs), labels).backward()
    wanted = (model.first.weight * model.first.weight.grad).abs().detach()
    scores = gbp_ray.score(built(Tagger), (inputs, labels), calibration_batch_size=3)
    torch.testing.assert_close(scores["first.weight"], wanted, rtol=1e-4, atol=1e-9)


class Detached(ConvNet):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).detach()


def with_hook() -> nn.Module:
    model = network()
    model.conv1.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return network()


REFUSED: dict[str, tuple[Callable[[], nn.Module] | Any, dict[str, Any], str]] = {
    "sparsity": (network, {"sparsity": 1.5}, "sparsity = 1.5: should be less than 1"),
    "inference": (
        made_for_inference,
        {},
        "model: 'conv1.weight' was made under torch.inference_mode and has no gradients; make ",
    ),
    "criterion": (
        network,
        {"criterion": "tailor"},
        "criterion = 'tailor': is not a criterion, did you mean 'taylor'? (allowed: magnitude, ",
    ),
    "history": (network, {"criterion": "movement"}, "criterion = movement: is gathered while "),
    "pattern": (
        network,
        {"granularity": "2:4"},
        'granularity = "2:4" means sparsity = 0.5, not 0.8; set sparsity=0.5',
    ),
    "exclude": (
        network,
        {"exclude": ["conv3.*"]},
        "exclude = 'conv3.*': matches no parameter, did you mean ",
    ),
    "argument": (network, {"scop": "layer"}, "scop: is no argument, did you mean 'scope'? "),
    "rounds": (network, {"rounds": 3}, "rounds: is no argument"),
    "loss": (
        network,
        {"loss": functional.mse_loss},
        "loss: outputs and targets are spread over each other (outputs torch.float32 of shape ",
    ),
    "loss fails": (
        network,
        {"loss": functional.nll_loss, "forward": lambda model, batch: model(batch[0]).flatten()},
        "data: one batch of 8 examples failed with ",
    ),
    "no function": (network, {"loss": None}, "loss: must be a function, not NoneType"),
    "labels": (
        network,
        {"data": (PLAIN.train[0], PLAIN.train[1] + 1)},
        "data: labels run from 1 to 3, but the model has 3 outputs (allowed: 0 to 2)",
    ),
    "no mean": (
        network,
        {
            "loss": lambda outputs, targets: (
                functional.cross_entropy(outputs, targets) * len(targets)
            )
        },
        "loss: is a sum over the batch, ",
    ),
    "no data": (network, {"data": None}, "data: criterion = taylor reads examples; give "),
    "empty": (
        network,
        {"data": tuple(column[:0] for column in PLAIN.train)},
        "data: holds no examples; give at least one",
    ),
    "nothing prunable": (
        lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(72)),
        {},
        "model: the network has nothing to prune: prunable are ",
    ),
    "no network": (lambda: [1], {}, "model: must be a torch.nn.Module, not a list"),
    "meta": (
        lambda: network().to("meta"),
        {},
        "model: its parameters are on meta; move the network to one device, with weights",
    ),
    "hook": (with_hook, {}, "model: 'conv1.weight' has a hook that runs when its gradient is "),
    "detached": (
        lambda: built(Detached),
        {},
        "loss: depends on no prunable weight, so that all scores would be 0; ",
    ),
    "seed": (network, {"seed": "x"}, "seed = 'x': must be a whole number from 0 on"),
    "length": (network, {"data": 5, "criterion": "magnitude"}, "data: examples cannot be counted "),
    "threads": (network, {"num_threads": 0}, "num_threads = 0: must be a whole number from 1 on"),
    "masks": (network, {"masks": {}}, "masks: must be a MaskSet, as prune_model returns, not "),
    "bound": (
        network,
        {"layer_max_sparsity": {"hed*": 0.5}},
        "layer_max_sparsity.'hed*': matches no prunable parameter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_argument(name: str) -> None:
    make, arguments, text = REFUSED[name]
    model = make()
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    call = {"data": PLAIN.train, "sparsity": 0.8, **EXAMPLES, **arguments}
    with pytest.raises(GbpError) as caught:
        gbp_ray.prune_model(model, **call)
    told = str(caught.value)
    assert told.startswith(text), told
    assert "\n" not in told
    assert not {"prune.", "workload."} & {word[: word.find(".") + 1] for word in told.split()}
    for key, value in before.items():
        if not value.is_meta:
            assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize(
    ("scores", "fields", "text"),
    [
        ([1.0], {}, "scores: must be tensors by parameter name, as score() gives, not a list of 1"),
        ({"a": torch.ones(2, 2, dtype=torch.long)}, {}, "scores: 'a' is torch.int64 of shape "),
        ({"a": torch.full((2, 2), torch.nan)}, {}, "scores of 'a': 4 are NaN or infinite"),
        ({"a": torch.eye(2).to_sparse()}, {}, "scores: 'a' is torch.float32 of shape (2, 2); give"),
        ({"a": torch.ones(2, 2, device="meta")}, {}, "scores: 'a' is torch.float32 of shape (2, "),
        ({1: torch.ones(2, 2)}, {}, "scores: 1 is torch.float32 of shape (2, 2); give dense "),
        ({"a": torch.ones(2, 6)}, {"granularity": "2:4"}, "granularity = '2:4': needs input sizes"),
        (
            {"a": torch.ones(2, 4)},
            {"masks": gbp_ray.MaskSet({"a": torch.zeros(2, 4, dtype=torch.bool)})},
            "sparsity = 0.5: is below the 1.0000 of masks",
        ),
        (
            {"a": torch.ones(2, 4)},
            {"masks": gbp_ray.MaskSet({"b": torch.ones(2, 4, dtype=torch.bool)})},
            "the other masks: has no 'a'",
        ),
    ],
)
def test_scores_and_masks_that_do_not_fit_are_refused(
    scores: Any, fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(GbpError) as caught:
        gbp_ray.select(scores, sparsity=0.5, **fields)
    assert str(caught.value).startswith(text)


def test_criteria_that_read_no_data_need_none() -> None:
    masks = gbp_ray.prune_model(network(), sparsity=0.8, criterion="magnitude")
    weights = {n: p.detach().abs() for n, p in network().named_parameters() if p.ndim > 1}
    assert masks == gbp_ray.select(weights, sparsity=0.8)
