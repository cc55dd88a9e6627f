"""Pruning in a training loop of one's own, alone and under DDP and FSDP2."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruner_program import (
    CRITERIA,
    NUM_STEPS,
    SHARDABLE,
    UNIT_CASES,
    Net,
    at_once,
    batch_of,
    optimizer_of,
    pruner_of,
    pruner_program,
    refitted_at_once,
    strayed_buffers,
    train,
    train_units,
    units_at_once,
)
from rank_program import reports_of_world
from small_networks import built
from torch import Tensor, nn
from torch.nn import functional

import gbp_ray
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import GbpError

BY_LAYER = {"scope": "layer", "optimizer": "sgd", "schedule": "geometric"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks reports, started as torchrun would start them."""
    return reports_of_world(2, tmp_path_factory.mktemp("two"), pruner_program)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


def lowest(scores: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Returns masks without the lowest scores, by a sort."""
    names = sorted(scores)
    flat = torch.cat([scores[name].reshape(-1) for name in names])
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.sort(stable=True).indices[:number]] = False
    parts = kept.split([scores[name].numel() for name in names])
    return {n: part.view_as(scores[n]) for n, part in zip(names, parts, strict=True)}


# -- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        *(("ddp", name) for name in CRITERIA),
        *(("fsdp", name) for name in SHARDABLE),
        ("ddp", "by layer"),
        ("fsdp", "by layer"),
    ],
)
def test_two_ranks_get_the_masks_and_weights_of_one_process(
    kind: str, criterion: str, two: list[dict[str, Any]]
) -> None:
    alone = train("taylor", **BY_LAYER) if criterion == "by layer" else train(criterion)
    assert [step for step, _, _ in alone["masks"]] == [3, 5, 6]
    assert alone["zeros"] == [None] * NUM_STEPS
    for report in two:
        assert report[kind, criterion] == alone


@pytest.mark.parametrize("case", UNIT_CASES)
def test_two_ranks_remove_the_units_of_one_process(case: str, two: list[dict[str, Any]]) -> None:
    alone = train_units(case)
    assert len(alone["masks"]) == 2
    for report in two:
        assert report["units", case] == alone


def test_all_ranks_score_with_the_buffers_of_the_first(two: list[dict[str, Any]]) -> None:
    wanted = strayed_buffers(0, "alone")
    assert [report["buffers"] for report in two] == [wanted] * 2


def test_pruning_at_once_is_the_same_on_two_ranks_and_in_shards(two: list[dict[str, Any]]) -> None:
    wanted = at_once(Ranks())
    assert [report["at once"] for report in two] == [[wanted, wanted]] * 2


def test_weights_refitted_at_once_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    assert [report["refitted at once"] for report in two] == [refitted_at_once(Ranks())] * 2


def test_units_pruned_at_once_are_the_same_on_two_ranks(two: list[dict[str, Any]]) -> None:
    assert [report["units at once"] for report in two] == [units_at_once(Ranks())] * 2


def test_ranks_that_differ_are_refused_on_all(two: list[dict[str, Any]]) -> None:
    told = two[0]["refused"]
    assert two[1]["refused"] == told
    strays = "model: its weights on ranks [1] are not those on rank 0; wrap it in "
    assert told["weights"].startswith(strays)
    assert told["models"].startswith(strays)
    assert told["data"].startswith("workers hold different data: the number of examples of data ")
    assert told["batches"].startswith("batch: the ranks give 1, 2 batches; each must give as ")
    first = int((batch_of(1, 0)[1] == 3).nonzero()[0])
    assert told["labels"].startswith(f"batch: example {first} has label 4, but the model has 4 ")
    assert told["passes"].startswith("criterion: takes passes of its own, which need a network ")


# -- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cubic", "linear", "geometric", "one_shot"])
def test_the_sparsity_follows_its_schedule(schedule: str) -> None:
    """By the formulas of Zhu and Gupta 2017 and of geometric pruning, written out."""
    model = built(Net)
    pruner = gbp_ray.Pruner(
        model, sparsity=0.75, start=2, end=9, every=3, schedule=schedule, criterion="magnitude"
    )
    number = sum(p.numel() for p in weights_of(model).values())
    shares = {5: 1 / 3, 8: 2 / 3, 9: 1.0}
    formulas: dict[str, Callable[[float], float]] = {
        "cubic": lambda t: 0.75 - 0.75 * (1 - t) ** 3,
        "linear": lambda t: 0.75 * t,
        "geometric": lambda t: 1 - 0.25**t,
        "one_shot": lambda t: 0.75,
    }
    pruned = 0
    for step in range(1, 12):
        is_due = pruner.is_due
        assert is_due == (step in shares)
        has_pruned = pruner.step()
        if is_due:
            pruned = round(formulas[schedule](shares[step]) * number)
        assert has_pruned == is_due
        zeros = sum(int((p == 0).sum()) for p in weights_of(model).values())
        assert zeros == pruned == round(pruner.sparsity * number)
    assert pruner.num_steps == 11
    assert repr(pruner) == (
        f"<Pruner by magnitude to 75.00% at step 9, now at step 11: 75.00% of {number:,} weights>"
    )


def test_a_decision_is_made_on_the_batches_of_its_step() -> None:
    """Gradients of all examples of both batches, at the weights of the moment."""
    model = built(Net)
    batches = [batch_of(1, 0), batch_of(1, 1)]
    inputs, targets = (torch.cat(columns) for columns in zip(*batches, strict=True))
    twin = copy.deepcopy(model).eval()
    functional.cross_entropy(twin(inputs), targets).backward()
    scores = {name: (p * p.grad).abs().detach() for name, p in weights_of(twin).items()}
    pruner = gbp_ray.Pruner(model, sparsity=0.6, end=1, criterion="taylor")
    assert pruner.step(*batches)
    wanted = lowest(scores, round(0.6 * sum(s.numel() for s in scores.values())))
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in wanted.items())


def test_movement_is_gathered_from_what_the_optimizer_is_given() -> None:
    model = built(Net)
    optimizer = optimizer_of(model, "sgd")
    pruner = pruner_of(model, optimizer, "movement", sparsity=0.5, start=0, end=4, every=2)
    moved: dict[str, Tensor] = {}
    for step in range(1, 5):
        inputs, targets = batch_of(step, 0)
        functional.cross_entropy(model(inputs), targets).backward()
        for name, p in weights_of(model).items():
            own = -(p.detach().double() * p.grad.double())
            moved[name] = moved.get(name, torch.zeros_like(own)) + own
        optimizer.step()
        before = pruner.masks
        if pruner.step():
            gone = {n: s.float().masked_fill(~before[n], -torch.inf) for n, s in moved.items()}
            wanted = lowest(gone, pruner.masks.num_pruned)
            assert all(torch.equal(pruner.masks[n], mask) for n, mask in wanted.items())
            moved = {}
        optimizer.zero_grad()
    assert pruner.masks.round == 2


@pytest.mark.parametrize("is_fused", [False, True])
def test_movement_is_the_same_under_a_scaler_that_grows_and_skips(is_fused: bool) -> None:
    """Fused optimizers are given scaled gradients, and skip a step by themselves."""

    def masks(scaler: torch.amp.GradScaler | None) -> gbp_ray.MaskSet:
        model = built(Net)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=is_fused)
        pruner = pruner_of(model, optimizer, "movement", sparsity=0.5, start=0, end=6, every=6)
        for step in range(1, 7):
            inputs, targets = batch_of(step, 0)
            is_skipped = step == 2
            loss = functional.cross_entropy(model(inputs), targets)
            loss = loss * torch.inf if is_skipped else loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            elif not is_skipped:
                optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        return pruner.masks

    # Powers of two change no bit.
    assert masks(torch.amp.GradScaler("cpu", 16.0, growth_interval=1)) == masks(None)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_pruned_weights_and_the_state_for_them_stay_zero(kind: str) -> None:
    model = built(Net)
    optimizer = optimizer_of(model, kind)
    pruner = pruner_of(model, optimizer, "taylor", start=0, end=4, every=2)
    keys = {"sgd": {"momentum_buffer"}, "adam": {"exp_avg", "exp_avg_sq"}}[kind]
    for step in range(1, 9):
        batch = batch_of(step, 0)
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        if pruner.masks.round:
            assert pruner.masks.find_revived(model) is None, "before pruner.step, too"
        pruner.step(batch)
        for name, p in weights_of(model).items():
            gone = ~pruner.masks[name]
            assert (p[gone] == 0).all()
            state = {k: v for k, v in optimizer.state[p].items() if v.shape == p.shape}
            assert state.keys() == keys
            assert all((value[gone] == 0).all() for value in state.values())
            assert any((value[~gone] != 0).any() for value in state.values())
        optimizer.zero_grad()
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)


def test_without_the_optimizer_each_step_sets_pruned_weights_back_to_zero() -> None:
    model = built(Net)
    optimizer = optimizer_of(model)
    pruner = gbp_ray.Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
    pruner.step()
    batch = batch_of(1, 0)
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    assert pruner.masks.find_revived(model) is not None
    pruner.step()
    assert pruner.masks.find_revived(model) is None


def test_a_decision_leaves_gradients_modes_and_draws_as_they_were() -> None:
    model = built(Net)
    model.body.eval()
    batch = batch_of(1, 0)
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    held, draws = [p.grad for p in model.parameters()], torch.get_rng_state()
    with torch.no_grad():
        gbp_ray.Pruner(model, sparsity=0.5, end=1).step(batch)
    for p, gradient, copied in zip(model.parameters(), held, before, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, copied)
    assert torch.equal(draws, torch.get_rng_state())
    assert model.training
    assert not model.body.training


@pytest.mark.parametrize("criterion", ["taylor", "movement", "random"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_training_that_goes_on_elsewhere_ends_in_the_same_bits(criterion: str, kind: str) -> None:
    def make() -> tuple[nn.Module, Any, gbp_ray.Pruner]:
        model = built(Net)
        optimizer = optimizer_of(model, kind)
        return model, optimizer, pruner_of(model, optimizer, criterion)

    def go_on(made: tuple[nn.Module, Any, gbp_ray.Pruner], steps: range) -> None:
        model, optimizer, pruner = made
        for step in steps:
            batch = batch_of(step, 0)
            functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            pruner.step(batch)
            optimizer.zero_grad()

    whole = make()
    go_on(whole, range(1, NUM_STEPS + 1))
    for stop in range(1, NUM_STEPS):
        first, second = make(), make()
        go_on(first, range(1, stop + 1))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        # In either order.
        for number in (2, 0, 1) if stop % 2 else (0, 1, 2):
            second[number].load_state_dict(states[number])
        go_on(second, range(stop + 1, NUM_STEPS + 1))
        for one, other in zip(second[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(one, other)
        assert second[2].masks == whole[2].masks
        assert second[2].masks.parent == whole[2].masks.parent
        assert repr(second[2]) == repr(whole[2])


class Wrapped(torch.optim.Optimizer):
    """Holds another optimizer, as those of accelerate and Lightning do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_an_optimizer_inside_another_is_found() -> None:
    model = built(Net)
    inner = optimizer_of(model)
    pruner = gbp_ray.Pruner(model, sparsity=0.5, end=1, optimizer=Wrapped(inner))
    pruner.step(batch_of(1, 0))
    model(batch_of(2, 0)[0]).sum().backward()
    inner.step()
    assert pruner.masks.find_revived(model) is None


MAKE: dict[str, tuple[dict[str, Any], str]] = {
    "end": ({"end": 0}, "end = 0: must be a whole number from 1 on (above start)"),
    "start": ({"start": 9}, "end = 6: must be a whole number from 10 on (above start)"),
    "every": ({"every": 0}, "every = 0: must be a whole number from 1 on"),
    "sparsity": ({"sparsity": -1}, "sparsity = -1: should be greater than or equal to 0"),
    "schedule": ({"schedule": "cubik"}, "schedule = 'cubik': not allowed, did you mean 'cubic'?"),
    "criterion": ({"criterion": "synflow"}, "criterion = synflow: takes an example of a data set"),
    "movement": ({"criterion": "movement"}, "optimizer: criterion = movement gathers its scores "),
    "optimizer": ({"optimizer": 3}, "optimizer: must be a torch.optim.Optimizer, not int"),
    "other optimizer": (
        {"optimizer": optimizer_of(built(Net))},
        "optimizer: holds none of the model's prunable weights; ",
    ),
    "seed": ({"seed": -1}, "seed = -1: must be a whole number from 0 on"),
    "exclude": ({"exclude": "conf*"}, "exclude = 'conf*': matches no parameter"),
    "argument": ({"colate": None}, "colate: is no argument"),
}


@pytest.mark.parametrize("name", MAKE)
def test_arguments_that_cannot_be_right_are_refused(name: str) -> None:
    fields, text = MAKE[name]
    with pytest.raises(GbpError) as caught:
        gbp_ray.Pruner(built(Net), **{"sparsity": 0.5, "end": 6, **fields})
    assert str(caught.value).startswith(text)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets) * len(targets)


