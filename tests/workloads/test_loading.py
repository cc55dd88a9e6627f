"""The bring-your-own contract: what is refused before training, and which example goes where."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from gbp_ray.config.job import load_job
from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.errors import ConfigError, GbpError, WorkloadError
from gbp_ray.pruning.analysis import _name_classes
from gbp_ray.results.findings import Findings
from gbp_ray.runtime.api import SweepResult
from gbp_ray.runtime.outcomes import Outcome
from gbp_ray.workloads.checks import blaming_labels, check_finite, check_labels, check_workload
from gbp_ray.workloads.code import add_import_paths, import_attribute
from gbp_ray.workloads.contract import Workload, count_top1, num_examples
from gbp_ray.workloads.data import first_example, take_batch, without_loaders
from gbp_ray.workloads.loading import build_network, load_workload
from gbp_ray.workloads.metrics import Metric

INPUTS = torch.arange(40, dtype=torch.float32).view(10, 4)
TARGETS = torch.arange(10) % 3


def make_workload(**changed: Any) -> Workload:
    values: dict[str, Any] = {
        "build_model": lambda: nn.Linear(4, 3),
        "train": (INPUTS, TARGETS),
        "test": (INPUTS[:5], TARGETS[:5]),
    }
    return Workload(**(values | changed))


def refusal(kind: type[GbpError], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


# -- finding a factory -----------------------------------------------------------------------------

MODULE = """
import sys
import random
import numpy as np
from torch import nn
import torch
from gbp_ray import Workload, WorkloadError

def make(depth, width=4, *, is_wide=False):
    data = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    return Workload(build_model=lambda: nn.Linear(4, depth), train=data, test=data)

def free(**options):
    return make(depth=options.get("depth", 3))

def fail():
    raise RuntimeError("first line\\nsecond line")

def leave():
    sys.exit(3)

def refuse():
    raise WorkloadError("workload.options.x: must be even")

def open_missing():
    open("/no/such/data.bin")

def miss_without_a_name():
    raise FileNotFoundError("no data here")

def wrong():
    return nn.Linear(1, 1)

class Maker:
    def __call__(self, depth):
        return make(depth)

maker = Maker()
answer = 42

def drawn():
    draws = [torch.rand(1).item(), np.random.rand(), random.random()]
    data = torch.tensor([IMPORTED + draws]), torch.zeros(1, dtype=torch.long)
    return Workload(build_model=nn.Flatten, train=data, test=data)

