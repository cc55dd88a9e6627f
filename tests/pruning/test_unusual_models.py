"""Models that do what most do not: frozen, tied, half-reached, counting, of mixed precision."""

from __future__ import annotations

import dataclasses
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LAYER_CRITERIA
from safetensors.torch import load, save
from small_networks import (
    ONE_RANK,
    ConvNet,
    TanhNet,
    built,
    draw,
    images,
    in_float64,
    job_config,
    prune_config,
    regression,
    scores_of,
)
from small_trainings import recipe_of, steps, tanh_regression, train
from torch import Tensor, nn

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import FinetuneConfig, PretrainConfig
from gbp_ray.errors import ConfigError, PruneError, StoreError
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import RoundState, run_rounds
from gbp_ray.training.batchnorm import recalibrate_batchnorm
from gbp_ray.training.evaluation import evaluate
from gbp_ray.training.network import load_weights, network_of_seed, unused_layers
from gbp_ray.workloads.contract import Workload

SCORED = [name for name in CRITERIA if name != "movement"]


def small_job(**sections: Any) -> JobConfig:
    training = {"epochs": 1, "batch_size": 8, "microbatches": 2}
    return job_config(
        **{
            "pretrain": PretrainConfig(**training),
            "finetune": FinetuneConfig(**training),
            **sections,
            "prune": {"rounds": 2, "sparsity": 0.5, **sections.get("prune", {})},
        }
    )


def rounds_of(subject: Workload, **sections: Any) -> list[RoundState]:
    return list(run_rounds(small_job(**sections), subject, ONE_RANK))


# -- frozen and unreached parameters ---------------------------------------------------------------


class FrozenNet(TanhNet):
    def __init__(self) -> None:
        super().__init__()
        self[0].requires_grad_(False)


@pytest.mark.parametrize("rule", SCORED)
def test_frozen_weights_score_as_if_they_were_not(rule: str) -> None:
    config = prune_config(rule, calibration_batch_size=8)
    frozen, free = built(FrozenNet), built(TanhNet)
    scores = scores_of(frozen, tanh_regression(FrozenNet), config)
    for name, expected in scores_of(free, tanh_regression(TanhNet), config).items():
        assert torch.equal(scores[name], expected)
    assert [p.requires_grad for p in frozen.parameters()] == [False, False, True, True]


def test_frozen_weights_are_pruned_and_otherwise_keep_their_values() -> None:
    states = run_rounds(small_job(), tanh_regression(FrozenNet), ONE_RANK)
    dense = next(states).model.get_parameter("0.weight").detach().clone()
    *_, last = states
    mask = last.masks["0.weight"]
    assert not mask.all()
    assert torch.equal(last.model.get_parameter("0.weight"), dense * mask)
    assert last.record.sparsity == 0.5


def test_movement_of_a_frozen_weight_is_refused_by_name() -> None:
    job = small_job(prune={"criterion": "movement"})
    workload = tanh_regression(FrozenNet)
    for run in (
        lambda: check_job(job, workload),
        lambda: next(run_rounds(job, workload, ONE_RANK)),
    ):
        with pytest.raises(ConfigError, match=r"movement: '0\.weight' is frozen.*prune\.exclude"):
            run()
    excluded = {"criterion": "movement", "exclude": ("0.*",)}
    assert rounds_of(workload, prune=excluded)[-1].record.sparsity == 0.5


def test_a_model_that_is_frozen_as_a_whole_is_pruned_but_not_trained() -> None:
    workload = tanh_regression(lambda: TanhNet().requires_grad_(False))
    still = {"pretrain": PretrainConfig(), "finetune": FinetuneConfig()}
    assert rounds_of(workload, **still)[-1].record.sparsity == 0.5
    with pytest.raises(PruneError, match=r"no parameter that requires a gradient.*epochs to 0"):
        rounds_of(workload)


