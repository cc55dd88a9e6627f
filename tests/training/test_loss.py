"""Smoothed labels, bfloat16, and examples that are mixed."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_networks import ConvNet, TanhNet, built, draw, images, in_float64, job_config
from small_trainings import SEED, first_batch, recipe_of, steps, tanh_workload, train
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.training import FinetuneConfig, PretrainConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.evaluation import evaluate
from gbp_ray.training.loss import check_loss, counts_of, draw_mix, find_varying_counts
from gbp_ray.training.optimizer import make_optimizer
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.batch import Batch, forward, logits_of
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed, first_example, seeded


def plain_convnet() -> nn.Module:
    return ConvNet(dropout=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_a_smoothed_label_is_shared_among_all_classes(smoothing: float) -> None:
    workload = dataclasses.replace(images(), augment=None)
    batch = first_batch(workload, 16)
    inputs, labels = workload.train[0][batch], workload.train[1][batch]
    with torch.no_grad():
        log_shares = built(plain_convnet).train()(inputs).log_softmax(dim=1)
    own = -log_shares[torch.arange(16), labels].mean()
    every = -log_shares.mean()
    expected = ((1 - smoothing) * own + smoothing * every).item()
    recipe = recipe_of(microbatches=1, label_smoothing=smoothing)
    assert train(built(plain_convnet), workload, recipe, steps(1)) == pytest.approx(expected)


def test_a_step_in_bfloat16_has_the_bits_of_torch_alone() -> None:
    workload, model = dataclasses.replace(images(), augment=None), built(plain_convnet)
    twin = copy.deepcopy(model).train()
    recipe = recipe_of(microbatches=1, precision="bfloat16")
    optimizer = make_optimizer(twin, recipe)
    batch = first_batch(workload, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = twin(workload.train[0][batch])
    assert outputs.dtype is torch.bfloat16
    functional.cross_entropy(outputs.float(), workload.train[1][batch]).backward()
    optimizer.step()
    exact = built(plain_convnet)
    train(model, workload, recipe, steps(1))
    train(exact, workload, recipe_of(microbatches=1), steps(1))
    for name, value in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
        assert value.dtype is torch.float32
    assert not torch.equal(model.head.weight, exact.head.weight)


def test_only_the_passes_of_training_are_in_bfloat16() -> None:
    seen: dict[tuple[str, bool], set[torch.dtype]] = {}
    phase = "evaluate"

    class Watched(ConvNet):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            seen.setdefault((phase, self.training), set()).add(outputs.dtype)
            return outputs

    def note(progress: Progress) -> None:
        nonlocal phase
        phase = progress.phase

    narrow = {"epochs": 1, "batch_size": 15, "precision": "bfloat16"}
    job = job_config(
        pretrain=PretrainConfig(**narrow),
        finetune=FinetuneConfig(**narrow, distillation={"weight": 0.5}),
        prune={"calibration_examples": 8, "calibration_batch_size": 8, "batchnorm_examples": 40},
    )
    *_, last = run_rounds(job, images(Watched), Ranks(), on_progress=note)
    assert {dtype for (_, trains), found in seen.items() if trains for dtype in found} == {
        torch.bfloat16
    }
    # The teacher, in eval mode, answers in bfloat16 as well, while fine-tuning.
    assert torch.bfloat16 in seen["finetune", False]
    for (name, trains), dtypes in seen.items():
        if not trains and name == "score":
            assert dtypes == {torch.float32}
    assert {p.dtype for p in last.model.parameters()} == {torch.float32}


def test_evaluations_and_scores_are_computed_in_bfloat16_where_asked() -> None:
    seen: list[tuple[int, torch.dtype]] = []

    class Watched(ConvNet):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            seen.append((len(inputs), outputs.dtype))
            return outputs

    narrow = {"calibration_precision": "bfloat16", "calibration_batch_size": 13}
    for units in ({}, {"granularity": "channel"}):
        job = job_config(
            finetune={"epochs": 0},
            prune={**narrow, **units},
            workload={"eval_precision": "bfloat16", "eval_batch_size": 11},
        )
        seen.clear()
        for _ in run_rounds(job, images(Watched), Ranks()):
            pass
        of_size = {size: {dtype for n, dtype in seen if n == size} for size in (11, 13)}
        assert of_size == {11: {torch.bfloat16}, 13: {torch.bfloat16}}, units


def test_options_that_are_off_change_no_bit() -> None:
    workload = images()
    models = [built(ConvNet) for _ in range(2)]
    off = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "ema_decay": 0.0}
    train(models[0], workload, recipe_of(), steps(3))
    train(models[1], workload, recipe_of(**off, max_gradient_norm=1e9), steps(3))
    for ours, theirs in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(ours, theirs)


def test_a_part_meets_its_augmentation_and_its_dropout_whatever_is_mixed() -> None:
    """The draws of mixing are its own: those that were there before stay what they were."""
    workload = images()
    draws = derive_seed(SEED, "finetune", 0, 0)
    with seeded(draws):
        expected = workload.augment(workload.train[0][first_batch(workload, 16)])
    seen: list[Tensor] = []

    def note(inputs: Tensor) -> Tensor:
        seen.append(inputs.clone())
        return inputs

    noted = dataclasses.replace(workload, prepare=note)
    train(built(ConvNet), noted, recipe_of(microbatches=1, mixup=1.0), steps(1))
    assert torch.equal(seen[0], expected)


PICTURES = draw(9, 3, 8, 12, seed=3)


def test_mixup_lies_between_each_example_and_its_partner() -> None:
    for draws in range(20):
        mix = draw_mix(recipe_of(mixup=0.4), PICTURES, draws)
        assert mix is not None
        assert sorted(mix.partners.tolist()) == list(range(9))
        expected = mix.share * PICTURES + (1 - mix.share) * PICTURES[mix.partners]
        torch.testing.assert_close(mix.inputs, expected)


def test_cutmix_pastes_one_rectangle_and_counts_what_is_left() -> None:
    numbered = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 2, 8, 12)
    shares = set()
    for draws in range(60):
        mix = draw_mix(recipe_of(cutmix=1.0), numbered, draws)
        assert mix is not None
        shares.add(mix.share)
        for number, (own, partner) in enumerate(zip(mix.inputs, mix.partners, strict=True)):
            is_pasted = own[0] != number
            if partner == number:
                assert not is_pasted.any()
                continue
            assert set(own.unique().tolist()) <= {float(number), float(partner)}
            assert torch.equal(own[0], own[1])
            assert is_pasted.sum().item() / 96 == pytest.approx(1 - mix.share)
            rows, columns = is_pasted.any(dim=1), is_pasted.any(dim=0)
            assert torch.equal(is_pasted, rows[:, None] & columns)
            for line in (rows, columns):
                (inside,) = line.nonzero(as_tuple=True)
                assert inside.tolist() == list(
                    range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else []
                )
    assert len(shares) > 10


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_mean_and_variance_of_the_beta_distribution(alpha: float) -> None:
    mixes = [draw_mix(recipe_of(mixup=alpha), PICTURES[:2], draws) for draws in range(2000)]
    shares = torch.tensor([mix.share for mix in mixes if mix is not None])
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=5 * (variance / 2000) ** 0.5)
    assert shares.var().item() == pytest.approx(variance, rel=0.15)


def test_a_part_is_mixed_by_its_seed_alone() -> None:
    both = recipe_of(mixup=1.0, cutmix=1.0)
    found = []
    for number, draws in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        mix = draw_mix(both, PICTURES, draws)
        assert mix is not None
        found.append(mix.inputs)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert draw_mix(recipe_of(), PICTURES, 1) is None


def test_a_coin_decides_between_the_two() -> None:
    """Mixup leaves hardly any pixel as it was, CutMix every one that of some example."""
    both, num_cut = recipe_of(mixup=1.0, cutmix=1.0), 0
    for draws in range(200):
        mix = draw_mix(both, PICTURES, draws)
        assert mix is not None
        num_cut += bool(((mix.inputs == PICTURES) | (mix.inputs == PICTURES[mix.partners])).all())
    assert 70 < num_cut < 130


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_mixed_loss_is_that_of_mixed_targets(smoothing: float) -> None:
    """Cross-entropy with soft targets, as both papers have it, written out."""
    workload = images()
    recipe = recipe_of(batch_size=14, microbatches=1, cutmix=1.0, label_smoothing=smoothing)
    model = built(lambda: ConvNet(dropout=0))
    draws = derive_seed(SEED, "finetune", 0, 0)
    batch = first_batch(workload, 14)
    inputs, labels = workload.train[0][batch], workload.train[1][batch]
    with seeded(draws):
        inputs = workload.augment(inputs)
    mix = draw_mix(recipe, inputs, draws)
    assert mix is not None
    own, other = (functional.one_hot(y, 3).float() for y in (labels, labels[mix.partners]))
    soft = mix.share * own + (1 - mix.share) * other
    soft = (1 - smoothing) * soft + smoothing / 3
    with torch.no_grad():
        log_shares = model.train()(mix.inputs).log_softmax(dim=1)
    expected = -(soft * log_shares).sum(dim=1).mean().item()
    found = train(built(lambda: ConvNet(dropout=0)), workload, recipe, steps(1))
    assert found == pytest.approx(expected, rel=1e-5)


def test_any_loss_is_mixed_as_its_own() -> None:
    workload = tanh_workload()
    recipe = recipe_of(batch_size=10, microbatches=1, mixup=1.0)
    batch = first_batch(workload, 10)
    inputs, targets = workload.train[0][batch], workload.train[1][batch]
    mix = draw_mix(recipe, inputs, derive_seed(SEED, "finetune", 0, 0))
    assert mix is not None
    model = in_float64(lambda: nn.Linear(3, 2))
    with torch.no_grad():
        outputs = model(mix.inputs)
    own, other = ((outputs - y).square().mean() for y in (targets, targets[mix.partners]))
    expected = (mix.share * own + (1 - mix.share) * other).item()
    assert train(model, workload, recipe, steps(1)) == pytest.approx(expected)


def tried(workload: Workload) -> tuple[Workload, Batch]:
    return workload, first_example(workload)


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^finetune\.cutmix = 1: needs images .*\(1, 3\)"):
        check_loss(recipe_of(epochs=1, cutmix=1.0), "finetune", *tried(tanh_workload()))
    tokens = torch.arange(6).view(2, 3)
    workload = tanh_workload()
    integers = type(workload)(workload.build_model, (tokens, tokens), (tokens, tokens))
    with pytest.raises(ConfigError, match=r"^pretrain\.mixup = 1: needs inputs of floating point"):
        check_loss(recipe_of(epochs=1, mixup=1.0), "pretrain", *tried(integers))
    with pytest.raises(ConfigError, match=r"^finetune\.label_smoothing = 0\.1: .*cross_entropy"):
        check_loss(recipe_of(epochs=1, label_smoothing=0.1), "finetune", *tried(workload))
    check_loss(recipe_of(epochs=1, mixup=1.0), "finetune", *tried(workload))
    still = job_config(finetune={"epochs": 0, "label_smoothing": 0.1})
    check_job(still, tanh_workload(torch.float32))
    check_loss(
        recipe_of(epochs=1, cutmix=1.0, mixup=1.0, label_smoothing=0.1),
        "finetune",
        *tried(images()),
    )


class Named(nn.Module):
    """Gives its logits by name, in an object that cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = plain_convnet()

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.plain(inputs))