IMPORTED = [torch.rand(1).item(), np.random.rand(), random.random()]
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "module_of_a_user"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("raise ValueError('one\\ntwo')")
    (tmp_path / "leaving_module.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "needy_module.py").write_text("import a_package_nobody_has")
    (tmp_path / "unfinished_module.py").write_text("def make(:")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield name
    for module in (name, "leaving_module", "broken_module", "needy_module", "unfinished_module"):
        sys.modules.pop(module, None)


def load(factory: str, **options: Any) -> Workload:
    return load_workload(WorkloadConfig(factory=factory, options=options))


def test_a_factory_is_called_with_the_options(user_module: str) -> None:
    workload = load(f"{user_module}:make", depth=7, is_wide=True)
    assert workload.build_model().weight.shape == (7, 4)
    assert load(f"{user_module}:free", depth=5).build_model().weight.shape == (5, 4)
    assert load(f"{user_module}:maker", depth=2).build_model().weight.shape == (2, 4)


@pytest.mark.parametrize("silence", ["pass", "warnings.simplefilter('ignore')"])
def test_user_code_neither_moves_the_working_folder_nor_hides_the_warning_of_it(
    user_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silence: str
) -> None:
    """Relative paths, that of the storage for one, would lead elsewhere."""
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    step = f"os.chdir('below'); {silence}"
    lines = [
        "import os, warnings",
        "from torch import nn",
        "from gbp_ray import Workload",
        step,
    ]
    lines += ["def build():", f"    {step}", "    return nn.Linear(1, 1)"]
    lines += ["def make():", f"    {step}", "    return Workload(build, None, None)"]
    (tmp_path / "broken_module.py").write_text("\n".join(lines))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        build_network(load("broken_module:make"))
        warnings.warn_explicit("noise", UserWarning, "other.py", 1, "other")
    told = [str(warning.message) for warning in caught]
    assert len([text for text in told if "changes the working folder to '" in text]) == 3
    # The user's own rule holds for the warnings of others.
    assert ("noise" in told) == (silence == "pass")
    assert Path.cwd() == tmp_path


def test_channels_last_changes_the_layout_and_refuses_what_is_no_image() -> None:
    def example_of(factory: str, *, is_last: bool) -> Tensor:
        config = WorkloadConfig(factory=f"gbp_ray.zoo:{factory}", channels_last=is_last)
        inputs: Tensor = first_example(load_workload(config)).inputs
        return inputs

    one, other = (example_of("digits_convnet", is_last=is_last) for is_last in (False, True))
    assert torch.equal(one, other)
    # Convolutions choose by the strides, also of a single channel.
    layouts = [
        nn.Conv2d(1, 4, 3)(inputs).is_contiguous(memory_format=torch.channels_last)
        for inputs in (one, other)
    ]
    assert layouts == [False, True]
    with pytest.raises(ConfigError, match=r"workload.channels_last = true: .* no images"):
        example_of("text_lm", is_last=True)


def test_what_a_factory_draws_depends_on_the_seed_of_the_job_only(user_module: str) -> None:
    def draws(seed: int | None) -> list[float]:
        config = WorkloadConfig(factory=f"{user_module}:drawn")
        return load_workload(config, seed).train[0].flatten().tolist()

    first = draws(3)
    assert draws(3) == first
    sys.modules.pop(user_module)
    assert draws(3) == first, "importing it again drew something else"
    imported, called = draws(4)[:3], draws(4)[3:]
    assert imported == first[:3]
    assert set(called).isdisjoint(first[3:])


@pytest.mark.parametrize(
    ("factory", "options", "kind", "parts"),
    [
        (
            "no_such_module_at_all:make",
            {},
            ConfigError,
            ["no module named 'no_such_module_at_all'"],
        ),
        ("gbp_ray.zo:digits", {}, ConfigError, ["no module named 'gbp_ray.zo'"]),
        ("{}:mak", {}, ConfigError, ["has no 'mak'", "did you mean 'make'"]),
        ("{}:answer", {}, ConfigError, ["is not callable"]),
        ("{}:make", {}, ConfigError, ["workload.options.depth: is required"]),
        (
            "{}:make",
            {"depth": 1, "widht": 2},
            ConfigError,
            ["workload.options.widht", "did you mean 'width'", "allowed: depth, width, is_wide"],
        ),
        ("{}:fail", {"x": 1}, ConfigError, ["workload.options.x", "allowed: none"]),
        ("{}:fail", {}, WorkloadError, ["raised RuntimeError: first line second line"]),
        ("{}:leave", {}, WorkloadError, ["raised SystemExit: 3"]),
        ("leaving_module:make", {}, ConfigError, ["raised SystemExit: 3"]),
        ("{}:refuse", {}, WorkloadError, ["workload.options.x: must be even"]),
        ("{}:open_missing", {}, WorkloadError, ["'/no/such/data.bin' does not exist"]),
        ("{}:miss_without_a_name", {}, WorkloadError, ["no data here"]),
        ("{}:wrong", {}, WorkloadError, ["returned Linear", "must return a gbp_ray.Workload"]),
        ("broken_module:make", {}, ConfigError, ["raised ValueError: one two"]),
        ("needy_module:make", {}, ConfigError, ["no module named 'a_package_nobody_has'"]),
        ("unfinished_module:make", {}, ConfigError, ["raised SyntaxError"]),
        ("gbp_ray..zoo:make", {}, ConfigError, ["gbp_ray..zoo"]),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(
    user_module: str, factory: str, options: dict[str, Any], kind: type[GbpError], parts: list[str]
) -> None:
    text = refusal(kind, lambda: load(factory.format(user_module), **options))
    for part in parts:
        assert part in text


def test_an_attribute_is_resolved_for_the_field_that_names_it() -> None:
    assert import_attribute("math:sqrt", "prune.criterion")(9.0) == 3.0
    text = refusal(ConfigError, lambda: import_attribute("math:sqr", "prune.criterion"))
    assert text.startswith("prune.criterion = 'math:sqr'")


def test_import_paths_are_added_once_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/first", "/there"])
    add_import_paths(["/there", "/new", "/new"])
    assert sys.path == ["/first", "/there", "/new"]


def fail_to_build() -> nn.Module:
    raise ValueError("one\ntwo")


def share_memory(model: nn.Sequential) -> nn.Sequential:
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    return model


NO_NETWORK: dict[str, tuple[Callable[[], object], str]] = {
    "raises": (fail_to_build, "raised ValueError: one two"),
    "ends the process": (lambda: sys.exit(3), "raised SystemExit: 3"),
    "a class": (lambda: nn.Linear, "returned type; it must return a torch.nn.Module"),
    "nothing": (lambda: None, "returned NoneType; it must"),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyLinear(3)), ": '0.weight' of the network has no"),
    "memory in two parameters": (
        lambda: share_memory(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))),
        ": '0.weight' and '1.weight' share memory without being one parameter",
    ),
    "a lazy buffer": (lambda: nn.LazyBatchNorm1d(affine=False), ": 'running_mean' of the network"),
}


@pytest.mark.parametrize("case", NO_NETWORK)
def test_a_network_that_cannot_be_built_is_refused(case: str) -> None:
    build, part = NO_NETWORK[case]
    text = refusal(WorkloadError, lambda: build_network(make_workload(build_model=build)))
    assert text.startswith("workload.build_model")
    assert part in text


def test_a_network_is_handed_over_as_built() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    # Columns of one matrix share memory, and no number.
    columns = torch.rand(3, 7).split([4, 3], dim=1)
    for layer, part in zip(model, columns, strict=True):
        layer.weight = nn.Parameter(part)
    assert build_network(make_workload(build_model=lambda: model)) is model