class HalfReached(TanhNet):
    """Its spare layer, first in name order, never meets the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a_spare = nn.Linear(3, 5)
        self.steps = (self[0], self[1], self[2])

    def forward(self, inputs: Tensor) -> Tensor:
        for step in self.steps:
            inputs = step(inputs)
        return inputs


@pytest.mark.parametrize("rule", sorted({*SCORED} - {"magnitude", "random", *LAYER_CRITERIA}))
def test_weights_that_the_loss_does_not_reach_score_zero(rule: str) -> None:
    model = built(HalfReached)
    config = prune_config(rule, calibration_batch_size=8)
    scores = scores_of(model, tanh_regression(HalfReached), config)
    assert not scores["a_spare.weight"].any()
    assert scores["0.weight"].any()


def test_a_layer_that_no_pass_reaches_is_no_free_sparsity() -> None:
    """The decision is that of the network without it."""
    workload = tanh_regression(HalfReached)
    state = rounds_of(workload, prune={"sparsity": 0.4})[-1]
    without = rounds_of(workload, prune={"sparsity": 0.4, "exclude": ("a_spare.*",)})[-1]
    assert state.masks.digest == without.masks.digest
    assert state.masks.num_pruned == state.masks.num_units * 0.4 == 8
    assert state.record.sparsity == 0.4
    assert state.record.cost.unpruned == {"a_spare.weight": (15, "no pass reaches it")}
    fresh = built(HalfReached, small_job().seed)
    assert not torch.equal(fresh[0].weight, state.model[0].weight)


def test_a_layer_that_no_pass_reaches_goes_first_where_it_is_included_but_not_whole() -> None:
    workload = tanh_regression(HalfReached)
    job = small_job(prune={"sparsity": 0.4, "include": ("a_spare.weight",)})
    with pytest.warns(UserWarning, match="15 of 35 prunable weights, whose removal counts"):
        check_job(job, workload)
    *_, state = run_rounds(job, workload, ONE_RANK)
    layers = {layer.name: layer.num_nonzero for layer in state.record.cost.layers}
    assert layers == {"0.weight": 12, "2.weight": 8, "a_spare.weight": 1}
    assert state.record.sparsity == 14 / 35


@pytest.mark.parametrize("number", [0, 1])
def test_a_trial_goes_on_with_the_layers_that_it_began_with(number: int) -> None:
    """A trial of an earlier version has masks of layers that no pass reaches."""
    workload = tanh_regression(HalfReached)
    included = small_job(prune={"include": ("a_spare.weight",)})
    states = []
    for state in run_rounds(included, workload, ONE_RANK):
        states.append((state.to_files(), state.masks.digest, state.record))
    files = states[number][0]
    saved = Checkpoint(
        round=number,
        weights=files["weights.safetensors"],
        masks=files["masks.safetensors"],
        state=files["state.pt"],
    )
    job = small_job()
    with pytest.warns(UserWarning, match="15 of 35 prunable weights, whose removal counts"):
        check_job(job, workload, states[0][2])
    resumed = list(run_rounds(job, workload, ONE_RANK, resume=saved))
    assert [state.masks.digest for state in resumed] == [s[1] for s in states[number + 1 :]]
    fresh = next(run_rounds(job, workload, ONE_RANK)).masks
    assert fresh.keys() == resumed[-1].masks.keys() - {"a_spare.weight"}


def test_initial_masks_may_hold_a_layer_that_no_pass_reaches(tmp_path: Path) -> None:
    workload = tanh_regression(HalfReached)
    included = small_job(prune={"sparsity": 0.4, "include": ("a_spare.weight",)})
    *_, earlier = run_rounds(included, workload, ONE_RANK)
    file = tmp_path / "masks.safetensors"
    file.write_bytes(earlier.to_files()["masks.safetensors"])
    job = small_job(prune={"initial_masks": str(file)})
    with pytest.warns(UserWarning, match="they stay and do not count as prunable"):
        check_job(job, workload)
    dense, *_ = run_rounds(job, workload, ONE_RANK)
    assert dense.masks.keys() == {"0.weight", "2.weight"}


class Choosing(nn.Module):
    """Sends each example to one of eight experts, by its place in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(8))
        self.head = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = (inputs[:, 0] * 1000).abs().long().remainder(7).tolist()
        rows = [self.experts[n](row) for n, row in zip(chosen, inputs, strict=True)]
        return self.head(torch.stack(rows))


