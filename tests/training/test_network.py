from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import SharedWeightNet, TanhNet, built, in_float64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.units import measure, prunable_parameters, survey
from gbp_ray.results.records import CostRecord
from gbp_ray.training.passes import Macs, count_macs


class StridedNet(nn.Module):
    """Convolutions of every kind over an 8 x 8 image, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 2, 2, stride=2, bias=False)
        self.twice = nn.Linear(8, 8)
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(8, 5)))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.depthwise(self.strided(inputs))
        hidden = self.up(self.norm(self.grouped(hidden)))
        return self.blocks(self.twice(self.twice(hidden)))


# Outputs of strided, depthwise and grouped are 4 x 4, those of up 8 x 8 in rows of 8 numbers; an
# output of a convolution costs inputs / groups * kernel, a transposed one is counted by its inputs.
MACS = {
    "strided": 4 * (4 * 4) * 3 * 9,
    "depthwise": 4 * (4 * 4) * 1 * 9,
    "grouped": 6 * (4 * 4) * (4 // 2),
    "up": 6 * (4 * 4) * 2 * 4,
    "twice": 2 * (2 * 8) * 8 * 8,
    "blocks.0.0": (2 * 8) * 8 * 5,
}
WEIGHTS = {
    "strided": 4 * 3 * 9,
    "depthwise": 4 * 9,
    "grouped": 6 * 2,
    "up": 6 * 2 * 4,
    "twice": 64,
    "blocks.0.0": 40,
}
OTHERS = 4 + 6 + (6 + 6) + 8 + 5  # Biases, and the weight and bias of the norm.


def strided_macs() -> Macs:
    return count_macs(built(StridedNet), torch.zeros(1, 3, 8, 8))


def cost_of(model: nn.Module, macs: Macs) -> CostRecord:
    return measure(model, prunable_parameters(model), macs)


def test_macs_are_those_counted_by_hand() -> None:
    macs = strided_macs()
    assert macs == Macs({f"{name}.weight": n for name, n in MACS.items()}, sum(MACS.values()))


@pytest.mark.parametrize("is_training", [True, False])
def test_counting_leaves_the_model_as_it_was(is_training: bool) -> None:
    model = built(StridedNet).train(is_training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, torch.zeros(1, 3, 8, 8))
    assert all(module.training is is_training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dense_model_costs_all_it_has() -> None:
    cost = cost_of(built(StridedNet), strided_macs())
    assert cost.num_parameters == cost.num_nonzero + 6 == sum(WEIGHTS.values()) + OTHERS
    assert cost.macs == cost.macs_nonzero == sum(MACS.values())
    assert (cost.sparsity, cost.num_units) == (0.0, sum(WEIGHTS.values()))
    layers = {layer.name: layer for layer in cost.layers}
    assert sorted(layers) == sorted(f"{name}.weight" for name in WEIGHTS)
    for name, num_weights in WEIGHTS.items():
        layer = layers[f"{name}.weight"]
        assert (layer.num_weights, layer.num_nonzero) == (num_weights, num_weights)
        assert (layer.macs, layer.macs_nonzero) == (MACS[name], MACS[name])


@pytest.mark.parametrize("name", WEIGHTS)
def test_zero_weights_spare_their_share_of_the_macs(name: str) -> None:
    model = built(StridedNet)
    dense = cost_of(model, strided_macs())
    weight = model.get_parameter(f"{name}.weight")
    removed = WEIGHTS[name] // 4
    with torch.no_grad():
        weight.view(-1)[:removed] = 0
    cost = cost_of(model, strided_macs())
    # Each weight of a layer takes part equally often.
    spared = removed * MACS[name] // WEIGHTS[name]
    assert cost.macs_nonzero == dense.macs - spared
    assert cost.macs == dense.macs
    assert cost.num_nonzero == dense.num_nonzero - removed
    assert cost.num_parameters == dense.num_parameters
    assert cost.sparsity == pytest.approx(removed / sum(WEIGHTS.values()))
    assert cost.compression == cost.num_parameters / cost.num_nonzero
    layer = next(layer for layer in cost.layers if layer.name == f"{name}.weight")
    assert (layer.num_nonzero, layer.macs_nonzero) == (WEIGHTS[name] - removed, MACS[name] - spared)
    assert layer.sparsity == removed / WEIGHTS[name]


@pytest.mark.parametrize(("build", "item"), [(built, 4), (in_float64, 8)])
def test_bytes_are_those_of_the_tensors(build: type, item: int) -> None:
    model = build(TanhNet)
    model.register_buffer("counter", torch.zeros(3, dtype=torch.int64))
    dense = cost_of(model, Macs({}, 0))
    num_parameters = (12 + 4) + (8 + 2)
    assert dense.num_bytes == num_parameters * item + 3 * 8
    # One bit a prunable weight, each layer in whole bytes: 12 in two, 8 in one.
    assert dense.num_bytes_sparse == dense.num_bytes + 2 + 1
    with torch.no_grad():
        model[0].weight[:2] = 0
    sparse = cost_of(model, Macs({}, 0))
    assert sparse.num_bytes == dense.num_bytes
    assert sparse.num_bytes_sparse == dense.num_bytes_sparse - 6 * item


def test_a_tied_weight_counts_once_and_works_in_both_layers() -> None:
    model = built(SharedWeightNet)
    macs = count_macs(model, torch.zeros(1, 3))
    dense = cost_of(model, macs)
    assert (dense.num_parameters, dense.num_bytes, dense.macs) == (9, 36, 18)
    with torch.no_grad():
        model.first.weight[0] = 0
    cost = cost_of(model, macs)
    (layer,) = cost.layers
    assert (cost.num_nonzero, cost.macs_nonzero) == (6, 12)
    assert (layer.macs, layer.macs_nonzero) == (18, 12)


def test_a_module_with_two_names_costs_what_it_does_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh())
    model.append(model[0])
    cost = cost_of(model, count_macs(model, torch.zeros(1, 3)))
    assert (cost.num_parameters, cost.macs) == (9, 18)
    assert cost.layers[0].macs == 18


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs)


def test_attention_is_counted_although_torch_would_fuse_it() -> None:
    """Over 3 tokens of 8 numbers: projections, scores and mixing, and the two linear layers."""
    model = built(Attention)
    macs = count_macs(model, torch.zeros(1, 3, 8))
    projections, mixing = 3 * 8 * (3 * 8) + 3 * 8 * 8, 2 * (3 * 3 * 8)
    linear = {f"encoder.linear{number}.weight": 3 * 8 * 16 for number in (1, 2)}
    projected = {"in_proj_weight": 3 * 8 * (3 * 8), "out_proj.weight": 3 * 8 * 8}
    attended = {f"encoder.self_attn.{name}": n for name, n in projected.items()}
    assert macs == Macs(linear | attended, projections + mixing + 2 * 3 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


class Calling(nn.Module):
    """A network whose forward pass is a function of it."""

    def __init__(self, forward: Any, **members: Any) -> None:
        super().__init__()
        self.body = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(self, inputs)


def attend(model: Any, inputs: Tensor) -> Tensor:
    attended, _ = model.attention(inputs, inputs, inputs, need_weights=False)
    return model.head(attended.mean(dim=1))


def differentiate(model: Any, inputs: Tensor) -> Tensor:
    """Gives forces as the negative gradient of an energy."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_(True)
        energy = model.b(torch.tanh(model.a(inputs))).sum()
        return -torch.autograd.grad(energy, inputs, create_graph=True)[0]


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Calling:
    layer = kind(8, 24, batch_first=True, **options)
    return Calling(lambda model, inputs: model.layer(inputs)[0], layer=layer)


