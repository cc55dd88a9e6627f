from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from small_networks import ConvNet, SharedWeightNet, TanhNet, built, draw, prune_config
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from gbp_ray.errors import ConfigError, PruneError, StoreError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import check_selectable
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.network import network_of_seed
from gbp_ray.workloads.contract import Workload

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)
names = st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__")


@st.composite
def bool_tensors(draw_from: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape)
    # Drawn as bytes, since a list of booleans is drawn one by one.
    data = draw_from(st.binary(min_size=size, max_size=size))
    return torch.tensor([byte % 2 for byte in data], dtype=torch.bool).reshape(shape)


@st.composite
def mask_sets(draw_from: st.DrawFn, shape_by_name: dict[str, tuple[int, ...]] | None = None) -> Any:
    if shape_by_name is None:
        shape_by_name = draw_from(st.dictionaries(names, shapes, min_size=1, max_size=4))
    return MaskSet(
        {name: draw_from(bool_tensors(shape)) for name, shape in shape_by_name.items()},
        round=draw_from(st.integers(0, 99)),
        criterion=draw_from(st.sampled_from(["taylor", "my.module:rule", ""])),
        parent=draw_from(st.sampled_from(["", "ab" * 32])),
    )


LAYERS = {"conv.weight": (3, 2, 3), "fc.weight": (4, 3)}
EXAMPLE = MaskSet(
    {name: draw(*shape, seed=len(name)) > 0 for name, shape in LAYERS.items()},
    round=4,
    criterion="taylor",
    parent="cd" * 32,
)
FILE = EXAMPLE.to_bytes()


# -- the file, read by its specification in results/tensors.py ------------------------------------