class Hidden(nn.Module):
    """Uses layers in ways that gradients do not show."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            still = self.b(inputs)
        if self.kind == "no gradient":
            return self.c(self.a(inputs) + still)
        if self.kind == "decides":
            sign = 1.0 if still.sum() > 0 else -1.0
            return self.c(sign * self.a(inputs))
        if self.kind == "chooses":
            return self.c(self.a(inputs).gather(1, still.argsort(dim=1)))
        if self.kind == "written in place":
            kept = torch.zeros_like(still)
            kept[:, 1:].copy_(still[:, 1:])
            return self.c(self.a(inputs) + kept)
        self.other = self.b(inputs)
        return self.c(self.a(inputs))


@pytest.mark.parametrize(
    ("build", "unused"),
    [
        (TanhNet, set()),
        (HalfReached, {"a_spare.weight"}),
        # One expert gets no example; the others do not get the first.
        (Choosing, {"experts.7.weight"}),
        *(
            (partial(Hidden, kind), set())
            for kind in ("no gradient", "decides", "chooses", "written in place")
        ),
        # What is computed and left is not used.
        (partial(Hidden, "computed and left"), {"b.weight"}),
    ],
)
@pytest.mark.parametrize("is_training", [True, False])
def test_layers_are_unused_where_nothing_leads_from_them_to_the_loss(
    build: Any, unused: set[str], is_training: bool
) -> None:
    model = built(build).train(is_training)
    workload = regression(lambda: model, draw(90, 3, seed=1), draw(90, 2, seed=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert unused_layers(workload, model) == unused
    # Torn out, they leave the loss as it is to the bit; any other does not.
    loss = workload.loss(model(workload.train[0]), workload.train[1])
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        with torch.no_grad():
            parameter.fill_(2.0)
            torn = workload.loss(model(workload.train[0]), workload.train[1])
            parameter.copy_(before[name])
        assert torch.equal(torn, loss) == (name in unused), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_without_memory_shows_what_it_uses_all_the_same() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return HalfReached()

    workload = tanh_regression(build)
    assert unused_layers(workload, build()) == {"a_spare.weight"}
    model, is_blank = network_of_seed(workload, 0)
    assert is_blank
    assert unused_layers(workload, model, is_blank=True) == {"a_spare.weight"}


def test_nothing_is_said_of_a_network_that_fails() -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such luck")

    workload = dataclasses.replace(tanh_regression(HalfReached), loss=fail)
    assert unused_layers(workload, built(HalfReached)) == set()


@pytest.mark.parametrize("rule", sorted({*SCORED} - {"random"}))
def test_the_weight_that_spoils_all_gradients_is_the_one_named(rule: str) -> None:
    model = built(TanhNet)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(PruneError, match=r"scores of '2\.weight': NaN or infinite"):
        scores_of(model, tanh_regression(TanhNet), prune_config(rule))


@pytest.mark.parametrize("rule", [name for name in SCORED if CRITERIA[name].is_signed])
def test_signed_criteria_give_scores_of_both_signs(rule: str) -> None:
    scores = scores_of(built(TanhNet), tanh_regression(TanhNet), prune_config(rule))
    values = torch.cat([s.flatten() for s in scores.values()])
    assert values.min() < 0 < values.max()


# An own rule may bear any name, that of a built-in one, too.
NAMESAKE = dataclasses.replace(criterion("magnitude"), spec=CRITERIA["random"])


def test_an_own_rule_is_not_mistaken_for_a_built_in_of_its_name() -> None:
    model = built(TanhNet)
    scores = scores_of(model, tanh_regression(TanhNet), prune_config(f"{__name__}:NAMESAKE"))
    assert torch.equal(scores["0.weight"], model[0].weight.abs())


class TrainingOnly(HalfReached):
    """Another layer helps in training alone, and the last one shares its weight with a table."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(3, 2)
        self.table = nn.Embedding(2, 4)
        self.table.weight = self[2].weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs + self.aux(inputs) if self.training else outputs


def test_weights_without_gradients_and_pruned_embeddings_are_told_before_training() -> None:
    with pytest.warns(UserWarning, match="prune: ") as told:
        check_job(small_job(), tanh_regression(TrainingOnly))
    unused, embedded = (str(warning.message) for warning in told)
    assert unused.startswith("prune: 'a_spare.weight' (15), 'aux.weight' (6) take no part in the")
    assert "removing 21 weights would change nothing; they stay and do not count" in unused
    assert embedded.startswith("prune: '2.weight' (8), which a layer shares with an embedding")