def test_named_logits_are_smoothed_as_plain_ones() -> None:
    recipe = recipe_of(label_smoothing=0.2)
    losses = [train(built(kind), images(), recipe, steps(2)) for kind in (plain_convnet, Named)]
    assert losses[0] == losses[1]


def test_a_label_without_an_output_is_named_where_logits_are_named() -> None:
    inputs, labels = images().train
    items = list(zip(inputs, labels.index_fill(0, torch.tensor([9]), 77), strict=True))
    workload = dataclasses.replace(images(), build_model=Named, train=items, test=items)
    with pytest.raises(WorkloadError, match=r"workload\.test: example 9 has label 77, but the"):
        evaluate(built(Named), workload, Ranks(), 16)


def sentences_of(prepare: Any) -> Workload:
    words = [{"words": draw(6, 3, seed=seed)} for seed in range(8)]
    network = nn.Linear(3, 2)
    return Workload(
        build_model=lambda: network,
        train=words,
        test=words,
        forward=lambda model, batch: model(batch["words"]).transpose(1, 2),
        loss=lambda outputs, batch: functional.cross_entropy(outputs, batch["labels"]),
        count=lambda batch: (batch["labels"] != -100).sum(),
        prepare=prepare,
        metrics=("perplexity",),
    )


def label(batch: dict[str, Tensor], least: float) -> dict[str, Tensor]:
    first = batch["words"][..., 0]
    return {**batch, "labels": (first > 0).long().where(first > least, -100)}