def decode(data: bytes) -> tuple[dict[str, list[bool]], dict[str, Any], dict[str, bytes]]:
    """Reads masks bit by bit; returns flat bits, metadata and packed bytes by name."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    bits, packed = {}, {}
    for name, shape in json.loads(metadata["shapes"]).items():
        entry = header.pop(name)
        start, stop = entry["data_offsets"]
        packed[name] = data[8 + length + start : 8 + length + stop]
        total = math.prod(shape)
        assert entry["dtype"] == "U8"
        assert len(packed[name]) == math.ceil(total / 8)
        every_bit = [byte >> i & 1 for byte in packed[name] for i in range(8)]
        assert not any(every_bit[total:])
        bits[name] = [bool(bit) for bit in every_bit[:total]]
    assert not header
    return bits, metadata, packed


@given(masks=mask_sets())
def test_the_file_holds_what_its_specification_says(masks: MaskSet) -> None:
    bits, metadata, packed = decode(masks.to_bytes())
    assert bits == {name: mask.flatten().tolist() for name, mask in masks.items()}
    assert json.loads(metadata.pop("shapes")) == {n: list(m.shape) for n, m in masks.items()}
    hashed = hashlib.sha256()
    for name in sorted(packed):
        shape = "x".join(str(size) for size in masks[name].shape)
        hashed.update(name.encode() + b"\0" + shape.encode() + b"\0" + packed[name])
    assert float(metadata.pop("sparsity")) == masks.num_pruned / masks.num_units
    assert metadata == {
        "format": "gbp_ray.masks",
        "version": "1",
        "digest": hashed.hexdigest(),
        "parent": masks.parent,
        "round": str(masks.round),
        "criterion": masks.criterion,
    }


def test_bits_are_packed_least_significant_first_in_c_order() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True
    _, _, packed = decode(MaskSet({"w": mask}).to_bytes())
    assert packed == {"w": bytes([0b00001001, 0b00000010])}


def test_the_order_in_memory_does_not_matter() -> None:
    mask = (draw(4, 3, 2, 2) > 0).contiguous(memory_format=torch.channels_last)
    assert decode(MaskSet({"w": mask}).to_bytes())[2] == {
        "w": decode(MaskSet({"w": mask.contiguous()}).to_bytes())[2]["w"]
    }


@given(masks=mask_sets())
def test_masks_survive_the_round_trip(masks: MaskSet) -> None:
    read = MaskSet.from_bytes(masks.to_bytes())
    assert list(read) == sorted(masks)
    for name, mask in masks.items():
        assert read[name].dtype is torch.bool
        assert torch.equal(read[name], mask)
    assert (read.round, read.criterion, read.parent) == (masks.round, masks.criterion, masks.parent)
    assert read == masks
    assert hash(read) == hash(masks)


@given(masks=mask_sets(LAYERS), other=mask_sets(LAYERS))
def test_the_digest_depends_on_the_masks_alone(masks: MaskSet, other: MaskSet) -> None:
    is_same = all(torch.equal(masks[name], other[name]) for name in LAYERS)
    assert (masks.digest == other.digest) is is_same
    assert (masks == other) is is_same


# -- damage ----------------------------------------------------------------------------------------


def read_if_intact(data: bytes) -> MaskSet | None:
    """Reads masks; damage must show as a StoreError that names the file."""
    try:
        return MaskSet.from_bytes(data, "round_004/masks.safetensors")
    except StoreError as error:
        message = str(error)
    assert message.startswith("'round_004/masks.safetensors': ")
    assert "\n" not in message
    return None


def test_a_truncated_file_is_refused_wherever_it_ends() -> None:
    for length in range(len(FILE)):
        assert read_if_intact(FILE[:length]) is None


def test_an_appended_byte_is_refused() -> None:
    assert read_if_intact(FILE + b"\0") is None


@given(position=st.integers(0, len(FILE) - 1), byte=st.integers(0, 255))
@settings(max_examples=600)
def test_an_altered_byte_never_alters_masks(position: int, byte: int) -> None:
    altered = FILE[:position] + bytes([byte]) + FILE[position + 1 :]
    # Round, criterion and parent stand in the header without a checksum, as specified.
    assert read_if_intact(altered) in (None, EXAMPLE)


@given(data=st.binary(max_size=80))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert read_if_intact(data) is None


def test_every_altered_byte_of_the_data_is_refused() -> None:
    start = 8 + int.from_bytes(FILE[:8], "little")
    assert len(FILE) - start == math.ceil(18 / 8) + math.ceil(12 / 8)
    for position in range(start, len(FILE)):
        for bit in range(8):
            altered = bytearray(FILE)
            altered[position] ^= 1 << bit
            assert read_if_intact(bytes(altered)) is None


def forged(**changes: Any) -> bytes:
    """Writes the example with other metadata or other tensors."""
    _, metadata, packed = decode(FILE)
    tensors = {name: torch.tensor(list(data), dtype=torch.uint8) for name, data in packed.items()}
    tensors.update(changes.pop("tensors", {}))
    for key, value in changes.items():
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value
    return save_tensors(tensors, metadata)


def test_a_forgery_without_changes_is_the_example() -> None:
    assert MaskSet.from_bytes(forged()) == EXAMPLE


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "BOOL", "BF16", "I8", "U64"])
def test_another_dtype_is_refused(dtype: str) -> None:
    per_byte = {"F4": 2, "F6_E2M3": 4 / 3, "BF16": 1 / 2, "U64": 1 / 8}.get(dtype, 1)
    header = json.loads(FILE[8 : 8 + int.from_bytes(FILE[:8], "little")])
    del header["conv.weight"]
    header["__metadata__"]["shapes"] = '{"fc.weight": [4, 6]}'
    num_bytes = 24
    header["fc.weight"] = {
        "dtype": dtype,
        "shape": [int(num_bytes * per_byte)],
        "data_offsets": [0, num_bytes],
    }
    text = json.dumps(header).encode()
    assert read_if_intact(len(text).to_bytes(8, "little") + text + b"\1" * num_bytes) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "2"},
        {"version": None},
        {"format": "other"},
        {"digest": "0" * 64},
        {"digest": None},
        {"shapes": None},
        {"shapes": "{"},
        {"shapes": "[]"},
        {"shapes": "7"},
        {"shapes": '{"conv.weight": [3, 2, 3]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [12]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [3, 4]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [-3, -4]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [4.0, 3]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [[4], 3]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [[4], 1000000000000000]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": ["4", 3]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": 12}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "fc.weight": [Infinity]}'},
        {"shapes": '{"conv.weight": [3, 2, 3], "other": [4, 3]}'},
        {"shapes": "[" * 100_000},
        {"round": None},
        {"round": "four"},
        {"tensors": {"fc.weight": torch.zeros(3, dtype=torch.uint8)}},
        {"tensors": {"fc.weight": torch.zeros(2, dtype=torch.int8)}},
        {"tensors": {"fc.weight": torch.zeros(2, dtype=torch.bfloat16)}},
        {"tensors": {"more": torch.zeros(2, dtype=torch.uint8)}},
    ],
)
def test_a_forged_file_is_refused(changes: dict[str, Any]) -> None:
    assert read_if_intact(forged(**changes)) is None


def test_set_padding_bits_are_refused_even_under_a_right_digest() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    digest = hashlib.sha256(b"w\0003\0" + bytes([0b1111])).hexdigest()
    tensors = {"w": torch.tensor([0b1111], dtype=torch.uint8)}
    _, metadata, _ = decode(MaskSet({"w": mask}).to_bytes())
    assert read_if_intact(save_tensors(tensors, {**metadata, "digest": digest})) is None


# -- algebra ---------------------------------------------------------------------------------------


@given(a=mask_sets(LAYERS), b=mask_sets(LAYERS), c=mask_sets(LAYERS))
def test_the_laws_of_sets_hold(a: MaskSet, b: MaskSet, c: MaskSet) -> None:
    assert a.union(b) == b.union(a)
    assert a.intersection(b) == b.intersection(a)
    assert a.union(b).union(c) == a.union(b.union(c))
    assert a.intersection(b.union(c)) == a.intersection(b).union(a.intersection(c))
    assert a.union(a) == a == a.intersection(a)
    assert a.difference(b).intersection(b).num_pruned == a.num_units
    assert a.difference(b).union(a.intersection(b)) == a


@given(a=mask_sets(LAYERS), b=mask_sets(LAYERS))
def test_overlap_counts_kept_weights_in_both_over_either(a: MaskSet, b: MaskSet) -> None:
    kept_a = {(n, i) for n, m in a.items() for i, bit in enumerate(m.flatten()) if bit}
    kept_b = {(n, i) for n, m in b.items() for i, bit in enumerate(m.flatten()) if bit}
    expected = len(kept_a & kept_b) / len(kept_a | kept_b) if kept_a | kept_b else 1.0
    assert a.overlap(b) == b.overlap(a) == expected
    assert a.union(b).flat().sum() == len(kept_a | kept_b)
    assert a.difference(b).flat().sum() == len(kept_a - kept_b)


def test_masks_over_other_parameters_do_not_combine() -> None:
    more = MaskSet({**EXAMPLE.masks, "more": torch.ones(2, dtype=torch.bool)})
    other_shape = MaskSet({**EXAMPLE.masks, "fc.weight": torch.ones(3, 4, dtype=torch.bool)})
    for a, b in ((EXAMPLE, more), (more, EXAMPLE), (EXAMPLE, other_shape)):
        for combine in (a.union, a.intersection, a.difference, a.overlap):
            with pytest.raises(PruneError, match=r"more|fc\.weight"):
                combine(b)


def test_masks_are_in_name_order_and_flat_in_that_order() -> None:
    masks = MaskSet({"b": torch.tensor([True]), "a": torch.tensor([[False, True]])})
    assert list(masks) == ["a", "b"]
    assert masks.flat().tolist() == [False, True, True]
    assert (masks.num_units, masks.num_pruned, masks.sparsity) == (3, 1, 1 / 3)


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(PruneError, match=r"mask of 'w': must be bool"):
        MaskSet({"w": torch.ones(3)})


# -- applying --------------------------------------------------------------------------------------


def half(model: nn.Module) -> MaskSet:
    """Keeps a random half of a model's weights."""
    units = prunable_parameters(model)
    return MaskSet({u.name: draw(*u.parameter.shape, seed=9) > 0 for u in units})