class Lookup(nn.Sequential):
    """A table that no layer shares."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(5, 4), nn.Linear(4, 2))


def test_an_embedding_of_its_own_is_not_said_to_be_shared(
    recwarn: pytest.WarningsRecorder,
) -> None:
    words = torch.arange(8) % 5
    workload = Workload(Lookup, (words, words % 2), (words, words % 2))
    check_job(small_job(prune={"include": ["0.weight"]}), workload)
    assert not [str(told.message) for told in recwarn if "embedding" in str(told.message)]


class Stateful(TanhNet):
    """Keeps something beside its tensors."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        assert isinstance(state, Tensor)


@pytest.mark.parametrize("extra", [None, b"v3", {"version": 3}, torch.tensor([3.0])], ids=str)
@pytest.mark.parametrize("rewind", ["none", "weights"])
def test_state_that_is_no_tensor_is_left_out(
    extra: Any, rewind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stateful, "extra", extra)
    job = small_job(prune={"rewind": rewind})
    workload = tanh_regression(Stateful)
    if isinstance(extra, Tensor):
        check_job(job, workload)
    else:
        with pytest.warns(UserWarning, match="'_extra_state' of the network's state is no tensor"):
            check_job(job, workload)
    states = list(run_rounds(job, workload, ONE_RANK))
    assert states[-1].record.sparsity == 0.5
    fresh = built(Stateful, seed=1)
    load_weights(fresh, states[-1].to_files()["weights.safetensors"], "weights")
    assert torch.equal(fresh[0].weight, states[-1].model[0].weight)


class Complex(nn.Module):
    """A layer of complex numbers, which is trained and not pruned, and one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Linear(3, 4, dtype=torch.complex64)
        self.side = nn.Linear(0, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.wave(inputs.to(torch.complex64)).abs() + self.side(inputs[:, :0])
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_complex_and_empty_layers_are_trained_beside_those_that_are_pruned() -> None:
    training = {"epochs": 1, "batch_size": 8, "microbatches": 2, "max_gradient_norm": 0.1}
    states = run_rounds(
        small_job(prune={"exclude": ("wave.*",)}, finetune=FinetuneConfig(**training)),
        tanh_regression(Complex),
        ONE_RANK,
    )
    first = next(states).model.wave.weight.detach().clone()
    *_, last = states
    assert last.record.cost.num_units == 8
    assert last.record.sparsity == 0.5
    assert not torch.equal(last.model.wave.weight, first)


# -- sizes -----------------------------------------------------------------------------------------


def test_batches_of_one_example() -> None:
    one = {"epochs": 0.2, "batch_size": 1, "microbatches": 1}
    states = rounds_of(
        images(),
        pretrain=PretrainConfig(**one),
        finetune=FinetuneConfig(**one),
        prune={"calibration_batch_size": 1, "calibration_examples": 5},
        workload={"eval_batch_size": 1},
    )
    assert states[-1].record.sparsity == 0.5


class FlatNormNet(nn.Sequential):
    """Its norm sees one value of each channel in each example."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class StillNormNet(FlatNormNet):
    """Keeps its norm as it is while it trains."""

    def train(self, mode: bool = True) -> StillNormNet:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("section", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    ("batch_size", "microbatches", "remedy"),
    [
        (4, 4, r"cuts 4 examples into parts of one, .*; set {}\.microbatches to 2 or less$"),
        (7, 4, r"cuts 7 examples into parts of one, .*; set {}\.microbatches to 3 or less$"),
        # The data holds 21.
        (64, 16, r"cuts 21 examples into parts of one, .*; set {}\.microbatches to 10 or less$"),
        (1, 1, r"cuts 1 example into parts of one, .*; raise it$"),
    ],
)
def test_a_part_of_one_example_is_refused_where_batchnorm_would_see_it(
    section: str, batch_size: int, microbatches: int, remedy: str
) -> None:
    def job(**fields: Any) -> JobConfig:
        recipe = {"epochs": 1, "batch_size": batch_size, "microbatches": microbatches, **fields}
        return job_config(**{section: recipe}, prune={"sparsity": 0.5})

    said = rf"^{section}\.batch_size = {batch_size} with {section}\.microbatches = {microbatches}: "
    with pytest.raises(ConfigError, match=said + remedy.format(section)):
        check_job(job(), tanh_regression(FlatNormNet))
    check_job(job(epochs=0), tanh_regression(FlatNormNet))
    check_job(job(), tanh_regression(StillNormNet))
    check_job(job(), tanh_regression(TanhNet))
    # Many values in an example: pixels.
    check_job(job(), images())