def test_labels_that_prepare_makes_of_a_dict_are_counted() -> None:
    workload = sentences_of(lambda batch: label(batch, -0.5))
    counts = counts_of(workload, torch.arange(8), Ranks())
    expected = [int((item["words"][:, 0] > -0.5).sum()) for item in workload.train]
    assert len(set(expected)) > 1
    assert counts is not None
    assert counts.tolist() == expected
    assert not find_varying_counts(workload)


class Masked(list[dict[str, Tensor]]):
    """Sentences that have labels for another few words each time they are read."""

    def __getitem__(self, index: Any) -> Any:
        return label(super().__getitem__(index), float(torch.randn(())))


def test_labels_that_vary_between_readings_are_warned_of() -> None:
    plain = sentences_of(None)
    workload = dataclasses.replace(plain, train=Masked(plain.train), test=Masked(plain.test))
    recipe = {"epochs": 1, "microbatches": 2, "batch_size": 4}
    job = job_config(finetune=recipe, prune={"criterion": "taylor"})
    exact = r"finetune\.microbatches = 1 and prune\.calibration_augment = false$"
    with pytest.warns(UserWarning, match=rf"another number of labels each time.*{exact}"):
        check_job(job, workload)
    exactly = {"criterion": "taylor", "calibration_augment": False}
    still = job_config(finetune={**recipe, "microbatches": 1}, prune=exactly)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another number of labels")
        check_job(still, workload)