def in_bfloat16(model: Any, inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.a(inputs)


def linear(num_outputs: int) -> nn.Linear:
    return nn.Linear(8, num_outputs)


# Over 5 steps of 8 numbers; gates are 4 of an LSTM's, 3 of a GRU's.
COUNTED: dict[str, tuple[Any, dict[str, int], int]] = {
    "attention": (
        lambda: Calling(
            attend, attention=nn.MultiheadAttention(8, 2, batch_first=True), head=linear(4)
        ),
        {
            "attention.in_proj_weight": 5 * 8 * 24,
            "attention.out_proj.weight": 5 * 8 * 8,
            "head.weight": 8 * 4,
        },
        2 * (5 * 5 * 8),
    ),
    "lstm": (
        lambda: recurrent(nn.LSTM),
        {"layer.weight_ih_l0": 5 * 4 * 24 * 8, "layer.weight_hh_l0": 5 * 4 * 24 * 24},
        0,
    ),
    "gru, both ways": (
        lambda: recurrent(nn.GRU, bidirectional=True),
        {
            f"layer.weight_{kind}_l0{way}": 5 * 3 * 24 * width
            for kind, width in (("ih", 8), ("hh", 24))
            for way in ("", "_reverse")
        },
        0,
    ),
    "lstm with projections": (
        lambda: recurrent(nn.LSTM, proj_size=6),
        {
            "layer.weight_ih_l0": 5 * 4 * 24 * 8,
            "layer.weight_hh_l0": 5 * 4 * 24 * 6,
            "layer.weight_hr_l0": 5 * 24 * 6,
        },
        0,
    ),
    "differentiates": (
        lambda: Calling(differentiate, a=linear(6), b=nn.Linear(6, 1)),
        {"a.weight": 2 * 5 * 48, "b.weight": 2 * 5 * 6},
        0,
    ),
    "another's weight": (
        lambda: Calling(lambda m, x: functional.linear(x, m.a.weight) @ m.a.weight, a=linear(6)),
        {"a.weight": 2 * 5 * 48},
        0,
    ),
    "einsum": (
        lambda: Calling(lambda m, x: torch.einsum("bti,oi->bto", x, m.a.weight), a=linear(6)),
        {"a.weight": 5 * 48},
        0,
    ),
    "vector": (
        lambda: Calling(lambda m, x: m.a.weight @ x[0, 0], a=linear(6)),
        {"a.weight": 48},
        0,
    ),
    "autocast": (lambda: Calling(in_bfloat16, a=linear(6)), {"a.weight": 5 * 48}, 0),
    "joined": (
        lambda: Calling(
            lambda m, x: functional.linear(x, torch.cat([m.a.weight, m.b.weight])),
            a=linear(6),
            b=linear(2),
        ),
        {"a.weight": 5 * 48, "b.weight": 5 * 16},
        0,
    ),
    # Torch calls its operation by another name where scale and zero are tensors.
    "quantised": (
        lambda: Calling(
            lambda m, x: functional.linear(
                x,
                torch.fake_quantize_per_tensor_affine(m.a.weight, m.scale, m.zero, -128, 127),
            ),
            a=linear(6),
            scale=nn.Parameter(torch.tensor(0.1), requires_grad=False),
            zero=nn.Parameter(torch.tensor(0, dtype=torch.int32), requires_grad=False),
        ),
        {"a.weight": 5 * 48},
        0,
    ),
    "packed, 3 of 5 steps": (
        lambda: Calling(
            lambda m, x: m.layer(pack_padded_sequence(x, torch.tensor([3]), batch_first=True))[1],
            layer=nn.GRU(8, 24, batch_first=True),
        ),
        {"layer.weight_ih_l0": 3 * 3 * 24 * 8, "layer.weight_hh_l0": 3 * 3 * 24 * 24},
        0,
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        {
            "self_attn.in_proj_weight": 5 * 8 * 24,
            "self_attn.out_proj.weight": 5 * 8 * 8,
            "linear1.weight": 5 * 8 * 16,
            "linear2.weight": 5 * 8 * 16,
        },
        2 * (5 * 5 * 8),
    ),
    "fused attention": (
        lambda: Calling(
            lambda m, x: functional.scaled_dot_product_attention(m.a(x), m.b(x), x),
            a=linear(8),
            b=linear(8),
        ),
        {"a.weight": 5 * 64, "b.weight": 5 * 64},
        2 * (5 * 5 * 8),
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(linear(6))),
        {"0.parametrizations.weight.original1": 5 * 48},
        0,
    ),
    "meta": (lambda: nn.Sequential(linear(6)).to("meta"), {"0.weight": 5 * 48}, 0),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_products_are_put_down_to_the_weights_that_take_part(kind: str) -> None:
    build, by_parameter, beside = COUNTED[kind]
    macs = count_macs(built(build), torch.zeros(1, 5, 8))
    assert macs == Macs(by_parameter, sum(by_parameter.values()) + beside)
    assert torch.backends.mkldnn.enabled


# What a zero saves is not known where it is no zero any more, or multiplied by other weights.
UNATTRIBUTED: dict[str, tuple[Any, dict[str, int], int, set[str]]] = {
    "standardised": (
        lambda: Calling(
            lambda m, x: functional.linear(x, m.a.weight - m.a.weight.mean()), a=linear(6)
        ),
        {},
        5 * 48,
        {"a.weight"},
    ),
    "of low rank": (
        lambda: Calling(
            lambda m, x: functional.linear(x, m.a.weight + m.up @ m.down) + m.b(x),
            a=linear(6),
            b=linear(6),
            up=nn.Parameter(torch.ones(6, 2)),
            down=nn.Parameter(torch.ones(2, 8)),
        ),
        {"b.weight": 5 * 48},
        6 * 2 * 8 + 5 * 48,
        {"a.weight", "up", "down"},
    ),
    "learnt queries": (
        lambda: Calling(
            lambda m, x: (m.a(m.queries) @ m.b(x).transpose(1, 2)).softmax(2) @ x,
            a=linear(6),
            b=linear(6),
            queries=nn.Parameter(torch.ones(3, 8)),
        ),
        {"b.weight": 5 * 48},
        3 * 48 + 3 * 5 * 6 + 3 * 5 * 8,
        {"a.weight", "queries"},
    ),
}


@pytest.mark.parametrize("kind", UNATTRIBUTED)
def test_products_that_no_zero_is_known_to_save_are_counted_and_named(kind: str) -> None:
    build, by_parameter, beside, names = UNATTRIBUTED[kind]
    model = built(build)
    macs = count_macs(model, torch.zeros(1, 5, 8))
    assert macs == Macs(
        by_parameter, sum(by_parameter.values()) + beside, unattributed=frozenset(names)
    )
    with torch.no_grad():
        model.a.weight[:3] = 0
    cost = cost_of(model, macs)
    assert cost.macs == cost.macs_nonzero == macs.total
    assert cost.macs_fault.endswith("'a.weight'")
    # Of what is not pruned nothing needs to be known.
    if by_parameter:
        assert not measure(model, prunable_parameters(model, ["a.*"]), macs).macs_fault


UNSEEN = {"meta", "autocast", "differentiates", "vector", "packed, 3 of 5 steps"}
"""What torch's own counter fails on or does not see, beside recurrent layers."""
UNSEEN |= {kind for kind in COUNTED if "lstm" in kind or "gru" in kind}


@pytest.mark.parametrize("kind", sorted({*COUNTED, *UNATTRIBUTED} - UNSEEN))
def test_totals_are_half_the_operations_that_torch_counts(kind: str) -> None:
    model = built((COUNTED | UNATTRIBUTED)[kind][0]).eval()
    inputs = torch.zeros(1, 5, 8)
    total = count_macs(model, inputs).total
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert 2 * total == counter.get_total_flops()


def refuse(model: Any, inputs: Tensor) -> Tensor:
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    ("build", "fault"),
    [
        (lambda: Calling(lambda m, x: m.a(x, x), a=nn.Bilinear(8, 8, 2)), "aten::_trilinear"),
        (lambda: Calling(refuse, a=linear(6)), "RuntimeError: no such luck"),
    ],
)
def test_what_cannot_be_counted_is_said_and_ends_nothing(build: Any, fault: str) -> None:
    model = built(build)
    macs = count_macs(model, torch.zeros(1, 5, 8))
    assert (macs.by_parameter, macs.total) == ({}, 0)
    assert macs.fault.startswith(fault)
    assert measure(model, [], macs).macs_fault == macs.fault


