from __future__ import annotations

import pytest
import torch
from small_networks import ConvNet, built, draw, images, in_float64, job_config
from small_trainings import SEED, first_batch, recipe_of, steps, tanh_workload, train
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import ConfigError
from gbp_ray.pruning.checks import check_job
from gbp_ray.training.loss import check_loss, draw_mix
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed, first_example, seeded

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


def tried(workload: Workload) -> tuple[Workload, Tensor]:
    return workload, first_example(workload)[0]


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