INPUTS, TARGETS = batch_of(1, 0)
STEP: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no batch": ((), {}, "batch: criterion = taylor reads the batches of the training loop; "),
    "labels": (((INPUTS, TARGETS + 1),), {}, "batch: example "),
    "shapes": (((INPUTS[:, :1], TARGETS),), {}, "batch: a pass of 6 examples failed with "),
    "dict": (
        ({"pixels": INPUTS, "labels": TARGETS},),
        {},
        "batch: a pass of 6 examples failed with TypeError: ",
    ),
    "loss": (
        ((INPUTS, TARGETS),),
        {"loss": lambda outputs, targets: outputs},
        "loss: must return the mean over the batch, a scalar tensor, not torch.float32 of ",
    ),
    "sum": (
        ((INPUTS, TARGETS),),
        {"loss": summed},
        "loss: is a sum over the batch, ",
    ),
    "detached": (
        ((INPUTS, TARGETS),),
        {"forward": lambda model, batch: model(batch[0]).detach()},
        "loss: depends on no prunable weight, so that all scores would be 0; ",
    ),
    "ignored": (
        ((INPUTS, TARGETS),),
        {"count": lambda targets: 0},
        "batch: holds no label that counts; give one that does",
    ),
}


@pytest.mark.parametrize("name", STEP)
def test_a_batch_that_does_not_suit_is_refused_at_the_first_step(name: str) -> None:
    batches, fields, text = STEP[name]
    model = built(Net)
    pruner = gbp_ray.Pruner(model, sparsity=0.5, end=100, every=50, **fields)
    with pytest.raises(GbpError) as caught:
        pruner.step(*batches)
    assert str(caught.value).startswith(text), str(caught.value)
    assert pruner.num_steps == 0
    assert pruner.masks.find_revived(model) is None