@pytest.mark.parametrize("to_state", [False, True], ids=["model", "state dict"])
def test_applying_zeroes_pruned_weights_and_nothing_else(to_state: bool) -> None:
    model = built(ConvNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = half(model)
    target = {k: v.clone() for k, v in before.items()} if to_state else model
    assert masks.find_revived(target) == "conv1.weight"
    masks.apply_(target)
    assert masks.find_revived(target) is None
    after = target if to_state else model.state_dict()
    for name, value in before.items():
        expected = value * masks[name] if name in masks else value
        assert torch.equal(after[name], expected)


def test_infinite_weights_are_pruned_to_zero() -> None:
    state = {"w": torch.tensor([math.inf, math.nan, 1.0])}
    MaskSet({"w": torch.tensor([False, False, True])}).apply_(state)
    assert state["w"].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("fault", ["missing", "shape"])
@pytest.mark.parametrize("to_state", [False, True], ids=["model", "state dict"])
def test_masks_that_do_not_fit_change_nothing(fault: str, to_state: bool) -> None:
    model = built(ConvNet)
    masks = dict(half(model).masks)
    if fault == "missing":
        masks["hedd.weight"] = masks.pop("head.weight")
        message = "has no 'hedd.weight', did you mean 'head.weight'"
    else:
        masks["head.weight"] = torch.zeros(3, 33, dtype=torch.bool)
        message = r"'head.weight' has shape \(3, 32\), the mask has \(3, 33\)"
    target = model.state_dict() if to_state else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruneError, match=message):
        MaskSet(masks).apply_(target)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_tied_parameter_is_masked_under_any_of_its_names() -> None:
    for name in ("first.weight", "second.weight"):
        model = built(SharedWeightNet)
        MaskSet({name: torch.zeros(3, 3, dtype=torch.bool)}).apply_(model)
        assert not model.first.weight.any()