def test_the_most_parts_that_are_advised_can_be_trained() -> None:
    training = {"epochs": 1, "batch_size": 7, "microbatches": 3}
    job = small_job(finetune=FinetuneConfig(**training))
    check_job(job, tanh_regression(FlatNormNet))
    assert rounds_of(tanh_regression(FlatNormNet), finetune=FinetuneConfig(**training))


def test_statistics_are_estimated_from_batches_even_where_scores_are_not() -> None:
    still = {"pretrain": PretrainConfig(), "finetune": FinetuneConfig()}
    statistics = []
    for size in (1, 8, 32):
        prune = {"criterion": "magnitude", "calibration_batch_size": size, "rounds": 1}
        norm = rounds_of(tanh_regression(FlatNormNet), prune=prune, **still)[-1].model[1]
        statistics.append((norm.running_mean.tolist(), norm.running_var.tolist()))
    assert statistics[0] == statistics[1] == statistics[2] != ([0.0] * 4, [1.0] * 4)


def test_statistics_of_one_example_are_refused_where_there_is_a_norm() -> None:
    job = small_job(prune={"batchnorm_examples": 1})
    with pytest.raises(ConfigError, match=r"^prune\.batchnorm_examples = 1: .* at least 2"):
        check_job(job, tanh_regression(FlatNormNet))
    check_job(job, tanh_regression(TanhNet))


def test_a_data_set_smaller_than_every_batch() -> None:
    big = {"epochs": 2, "batch_size": 512, "microbatches": 2}
    states = rounds_of(
        images(num_train=5, num_test=3),
        pretrain=PretrainConfig(**big),
        finetune=FinetuneConfig(**big),
    )
    assert states[-1].record.sparsity == 0.5
    # Accuracy counts each of the 3 test examples once.
    assert (states[-1].record.accuracy * 3) % 1 == 0


def test_a_single_weight_stays() -> None:
    workload = regression(lambda: nn.Linear(1, 1), draw(9, 1), draw(9, 1, seed=1))
    assert rounds_of(workload, prune={"sparsity": 0.4})[-1].record.cost.num_nonzero == 2
    with pytest.raises(PruneError, match="asks for 1 of 1 weights"):
        rounds_of(workload, prune={"sparsity": 0.9})


# -- kinds of numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_float64_model_stays_float64(optimizer: str) -> None:
    workload = tanh_regression(lambda: in_float64(TanhNet), torch.float64)
    training = {"epochs": 1, "batch_size": 8, "microbatches": 2, "optimizer": optimizer}
    states = rounds_of(workload, finetune=FinetuneConfig(**training))
    assert {p.dtype for p in states[-1].model.parameters()} == {torch.float64}
    weights = load(states[-1].to_files()["weights.safetensors"])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float64}


# What is left of the sum over examples of 4 x^2 or 2 x^2, for x = 10^5 and x = 1.
FISHER_REMAINDER = dataclasses.replace(
    criterion("fisher"), finish=lambda weights_N, statistic_N, total: statistic_N - 4e10
)
OBD_REMAINDER = dataclasses.replace(
    criterion("obd"), finish=lambda weights_N, statistic_N, total: statistic_N - 2e10
)