# -- what no job can use ---------------------------------------------------------------------------


class Squares(Dataset):
    def __init__(self, size: int, top: int = 3) -> None:
        self.size, self.top = size, top

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), float(index**2)), index % self.top


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield torch.zeros(4), 0


def fail_to_augment(inputs: Tensor) -> Tensor:
    raise RuntimeError("augment\nbroke")


class Labelled(Dataset):
    """Zeros, each with its own label."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return torch.zeros(4), self.labels[index]


class Broken(Labelled):
    """Zeros, of which the sixth cannot be read."""

    def __init__(self) -> None:
        super().__init__([0] * 8)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index == 5:
            raise OSError(5, "no\nluck")
        return super().__getitem__(index)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def fail_on_the_last(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, labels = (torch.stack([torch.as_tensor(i[n]) for i in items]) for n in (0, 1))
    if bool((inputs[:, 0] == Squares(30)[29][0][0]).any()):
        raise ValueError("no room")
    return inputs, labels


def plain_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def hard_half(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def overlap(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 - Dice of a whole batch, class by class."""
    shares = outputs.softmax(dim=1)
    labels = functional.one_hot(targets, 3).movedim(-1, 1)
    both, each = (shares * labels).sum(dim=(0, 2)), (shares + labels).sum(dim=(0, 2))
    return 1 - (2 * both / each).mean()