# -- torch.nn.utils.prune --------------------------------------------------------------------------


def pruned_by_torch(model: nn.Module) -> nn.Module:
    for module in (model.conv1, model.conv2, model.head):
        prune.random_unstructured(module, "weight", 0.4)
    return model


def test_a_model_pruned_by_torch_round_trips() -> None:
    state = pruned_by_torch(built(ConvNet)).state_dict()
    masks, plain = MaskSet.from_torch_prune(state)
    assert list(masks) == ["conv1.weight", "conv2.weight", "head.weight"]
    again = masks.to_torch_prune(plain)
    assert again.keys() == state.keys()
    for name, value in again.items():
        masked = name.endswith("_orig")
        mask = state[name.removesuffix("_orig") + "_mask"] if masked else 1
        assert torch.equal(value, state[name] * mask)


def test_a_model_pruned_by_torch_computes_the_same_from_our_plain_state() -> None:
    theirs, ours = pruned_by_torch(built(ConvNet)).eval(), built(ConvNet, seed=1).eval()
    _, plain = MaskSet.from_torch_prune(theirs.state_dict())
    ours.load_state_dict(plain, strict=True)
    pixels = draw(3, 2, 6, 6)
    assert torch.equal(ours(pixels), theirs(pixels))


def test_a_model_pruned_by_torch_loads_our_state() -> None:
    ours, theirs = built(ConvNet).eval(), pruned_by_torch(built(ConvNet, seed=1)).eval()
    masks = half(ours)
    theirs.load_state_dict(masks.to_torch_prune(ours.state_dict()), strict=True)
    masks.apply_(ours)
    pixels = draw(3, 2, 6, 6)
    assert torch.equal(theirs(pixels), ours(pixels))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(2)}, "holds no pair"),
        ({"w_orig": torch.ones(2)}, "holds no pair"),
        (
            {"w_orig": torch.ones(2), "w_mask": torch.tensor([0.5, 1.0])},
            "'w_mask': must hold only 0",
        ),
    ],
)
def test_a_state_that_torch_did_not_prune_is_refused(
    state: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(PruneError, match=message):
        MaskSet.from_torch_prune(state)


def test_masks_that_do_not_fit_a_state_are_not_written_into_it() -> None:
    with pytest.raises(PruneError, match=r"state: has no 'conv.weight'"):
        EXAMPLE.to_torch_prune({"fc.weight": torch.ones(4, 3)})


# -- prunable parameters ---------------------------------------------------------------------------


class Zoo(nn.Module):
    """One of everything that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.z_conv1d = nn.Conv1d(2, 3, 3)
        self.conv2d = nn.Conv2d(2, 4, 3, groups=2)
        self.conv3d = nn.Conv3d(2, 3, 1)
        self.up = nn.ConvTranspose2d(2, 6, 3)
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.embedding = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.free = nn.Parameter(torch.ones(3, 3))
        self.tied = nn.Linear(3, 7)
        self.tied.weight = self.embedding.weight
        self.again = self.up


def test_convolutions_and_linear_layers_are_prunable_in_name_order() -> None:
    model = Zoo()
    units = prunable_parameters(model)
    assert [(unit.name, unit.input_dim) for unit in units] == [
        ("conv2d.weight", 1),
        ("conv3d.weight", 1),
        ("embedding.weight", 1),
        ("inner.0.weight", 1),
        ("up.weight", 0),
        ("z_conv1d.weight", 1),
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameters[unit.name] is unit.parameter for unit in units)


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        (("conv*",), {"conv2d.weight", "conv3d.weight"}),
        (("inner.0.weight", "z_*"), {"inner.0.weight", "z_conv1d.weight"}),
        (("tied.weight",), {"embedding.weight"}),
        (("again.*",), {"up.weight"}),
        (("*.bias",), set()),
    ],
)
def test_globs_exclude_by_any_name(exclude: tuple[str, ...], excluded: set[str]) -> None:
    model = Zoo()
    every_name = {unit.name for unit in prunable_parameters(model)}
    assert {u.name for u in prunable_parameters(model, exclude)} == every_name - excluded


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prune.exclude = 'conv2.weight': .* 'conv2d.weight'"):
        prunable_parameters(Zoo(), ["conv2.weight"])


@pytest.mark.parametrize(
    ("model", "exclude", "message"),
    [
        (TanhNet(), ["*"], "prune.exclude: leaves nothing to prune"),
        (nn.GRU(2, 3), [], "nothing to prune: .* and its parameters are 'weight_ih_l0' of GRU"),
    ],
    ids=["excluded", "none"],
)
def test_nothing_to_prune_is_refused(model: nn.Module, exclude: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prunable_parameters(model, exclude)


@pytest.mark.parametrize(
    "compiled",
    [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.zeros(1, 2))],
    ids=["script", "trace"],
)
def test_a_network_of_torchscript_is_built_and_refused_by_its_name(compiled: Any) -> None:
    data = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    model, _ = network_of_seed(Workload(lambda: compiled(nn.Linear(2, 3)), data, data), 0)
    for include in ([], ["weight"]):
        with pytest.raises(ConfigError, match=r"of TorchScript, .*nn\.Module that was scripted"):
            prunable_parameters(model, [], include)


def named(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"plain": nn.Linear(4, 4), **layers})


def names_of(model: nn.Module, *exclude: str) -> list[str]:
    return [unit.name for unit in prunable_parameters(model, exclude)]


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.identity(layer, "weight"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_left_alone_where_it_is_excluded(wrap: Any) -> None:
    model = named(head=wrap(nn.Linear(4, 4)))
    own = next(n for n, _ in model.named_parameters() if n.startswith("head.") and "bias" not in n)
    for pattern in ("head.*", "head.weight", own):
        assert names_of(model, pattern) == ["plain.weight"]
    with pytest.raises(PruneError, match=r"'head\.weight': is computed .* prune\.exclude"):
        prunable_parameters(model, ["head.bias"])


def expanded() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(1, 4).expand(4, 4))
    return layer


def whole_numbers() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "is of torch.complex64"),
        (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
        (whole_numbers, "is of torch.int8"),
        (expanded, "is expanded"),
    ],
)
def test_weights_that_have_no_order_or_no_place_are_refused(build: Any, message: str) -> None:
    model = named(odd=build())
    with pytest.raises(PruneError, match=rf"'odd\.weight': {message}.*prune\.exclude"):
        prunable_parameters(model)
    assert names_of(model, "odd.*") == ["plain.weight"]


def test_a_layer_without_weights_is_no_unit() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = named(empty=nn.Linear(0, 4))
    assert names_of(model) == ["plain.weight"]


def test_a_name_written_out_matches_itself() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})
    assert names_of(model, "a[0].weight") == ["a0.weight"]
    assert names_of(model, "a[[]0].*") == ["a0.weight"]
    assert names_of(model, "a[0].bias", "a[[]*") == ["a0.weight"]
    with pytest.raises(ConfigError, match=r"did you mean 'a\[\[\]0\]\.bias'"):
        names_of(model, "b[0].*")


@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("inputs", "groups", "fits"), [(8, 1, True), (8, 2, True), (8, 8, False), (12, 2, False)]
)
def test_patterns_do_not_cross_the_groups_of_a_convolution(
    num_axes: int, inputs: int, groups: int, fits: bool
) -> None:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_axes - 1]
    turned = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[num_axes - 1]
    for kind in (plain, turned):
        (unit,) = prunable_parameters(kind(inputs, 24, 3, groups=groups))
        assert unit.input_dim == (0 if kind is turned else 1)
        of_unit = {unit.name: tuple(unit.parameter.shape)}, prune_config(granularity="2:4")
        axes = {unit.name: unit.input_dim}, {unit.name: unit.num_groups}
        if fits:
            check_selectable(*of_unit, *axes)
            continue
        with pytest.raises(ConfigError, match=f"by 4, but 'weight' has {inputs // groups};"):
            check_selectable(*of_unit, *axes)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, prune.identity])
def test_a_weight_that_is_computed_from_others_is_refused_by_name(wrap: Any) -> None:
    model = TanhNet()
    wrap(model[2], "weight")
    with pytest.raises(PruneError, match=r"'2\.weight'"):
        prunable_parameters(model)