def test_a_missing_count_is_named_before_the_perplexity_that_it_spoils() -> None:
    workload = dataclasses.replace(sentences_of(lambda batch: label(batch, -0.5)), count=None)
    with pytest.raises(WorkloadError, match=r"^workload\.loss: the loss is no mean .* count=len"):
        check_job(job_config(), workload)


def test_a_key_that_batches_have_not_is_told_with_those_that_they_have() -> None:
    workload = dataclasses.replace(sentences_of(None), forward=lambda model, batch: batch["word"])
    with pytest.raises(WorkloadError, match=r"KeyError: 'word'; a batch is a dict with keys 'wo"):
        check_job(job_config(), workload)


@dataclasses.dataclass
class Answer:
    logits: Tensor


@pytest.mark.parametrize("wrap", [Answer, lambda logits: {"logits": logits}])
def test_the_loss_of_named_logits_gets_float32_as_well(wrap: Callable[[Tensor], Any]) -> None:
    class Net(TanhNet):
        def forward(self, inputs: Tensor) -> Any:
            return wrap(super().forward(inputs))

    seen: list[torch.dtype] = []

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        logits = logits_of(outputs)
        seen.append(logits.dtype)
        return functional.mse_loss(logits, targets)

    workload = dataclasses.replace(tanh_workload(torch.float32), build_model=Net, loss=loss)
    batch = first_example(workload)
    outputs = forward(built(Net), workload, batch, "bfloat16")
    loss(outputs, batch.targets)
    assert seen == [torch.float32]