class Positions(nn.Linear):
    """Gives each of five positions the same outputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).unsqueeze(2).expand(-1, -1, 5)


EMPTY = (INPUTS[:0], TARGETS[:0])
COUNT = ["workload.count_correct: "]
SQUARED = {"loss": functional.mse_loss}
ANY_LOSS = {"loss": lambda o, t: o.mean()}
LINE = {"model": nn.Linear(4, 1)}
FLAT = {"model": nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))}
WIDE = {"model": Positions(4, 3)}
POSITIONS = torch.arange(50).view(10, 5) % 3
ALIKE = nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(0, 1e-9))
APART, NEST = "examples 0 and 3 cannot be put into one batch", "examples are (input, target)"


LABELLED = (torch.arange(40).view(10, 4) % 3).where(
    torch.arange(4) < torch.arange(10).view(-1, 1) % 4 + 1, -100
)


def ZERO(outputs: Tensor, targets: Tensor) -> int:
    return 0


UNUSABLE = {
    "no training examples": ({"train": EMPTY}, ["workload.train: holds no examples"]),
    "no test examples": ({"test": EMPTY}, ["workload.test: holds no examples"]),
    "empty data set": ({"train": Squares(0)}, ["workload.train: holds no examples"]),
    "label too high": (
        {"train": (INPUTS, TARGETS + 1)},
        ["workload.train: labels run from 1 to 3", "3 outputs (allowed: 0 to 2)"],
    ),
    "label too high, late": (
        {"train": (INPUTS, torch.tensor([0] * 9 + [3]))},
        ["workload.train: labels run from 0 to 3"],
    ),
    "label too low": ({"train": (INPUTS, TARGETS - 1)}, ["workload.train: labels run from -1"]),
    "test label too high": (
        {"test": (INPUTS, torch.tensor([0] * 9 + [3]))},
        ["workload.test: labels run from 0 to 3"],
    ),
    "label of a data set": ({"train": Squares(9, top=4)}, ["workload.train: labels run from 0 to"]),
    "label of an array": (
        {"train": (INPUTS.numpy(), TARGETS.numpy() + 1)},
        ["workload.train: labels run from 1 to 3"],
    ),
    "input shape": ({"train": (INPUTS[:, :3], TARGETS)}, ["workload.train", "RuntimeError"]),
    "test input shape": ({"test": (INPUTS[:, :3], TARGETS)}, ["workload.test", "RuntimeError"]),
    "fewer targets": ({"train": (INPUTS, TARGETS[:9])}, ["has 10 inputs but 9 targets"]),
    "three columns": ({"train": (INPUTS, TARGETS, TARGETS)}, ["must be (inputs, targets), not 3"]),
    "stream": ({"train": Stream()}, ["workload.train: its examples cannot be counted"]),
    "nothing": ({"test": None}, ["workload.test: its examples cannot be counted"]),
    "list of columns": (
        {"train": [INPUTS, TARGETS]},
        ["workload.train: the items of examples 0 and 1", "(10, 4)", "(10,)"],
    ),
    "integer inputs": ({"train": (INPUTS.long(), TARGETS)}, ["workload.train", "RuntimeError"]),
    "loss by example": (
        {"loss": lambda o, t: functional.cross_entropy(o, t, reduction="none")},
        ["workload.loss: must return the mean", "(8,)"],
    ),
    "loss as a number": (
        {"loss": lambda o, t: functional.cross_entropy(o, t).item()},
        ["workload.loss: must return the mean", "not float"],
    ),
    "loss fails": ({"loss": lambda o, t: o / "x"}, ["TypeError"]),
    "accuracy for a count": (
        {"count_correct": lambda o, t: (o.argmax(1) == t).float().mean()},
        ["workload.count_correct", "float32"],
    ),
    "counts by example": (
        {"count_correct": lambda o, t: o.argmax(1) == t},
        ["workload.count_correct", "(8,)"],
    ),
    "no count": ({"count_correct": lambda o, t: None}, ["workload.count_correct", "NoneType"]),
    "prepare fails": ({"prepare": lambda x: x.nope}, ["AttributeError"]),
    "augment drops": ({"augment": lambda x: x[:2]}, ["workload.augment", "one tensor of 8 inputs"]),
    "augment wraps": ({"augment": lambda x: {"x": x}}, ["workload.augment", "a dict with keys"]),
    "augment fails": ({"augment": fail_to_augment}, ["workload.augment raised RuntimeError"]),
    # A metric that cannot be true.
    **{
        f"top-1 of {what}": ({"train": (INPUTS[: len(targets)], targets), **more}, [*COUNT, *parts])
        for what, targets, more, parts in (
            ("one column", TARGETS.float().view(-1, 1), SQUARED | LINE, ["(8, 1)"]),
            ("a flat output", TARGETS.float(), SQUARED | FLAT, ["(8,)"]),
            ("one class", TARGETS * 0, LINE, ["(8, 1)"]),
            ("many labels", INPUTS[:, :3], SQUARED, ["(8, 3)"]),
            ("soft labels", INPUTS[:, :3].softmax(1), {}, ["(8, 3)"]),
            ("a column that fits one example", TARGETS[:1].view(1, 1), ANY_LOSS, ["(1, 1)"]),
            ("numbers that are no labels", TARGETS + 0.5, ANY_LOSS, ["float32"]),
        )
    },
    "more right than there are": ({"count_correct": lambda o, t: 9}, [*COUNT, "9 right", "0 to 8"]),
    "fewer than none": ({"count_correct": lambda o, t: -1}, [*COUNT, "-1 right"]),
    "right answers by position": (
        {"train": (INPUTS, POSITIONS), "loss": lambda o, t: o.mean(), **WIDE}
        | {"count_correct": lambda o, t: ((o.argmax(1) == t) & (o.amax(1) == 1)).sum()},
        [*COUNT, "40 right answers among 8", "leave it out"],
    ),
    "a count that is spread over": (
        {"count_correct": lambda o, t: (o.argmax(1) == t.view(-1, 1)).sum() // 8},
        [*COUNT, "is no sum over examples"],
    ),
    "targets that are spread over": (
        {"train": (INPUTS, TARGETS.float().view(-1, 1)), "count_correct": ZERO, **SQUARED, **FLAT},
        ["workload.loss", "outputs torch.float32 of shape (8,)", "(8, 1)", "squeeze(1)"],
    ),
    "targets that are spread over unseen": (
        {"train": (INPUTS, INPUTS[:, 1:2]), "loss": lambda o, t: ((o - t) ** 2).mean()}
        | {"count_correct": ZERO, **FLAT},
        ["workload.loss: the loss is no mean over examples", "(8, 1)"],
    ),
    # A mean over something else.
    "a sum": (
        {"loss": partial(functional.cross_entropy, reduction="sum")},
        ["workload.loss: is a"],
    ),
    "a sum unseen": ({"loss": summed}, ["workload.loss: is a sum over the batch", "divide it by"]),
    "hidden weights of classes": (
        {"loss": lambda o, t: functional.cross_entropy(o, t, weight=torch.tensor([1.0, 9, 1]))}
        | {"train": (INPUTS, TARGETS * 0)},
        ["workload.loss: the loss is no mean over examples", "count=len"],
    ),
    # The untrained network says nearly the same of all examples.
    "a mean over the hard half": (
        {"loss": hard_half, "model": ALIKE},
        ["workload.loss: the loss is no mean over examples"],
    ),
    "overlap over the whole batch": (
        {
            "loss": overlap,
            "train": (INPUTS, POSITIONS),
            **WIDE,
            "test": (INPUTS, POSITIONS),
            "prepare": torch.zeros_like,
        },
        ["workload.loss: the loss is no mean over examples"],
    ),
    "another count than the loss has": (
        {"loss": plain_loss, "count": lambda t: (t + 1).sum()},
        ["workload.count: the loss is no mean over what it counts"],
    ),
    "a count below zero": ({"count": lambda t: -1}, ["workload.count: must return", "not -1"]),
    "a count of many": ({"count": lambda t: t, "loss": plain_loss}, ["workload.count: the loss"]),
    "a count of nothing": ({"count": lambda t: None}, ["workload.count: must", "NoneType"]),
    "narrow labels": (
        {"train": (INPUTS, TARGETS.int())},
        ["workload.train: labels are torch.int32", "torch.int64"],
    ),
    "wide inputs": ({"train": (INPUTS.double(), TARGETS)}, ["torch.float64", "workload.prepare"]),
    # Items and columns of other kinds.
    **{
        f"item: {what}": ({"train": [(INPUTS[0], 0)] * 3 + [item]}, ["workload.train: ", *parts])
        for what, item, parts in (
            ("a dict", {"x": INPUTS[0], "y": 1}, [APART, "the inputs", "(4,) and none there"]),
            ("three", (INPUTS[0], 1, 2), [APART, "the inputs", "none there"]),
            ("nothing", None, ["ple 3: its item is NoneType", NEST]),
            ("empty", {}, ["ple 3 is a dict with keys ", "holds no tensor"]),
            ("dict inputs", ({"x": INPUTS[0]}, 1), [APART, "none there"]),
            ("two inputs", ((INPUTS[0], INPUTS[1]), 1), [APART, "none there"]),
            ("a word", (INPUTS[0], "cat"), ["ple 3: its target is str", NEST]),
            ("objects", (np.array([None] * 4), 1), ["ple 3: its input is object", NEST]),
            ("another shape", (INPUTS[0, :3], 1), ["amples 0 and 3", "(4,)", "(3,)"]),
            ("another dtype", (INPUTS[0], 1.0), ["the targets of examples 0 and 3", "int64"]),
        )
    },
    "item that cannot be read": (
        {"test": Labelled([0, 1, 2]), "train": Squares(9), "validation": Broken()},
        ["workload.validation: example 5 cannot be read", "OSError: [Errno 5] no", "mend"],
    ),
    # Batches and metrics of the workload's own.
    "a dict without what the network wants": (
        {"train": [{"x": INPUTS[0]}] * 4},
        ["workload.train: one batch", "'x'", "forward(model, batch)"],
    ),
    "three in a row": (
        {"train": [(INPUTS[0], 1, 2)] * 4},
        ["workload.forward: a batch is a tuple of 3", "forward(model, batch)"],
    ),
    "three in a row without a loss": (
        {"train": [(INPUTS[0], 1, 2)] * 4, "forward": lambda m, b: m(b[0])},
        ["workload.loss: cross entropy takes a tensor of labels, not a tuple of 3", "a loss("],
    ),
    "a dict without a loss": (
        {"train": [{"input": INPUTS[0], "labels": 1}] * 4, "forward": lambda m, b: m(b["input"])},
        ["workload.loss: outputs (torch.float32 of shape (4, 3)) carry no loss", "a loss(outputs"],
    ),
    "a collate that fails on one": (
        {"train": Squares(30), "collate": fail_on_the_last},
        ["workload.collate raised ValueError: no room on example 29 of workload.train"],
    ),
    "a collate that fails on several": (
        {"train": Squares(9), "collate": lambda items: torch.stack(items)},
        ["workload.collate raised", "of workload.train"],
    ),
    "a collate that returns nothing": (
        {"train": Squares(9), "collate": lambda items: None},
        ["workload.collate: returned NoneType for 8 examples of workload.train"],
    ),
    "a name that is no metric": (
        {"metrics": ["acuracy"]},
        ["workload.metrics: there is no 'acuracy', did you mean 'accuracy'?", "perplexity"],
    ),
    "a metric for other shapes": (
        {"metrics": ["rmse"]},
        ["workload.metrics: rmse compares outputs with targets of the same shape", "(8, 3)"],
    ),
    "a metric that fails": (
        {"metrics": [Metric("m", lambda o, t: o.nope, float)]},
        ["workload.metrics: m raised AttributeError", "workload.train"],
    ),
    "a metric of a number": (
        {"metrics": [Metric("m", lambda o, t: 3.0, float)]},
        ["workload.metrics: m.update must return the batch's sums, a tensor", "float"],
    ),
    "a metric that computes a tensor": (
        {"metrics": [Metric("m", lambda o, t: o.new_ones(2), lambda sums: sums)]},
        ["workload.metrics: m.compute must return a float", "of shape (2,)"],
    ),
    "a mean in place of sums": (
        {"metrics": [Metric("m", lambda o, t: o.mean().view(1), float)]},
        ["workload.metrics: m.update is no sum over examples"],
    ),
    "a share above one": (
        {"metrics": [Metric("m", lambda o, t: o.new_ones(1) * len(o), float, unit="%")]},
        ["workload.metrics: m is 8 on workload.train", "[0, 1]"],
    ),
    "a metric that changes outputs": (
        {"metrics": [Metric("m", lambda o, t: o.mul_(0).sum(0), lambda sums: float(sums[0]))]},
        ["workload.metrics: m.update changes outputs or targets in place"],
    ),
    "the best five of three": ({"metrics": ["top5"]}, ["top5 of 3 classes is always 100 %"]),
    "a forward that is none": ({"forward": 3}, ["workload.forward: must be a function, not int"]),
    "a collate that leaves one out": (
        {"train": Squares(9), "collate": lambda items: default_collate(items[1:])},
        ["workload.collate: makes 7 rows of 8 examples of workload.train", "Workload a count"],
    ),
    "a collate that leaves items out": (
        {"train": Squares(9), "collate": lambda items: default_collate(items[-4:])}
        | {"count": lambda targets: len(targets) + 0.5, "loss": plain_loss},
        ["workload.collate: 8 examples of workload.train have 6 items in one batch, and 12 one"],
    ),
    "numbers for cross entropy": (
        {"train": (INPUTS, INPUTS[:, :3] / 10), "metrics": ["rmse"]},
        ["workload.loss: cross entropy takes targets of", "shares of classes", "mse_loss"],
    ),
    "numbers for cross entropy of named logits": (
        {"train": (INPUTS, INPUTS[:, :3] / 10), "metrics": ["rmse"]}
        | {"forward": lambda model, batch: {"logits": model(batch[0])}},
        ["workload.loss: cross entropy takes targets of", "shares of classes"],
    ),
    "one number for cross entropy": (
        {"train": (INPUTS, torch.ones(10, 1)), "metrics": ["rmse"], **LINE},
        ["workload.loss: cross entropy takes targets of", "of shape (8, 1)"],
    ),
    "a mean over labels of dicts, not counted": (
        {
            "train": [{"x": INPUTS[i], "labels": LABELLED[i]} for i in range(10)],
            "forward": lambda model, batch: model(batch["x"]).unsqueeze(1).expand(-1, 4, -1),
            "loss": lambda o, b: functional.cross_entropy(o.transpose(1, 2), b["labels"]),
            "metrics": ["perplexity"],
        },
        [
            "workload.loss: the loss is no mean over examples",
            "count=lambda batch: (batch['labels']",
        ],
    ),
    "classes on the last of equal axes": (
        {
            "train": (INPUTS, TARGETS.view(-1, 1).expand(-1, 3).contiguous()),
            "forward": lambda model, batch: model(batch[0]).unsqueeze(1).expand(-1, 3, -1),
            "loss": lambda o, t: functional.cross_entropy(o.transpose(1, 2), t),
        },
        ["workload.metrics: outputs are torch.float32 of shape (8, 3, 3)", "axis 1", "movedim"],
    ),
    "a metric by a taken name": (
        {"metrics": [Metric("loss", lambda o, t: o.sum().view(1), float)]},
        ["workload.metrics: 'loss' cannot name a metric"],
    ),
    "a metric twice": ({"metrics": ["accuracy"] * 2}, ["'accuracy' is there twice"]),
    "columns in lists": (
        {"train": (INPUTS.tolist(), TARGETS)},
        ["workload.train: (inputs,", "list"],
    ),
    "columns of words": (
        {"test": (np.array(["a", "b"]), TARGETS[:2])},
        ["workload.test: has an array of <U1"],
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_no_job_can_use_is_refused_before_training(case: str) -> None:
    changed, parts = UNUSABLE[case]
    changed = dict(changed)
    model = changed.pop("model", nn.Linear(4, 3))
    workload = make_workload(**changed)
    model.train()
    text = refusal(WorkloadError, lambda: check_workload(workload, model, 8))
    assert text.startswith("workload")
    for part in parts:
        assert part in text
    assert model.training, "the model is left as it was"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"train": (INPUTS.numpy(), TARGETS.numpy()), "test": TensorDataset(INPUTS, TARGETS)},
        {"train": Squares(9), "test": Squares(1)},
        {"loss": functional.mse_loss, "train": (INPUTS, INPUTS[:, :3])}
        | {"test": (INPUTS, INPUTS[:, :3]), "count_correct": lambda o, t: torch.tensor(0)},
        {"count_correct": lambda o, t: int((o.argmax(1) == t).sum())},
        {"augment": lambda x: x + torch.rand(()), "prepare": lambda x: x / 40},
        {"loss": functional.nll_loss, "count": len},
        {"loss": summed, "count": len},
        {"loss": lambda o, t: functional.nll_loss(o.exp().log(), t)}
        | {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.LogSoftmax(dim=1))},
        {"loss": functional.binary_cross_entropy, "train": (INPUTS, INPUTS[:, :3] / 40)}
        | {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sigmoid())}
        | {"test": (INPUTS, INPUTS[:, :3] / 40), "count_correct": ZERO},
        {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9, 1]))},
        {"loss": lambda o, t: functional.cross_entropy(o, t, weight=torch.tensor([1.0, 9, 1]))}
        | {"count": lambda t: torch.tensor([1.0, 9, 1])[t].sum()},
        {"train": (INPUTS, functional.one_hot(TARGETS).float())}
        | {"count_correct": lambda o, t: (o.argmax(1) == o.argmax(1)).sum()},
    ],
    ids=[
        *("tensors", "arrays", "data set", "regression", "int count", "augmented", "by example"),
        *("called so", "logarithms", "shares", "weighted", "weighted in a function", "soft labels"),
    ],
)
def test_what_can_be_used_passes_and_changes_nothing(changed: dict[str, Any]) -> None:
    changed = dict(changed)
    model = changed.pop("model", nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_workload(make_workload(**changed), model, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training


def test_an_evaluating_model_stays_so() -> None:
    model = nn.Linear(4, 3).eval()
    check_workload(make_workload(), model, 8)
    assert not model.training


# -- what only a later batch shows -----------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [3, -1])
def test_a_late_label_out_of_range_is_named_by_its_example(split: str, label: int) -> None:
    workload = make_workload(**{split: Labelled([0, 1, 2, 0, 1, label, 7, 2])})
    indices = torch.tensor([3, 6, 5, 1])

    def check(indices: Tensor) -> None:
        inputs, targets = take_batch(workload, getattr(workload, split), indices)
        check_labels(workload, split, indices, nn.Linear(4, 3)(inputs), targets)

    check(indices[::3])
    text = refusal(WorkloadError, lambda: check(indices))
    assert text == (
        f"workload.{split}: example 6 has label 7, but the model has 3 outputs (allowed: 0 to 2)"
    )
    assert f"example 5 has label {label}," in refusal(
        WorkloadError, lambda: check(torch.tensor([2, 5]))
    )


def test_a_map_of_labels_may_leave_positions_out() -> None:
    maps = [torch.tensor([0, 2, -100]), torch.tensor([1, -100, 2]), torch.tensor([0, 5, 1])]
    workload = make_workload(train=Labelled(maps))
    outputs, indices = torch.zeros(2, 3, 3), torch.tensor([0, 1])
    check_labels(workload, "train", indices, outputs, torch.stack(maps[:2]))
    with pytest.raises(WorkloadError, match=r"example 2 has label 5, .*allowed: 0 to 2"):
        check_labels(workload, "train", indices + 1, outputs, torch.stack(maps[1:]))


@pytest.mark.parametrize(
    ("loss", "labels", "reason"),
    [
        (
            lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.1),
            [0, 1, 2, 4, 1],
            "the loss refuses the target = 4 of example 3: IndexError: Target 4 is out of bounds.",
        ),
        (
            lambda o, t: functional.binary_cross_entropy(o.sigmoid(), t),
            [torch.zeros(3), torch.ones(3), torch.tensor([0.0, 1.5, 0.0])],
            "the loss refuses the target of example 2: RuntimeError: ",
        ),
    ],
    ids=["smoothed", "binary"],
)
def test_a_target_that_an_own_loss_refuses_is_named_by_its_example(
    loss: Any, labels: list[Any], reason: str
) -> None:
    workload = make_workload(train=Labelled(labels), loss=loss)
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 3)).train()
    indices = torch.arange(len(labels))

    def fail() -> None:
        inputs, targets = take_batch(workload, workload.train, indices)
        with blaming_labels(workload, model, "train", indices):
            workload.loss(model(inputs), targets)

    assert refusal(WorkloadError, fail).startswith(f"workload.train: {reason}")
    assert all(module.training for module in model.modules())


def test_a_failure_that_no_target_caused_stays_as_it_is() -> None:
    workload = make_workload()
    for model in (nn.Linear(4, 3), nn.Linear(9, 9)):
        with (
            pytest.raises(ZeroDivisionError),
            blaming_labels(workload, model, "train", torch.arange(5)),
        ):
            raise ZeroDivisionError
    with (
        pytest.raises(WorkloadError, match=r"^planted$"),
        blaming_labels(workload, nn.Linear(4, 3), "train", torch.arange(5)),
    ):
        raise WorkloadError("planted")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_by_its_example(value: float) -> None:
    inputs, targets = INPUTS.clone(), INPUTS[:, :3].clone()
    inputs[7, 2], targets[4, 1] = value, value
    workload = make_workload(test=(inputs, targets))
    check_finite(workload, "test", torch.tensor([0, 1, 9]))
    for indices, reason in (([9, 7], "the input of example 7, as"), ([3, 4], "the target of exam")):
        text = refusal(
            WorkloadError, lambda i=indices: check_finite(workload, "test", Tensor(i).long())
        )
        assert text.startswith(f"workload.test: {reason}")
    check_finite(make_workload(), "test", torch.arange(5))


def test_right_answers_are_counted() -> None:
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.6]])
    assert count_top1(outputs, torch.tensor([1, 1, 1])).item() == 2


# -- fetching --------------------------------------------------------------------------------------


def as_memmap(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    np.save(tmp_path / "x.npy", INPUTS.numpy())
    np.save(tmp_path / "y.npy", TARGETS.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r"), np.load(tmp_path / "y.npy", mmap_mode="r")


FORMS: dict[str, Callable[[Path], Any]] = {
    "tensors": lambda folder: (INPUTS, TARGETS),
    "arrays": lambda folder: (INPUTS.numpy(), TARGETS.numpy()),
    "memory map": as_memmap,
    "mixed": lambda folder: (INPUTS, TARGETS.numpy()),
    "data set": lambda folder: TensorDataset(INPUTS, TARGETS),
    "list of pairs": lambda folder: list(zip(INPUTS, TARGETS.tolist(), strict=True)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_batches(form: str, tmp_path: Path) -> None:
    data = FORMS[form](tmp_path)
    workload = make_workload(train=data)
    assert num_examples(data) == 10
    for chosen in ([3], [9, 0, 4], [2, 2], list(range(10))):
        inputs, targets = take_batch(workload, data, torch.tensor(chosen))
        assert torch.equal(inputs, INPUTS[chosen])
        assert torch.equal(targets, TARGETS[chosen])
        assert targets.dtype == torch.int64
        # What a batch's owner does to it must not reach the data.
        inputs.zero_()
    assert torch.equal(take_batch(workload, data, torch.tensor([3]))[0], INPUTS[[3]])
    check_workload(workload, nn.Linear(4, 3), 8)


def test_inputs_are_prepared_after_they_are_augmented() -> None:
    order = []

    def augment(inputs: Tensor) -> Tensor:
        order.append("augment")
        return inputs + 1

    def prepare(inputs: Tensor) -> Tensor:
        order.append("prepare")
        return inputs * 10

    workload = make_workload(augment=augment, prepare=prepare)
    inputs, _ = take_batch(workload, workload.train, torch.tensor([1, 2]), augment_seed=3)
    assert torch.equal(inputs, (INPUTS[1:3] + 1) * 10)
    assert order == ["augment", "prepare"]
    inputs, _ = take_batch(workload, workload.train, torch.tensor([1, 2]))
    assert torch.equal(inputs, INPUTS[1:3] * 10)
    assert order == ["augment", "prepare", "prepare"]


def test_augmentation_is_decided_by_its_seed_and_leaves_no_trace() -> None:
    workload = make_workload(augment=lambda inputs: inputs + torch.rand_like(inputs))
    chosen = torch.tensor([0, 5])

    def take(seed: int | None) -> Tensor:
        return take_batch(workload, workload.train, chosen, augment_seed=seed)[0]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = take(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(take(7), first)
    assert torch.equal(take(0), take(0)), "0 is a seed, too"
    assert not torch.equal(take(0), INPUTS[chosen])
    assert not torch.equal(take(8), first)
    assert torch.equal(take(None), INPUTS[chosen])


def test_a_batch_goes_to_the_device_before_it_is_prepared() -> None:
    seen = []
    workload = make_workload(prepare=lambda inputs: seen.append(inputs.device.type) or inputs)
    inputs, targets = take_batch(
        workload, workload.train, torch.tensor([0]), device=torch.device("meta")
    )
    assert seen == ["meta"]
    assert {inputs.device.type, targets.device.type} == {"meta"}


class NamedSet(Dataset[tuple[Tensor, int]]):
    """Three examples of two classes with names."""

    classes = ["cat", "dog"]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(2), index % 2


def test_classes_have_the_names_that_the_data_have() -> None:
    inner, split = NamedSet(), (torch.zeros(3, 2), torch.tensor([0, 1, 0]))

    def names(test: Any, **more: Any) -> tuple[str, ...]:
        return _name_classes(Workload(nn.Module, split, test, **more))

    assert names(inner) == names(Subset(Subset(inner, [0, 1]), [0])) == ("cat", "dog")
    assert names(split) == names(split, classes=[1, 2]) == ()
    assert names(inner, classes=("a", "b", "c")) == ("a", "b", "c")
    found = Findings("t", 1, "taylor", 3, (), class_names=("cat",))
    assert [found.name_class(label) for label in (0, 1)] == ["cat", "class 1"]
    back = Findings.from_files(found.to_files(), "here")
    assert back.class_names == ("cat",)
    files = found.to_files()
    older = {k: v for k, v in json.loads(files["findings.json"]).items() if k != "class_names"}
    files["findings.json"] = json.dumps(older).encode()
    assert Findings.from_files(files, "here").class_names == (), "an older file has no names"


def test_what_is_shown_in_a_notebook_is_short() -> None:
    split = torch.zeros(1000, 50), torch.zeros(1000, dtype=torch.long)
    job = load_job(None, {"workload.options": {"width": 8}})
    shown = [
        Workload(lambda: nn.Linear(50, 2), split, split),
        job,
        Findings("t", 1, "taylor", 3, ()),
        SweepResult("here", (Outcome("t", job, "finished"),) * 99, (), 1.0),
    ]
    assert all(len(repr(item)) < 160 for item in shown)
    assert "1,000 training" in repr(shown[0])
    assert repr(shown[3]) == "SweepResult(uri='here', seconds=1.0)"


def test_of_a_loader_its_data_set_and_its_collate_function_are_used() -> None:
    def doubled(items: list[tuple[Tensor, int]]) -> list[Tensor]:
        columns = zip(*items, strict=True)
        return [2 * torch.stack(list(next(columns))), torch.tensor(list(next(columns)))]

    loader = DataLoader(Squares(9), batch_size=4, shuffle=True, collate_fn=doubled)
    workload = make_workload(train=loader, test=DataLoader(Squares(3)))
    with pytest.warns(UserWarning, match=r"^workload\.train and workload\.test: the data set and"):
        workload = without_loaders(workload)
    inputs, targets = take_batch(workload, workload.train, torch.tensor([2, 8]))
    assert inputs.tolist() == [[8.0] * 4, [128.0] * 4]
    assert targets.tolist() == [2, 2]
    assert take_batch(workload, workload.test, torch.tensor([2])).inputs.tolist() == [[4.0] * 4]
    with pytest.raises(WorkloadError, match=r"^workload\.train: a DataLoader over a Stream has no"):
        without_loaders(make_workload(train=DataLoader(Stream())))