@pytest.mark.parametrize(("rule", "expected"), [("FISHER_REMAINDER", 4.0), ("OBD_REMAINDER", 2.0)])
def test_sums_of_a_float64_model_are_not_rounded_to_float32(rule: str, expected: float) -> None:
    model = in_float64(lambda: nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model.weight.zero_()
    inputs = torch.tensor([[1e5], [1.0]], dtype=torch.float64)
    workload = regression(lambda: model, inputs, torch.ones_like(inputs))
    scores = scores_of(model, workload, prune_config(f"{__name__}:{rule}"))
    assert scores["weight"].item() == expected


class MixedPrecision(nn.Module):
    """A bfloat16 layer before a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8, dtype=torch.bfloat16)
        self.b = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(inputs.bfloat16()).float()))


@pytest.mark.parametrize("rule", ["taylor", "fisher", "obd", "grasp", "movement"])
def test_a_model_of_mixed_precision_is_pruned_in_rounds(rule: str) -> None:
    states = rounds_of(tanh_regression(MixedPrecision), prune={"criterion": rule})
    assert states[-1].record.sparsity == 0.5
    dtypes = {name: p.dtype for name, p in states[-1].model.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in MixedPrecision().named_parameters()}


def test_gradients_of_float32_layers_are_not_rounded_to_those_of_a_bfloat16_layer() -> None:
    model, plain = built(MixedPrecision), built(MixedPrecision)
    workload = tanh_regression(MixedPrecision)
    everything = {"batch_size": 21, "microbatches": 1, "momentum": 0.0, "weight_decay": 0.0}
    train(model, workload, recipe_of(learning_rate=1.0, **everything), steps(1))
    workload.loss(plain(workload.train[0]), workload.train[1]).backward()
    with torch.no_grad():
        expected = plain.b.weight - plain.b.weight.grad
    torch.testing.assert_close(model.b.weight, expected, rtol=1e-5, atol=1e-6)


# -- inputs and buffers ----------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(dim=1))


def token_workload() -> Workload:
    tokens = draw(20, 5, seed=3).abs().mul(2).long().clamp(max=6)
    labels = tokens.sum(dim=1).remainder(3)
    return Workload(Tokens, (tokens, labels), (tokens, labels))


def test_integer_inputs_are_fine_but_for_synflow() -> None:
    assert rounds_of(token_workload())[-1].record.sparsity == 0.5
    with pytest.raises(
        PruneError, match=r"synflow: needs inputs of floating point, not torch\.int64"
    ):
        rounds_of(token_workload(), prune={"criterion": "synflow"})


class Counting(nn.Module):
    """Buffers of every habit: constant, counted in place, bound anew, tied and viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("num_classes", torch.tensor(10))
        self.register_buffer("size", torch.tensor(7, dtype=torch.int32))
        self.register_buffer("is_ready", torch.tensor(True))
        self.register_buffer("wave", torch.tensor([1 + 2j]))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("calls_bound_anew", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("all", torch.arange(6.0))
        self.register_buffer("some", self.all[:3])
        self.register_buffer("square", self.all.view(2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.num_classes == 10
        self.calls += 1
        self.calls_bound_anew = self.calls_bound_anew + 1
        self.mean = self.mean + inputs.detach().mean(dim=0)
        return self.layer(self.norm(inputs))


CONSTANT = ("num_classes", "size", "is_ready", "wave", "all", "some", "square")


def test_training_moves_what_a_step_moves_and_no_constant() -> None:
    model, fresh = built(Counting), Counting()
    workload = tanh_regression(Counting)
    train(model, workload, recipe_of(batch_size=20), steps(2))
    for name in CONSTANT:
        assert torch.equal(model.get_buffer(name), fresh.get_buffer(name)), name
    assert (model.calls, model.calls_bound_anew, model.norm.num_batches_tracked) == (2, 2, 2)
    assert model.mean.abs().max() > 0


def test_a_bound_buffer_moves_by_the_mean_over_the_parts() -> None:
    model = built(Counting)
    workload = tanh_regression(Counting)
    train(model, workload, recipe_of(batch_size=21), steps(1))
    torch.testing.assert_close(model.mean, workload.train[0].mean(dim=0))


def test_measuring_leaves_every_buffer_alone() -> None:
    model, workload = built(Counting), tanh_regression(Counting)
    before = {name: value.clone() for name, value in model.named_buffers()}
    tensors = dict(model.named_buffers())
    for rule in ("taylor", "obd", "grasp", "synflow"):
        scores_of(model, workload, prune_config(rule, calibration_batch_size=8))
    evaluate(model, workload, ONE_RANK, 4)
    recalibrate_batchnorm(model, workload, ONE_RANK, examples=20, batch_size=5, seed=0)
    for name, value in model.named_buffers():
        assert value is tensors[name]
        if not name.startswith("norm.running"):
            assert torch.equal(value, before[name]), name


def test_views_of_one_buffer_are_saved_and_loaded() -> None:
    states = rounds_of(tanh_regression(Counting))
    fresh = built(Counting, seed=1)
    load_weights(fresh, states[-1].to_files()["weights.safetensors"], "weights")
    for name, value in states[-1].model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


# -- damaged checkpoints ---------------------------------------------------------------------------


def checkpoint(**changes: bytes) -> tuple[JobConfig, Checkpoint]:
    job = small_job(prune={"rounds": 1})
    states = run_rounds(job, images(), ONE_RANK)
    dense = next(states).to_files()["weights.safetensors"]
    files = next(states).to_files()
    saved = Checkpoint(
        round=1,
        weights=files["weights.safetensors"],
        masks=files["masks.safetensors"],
        state=files["state.pt"],
        dense_weights=dense,
    )
    return job, dataclasses.replace(saved, **changes)


def resume(job: JobConfig, saved: Checkpoint) -> None:
    for _ in run_rounds(job, images(), ONE_RANK, resume=saved):
        pass


def test_masks_of_another_model_are_refused() -> None:
    other = MaskSet({"elsewhere.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(StoreError, match=r"masks\.safetensors: does not fit the model"):
        resume(*checkpoint(masks=other.to_bytes()))


def test_weights_that_their_masks_prune_are_refused() -> None:
    job, saved = checkpoint()
    dense = dataclasses.replace(saved, weights=saved.dense_weights)
    with pytest.raises(StoreError, match=r"masks\.safetensors: prunes weights of 'conv1\.weight'"):
        resume(job, dense)


TANH_WEIGHTS = save(built(TanhNet).state_dict())


@given(data=st.data(), byte=st.integers(0, 255))
@settings(max_examples=150)
def test_damaged_weights_are_refused_with_one_kind_of_error(data: st.DataObject, byte: int) -> None:
    """A store checks sums as well, so here it is enough that nothing else is raised."""
    position = data.draw(st.integers(0, len(TANH_WEIGHTS) - 1))
    is_cut = data.draw(st.booleans())
    tail = b"" if is_cut else bytes([byte]) + TANH_WEIGHTS[position + 1 :]
    altered = TANH_WEIGHTS[:position] + tail
    try:
        load_weights(TanhNet(), altered, "weights")
    except StoreError:
        return
    assert not is_cut


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_weights_of_a_dtype_that_torch_lacks_are_refused(dtype: str) -> None:
    header = f'{{"a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{1 + (dtype != "F4")}]}}}}'
    data = len(header).to_bytes(8, "little") + header.encode() + b"\0" * (1 + (dtype != "F4"))
    with pytest.raises(StoreError, match="is not a readable safetensors file"):
        load_weights(built(ConvNet), data, "weights")


def test_weights_of_another_dtype_are_refused_by_name() -> None:
    _, saved = checkpoint()
    tensors = load(saved.weights)
    tensors["head.weight"] = tensors["head.weight"].view(torch.int32)
    with pytest.raises(StoreError, match=r"does not fit the model at 'head\.weight'"):
        load_weights(built(ConvNet), save(tensors), "weights")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"optimizer": None},
        {"movement": None, "optimizer": {"state": {}, "param_groups": []}},
        {"movement": None, "optimizer": 7},
        [1, 2],
    ],
    ids=str,
)
def test_a_state_file_of_another_kind_is_refused(state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with pytest.raises(StoreError, match=r"round_001/state\.pt: is damaged"):
        resume(*checkpoint(state=buffer.getvalue()))


def test_an_altered_byte_of_the_state_file_is_refused_or_harmless() -> None:
    job, saved = checkpoint()
    refused = 0
    for position in range(0, len(saved.state), max(1, len(saved.state) // 40)):
        altered = bytearray(saved.state)
        altered[position] ^= 0xFF
        try:
            resume(job, dataclasses.replace(saved, state=bytes(altered)))
        except StoreError:
            refused += 1
    assert refused > 0


def test_a_norm_that_waits_for_other_workers_is_refused() -> None:
    def build() -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet())

    with pytest.raises(ConfigError, match="'norm1' is a SyncBatchNorm"):
        check_job(job_config(), images(build))