def taylor_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    functional.cross_entropy(model(inputs), labels).backward()
    return {name: (p * p.grad).abs() for name, p in weights_of(model).items()}


def fisher_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the labelled examples, one by one."""
    found = {name: torch.zeros_like(p) for name, p in weights_of(model).items()}
    for row in (labels != -100).nonzero().flatten().tolist():
        model.zero_grad()
        functional.cross_entropy(model(inputs[row][None]), labels[row][None]).backward()
        for name, p in weights_of(model).items():
            found[name] += p.detach().square() * p.grad.square()
    return found


@pytest.mark.parametrize(("criterion", "formula"), [("taylor", taylor_of), ("fisher", fisher_of)])
def test_dict_batches_go_through_forward_and_count(criterion: str, formula: Any) -> None:
    """A batch with ignored labels weighs as many items as it has labels."""
    model = built(Net)
    batches = [{"pixels": x, "labels": y} for x, y in (batch_of(1, 0), batch_of(1, 1))]
    batches[0]["labels"][1:] = -100
    inputs, labels = (torch.cat([b[key] for b in batches]) for key in ("pixels", "labels"))
    scores = formula(copy.deepcopy(model).eval(), inputs, labels)
    pruner = gbp_ray.Pruner(
        model,
        sparsity=0.6,
        end=1,
        criterion=criterion,
        forward=lambda model, batch: model(batch["pixels"]),
        loss=lambda outputs, batch: functional.cross_entropy(outputs, batch["labels"]),
        count=lambda batch: (batch["labels"] != -100).sum(),
    )
    pruner.step(*batches)
    wanted = lowest(scores, round(0.6 * sum(s.numel() for s in scores.values())))
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in wanted.items())


def test_a_state_of_other_arguments_or_networks_is_refused() -> None:
    state = gbp_ray.Pruner(built(Net), sparsity=0.5, end=6).state_dict()
    for fields, text in (
        ({"end": 7}, "end = 7: the state was saved with end = 6; make the Pruner with the same "),
        ({"exclude": "head*"}, "exclude = ['head*']: the state was saved with exclude = []"),
    ):
        with pytest.raises(GbpError) as caught:
            gbp_ray.Pruner(built(Net), **{"sparsity": 0.5, "end": 6, **fields}).load_state_dict(
                state
            )
        assert str(caught.value).startswith(text)
    with pytest.raises(GbpError, match="has no"):
        gbp_ray.Pruner(nn.Linear(2, 3), sparsity=0.5, end=6).load_state_dict(state)
    for cut in ({"format": 1}, {k: v for k, v in state.items() if k != "masks"}):
        with pytest.raises(GbpError, match=r"^state: must be what Pruner\.state_dict\(\) returned"):
            gbp_ray.Pruner(built(Net), sparsity=0.5, end=6).load_state_dict(cut)
    with pytest.raises(GbpError, match=r"^state: must be what Pruner\.state_dict\(\) returned"):
        gbp_ray.Pruner(built(Net), sparsity=0.5, end=6).load_state_dict({})


def test_a_network_that_was_changed_since_is_refused() -> None:
    model = built(Net)
    pruner = gbp_ray.Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
    model.head = nn.Linear(12, 4)
    with pytest.raises(GbpError, match=r"^model: 'head.weight' is another parameter than when"):
        pruner.step()


class Carrying(Net):
    """Takes a dict and returns its loss, as networks of Hugging Face do."""

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(pixels)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_a_loss_that_outputs_carry_is_taken() -> None:
    pairs = [batch_of(1, 0), batch_of(1, 1)]
    pairs[0][1][:2] = -100
    plain = gbp_ray.Pruner(
        built(Net),
        sparsity=0.6,
        end=1,
        loss=lambda logits, labels: functional.cross_entropy(logits, labels),
        count=lambda labels: (labels != -100).sum(),
    )
    plain.step(*pairs)
    carrying = gbp_ray.Pruner(built(Carrying), sparsity=0.6, end=1)
    carrying.step(*({"pixels": x, "labels": y} for x, y in pairs))
    assert carrying.masks == plain.masks