def test_matrices_that_are_not_pruned_are_named_with_the_reason() -> None:
    model = built(lambda: COUNTED["attention"][0]())
    model.table = nn.Embedding(3, 8)
    found = survey(model, ["head.*"])
    cost = measure(model, found.units, Macs({}, 0), found.unpruned)
    assert cost.unpruned == found.unpruned
    assert cost.unpruned_in_words == (
        "248 of 312 weights in matrices are not prunable: attention.in_proj_weight (192, "
        "MultiheadAttention, not in prune.include), head.weight (32, prune.exclude), table.weight "
        "(24, Embedding, not in prune.include)"
    )


def test_counting_leaves_no_trace() -> None:
    def mark(model: Any, inputs: Tensor) -> Tensor:
        model.calls += 1
        model.a.weight.data.mul_(2)
        model.is_ready = True
        return model.a(inputs + torch.randn(8))

    model = built(lambda: Calling(mark, a=linear(6)))
    model.register_buffer("calls", torch.zeros(()))
    model.is_ready = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.random.get_rng_state()
    assert count_macs(model, torch.zeros(1, 5, 8)).total == 5 * 48
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert not model.is_ready


def test_masks_and_measurement_agree() -> None:
    model = built(StridedNet)
    units = prunable_parameters(model)
    generator = torch.Generator().manual_seed(0)
    masks = MaskSet(
        {u.name: torch.rand(u.parameter.shape, generator=generator) < 0.3 for u in units}
    )
    masks.apply_(model)
    cost = cost_of(model, strided_macs())
    assert cost.sparsity == pytest.approx(masks.sparsity, abs=1e-12)
    assert sum(layer.num_nonzero for layer in cost.layers) == int(masks.flat().sum())
