from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from small_networks import ConvNet, built, images, job_config
from small_trainings import SEED, first_batch, recipe_of, steps, train
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.training import FinetuneConfig, PretrainConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.optimizer import make_optimizer
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.data import derive_seed, seeded


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
