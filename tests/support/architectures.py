"""Architectures of the table of structured pruning: tiny, with the operators of the real ones.

Each builder returns a network and the tensors of one example, with a batch axis of one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.workloads.batch import logits_of, tensors_in
from gbp_ray.workloads.images import import_vision
from gbp_ray.workloads.networks import SmallUNet, build_cifar_resnet

Built = tuple[nn.Module, tuple[Tensor, ...]]
Builder = Callable[[], Built]

TOKENS, CLASSES = 64, 10


def vision() -> Any:
    """Returns torchvision's models; its import must come before those of timm and transformers."""
    return import_vision("models")


def timm_model(name: str, **options: Any) -> nn.Module:
    vision()
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


def images(side: int) -> tuple[Tensor]:
    return (torch.randn(1, 3, side, side),)


def sentence(length: int = 12) -> tuple[Tensor]:
    return (torch.randint(0, TOKENS, (1, length)),)


def run(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Passes an example through a network; returns its logits."""
    return list(tensors_in(logits_of(model(*inputs))))


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Draws what networks begin with as ones or zeros: norms, scales, last layers."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            is_scale = parameter.ndim == 1 and bool(parameter.any())
            low, high = (0.5, 1.5) if is_scale else (-0.3, 0.3)
            parameter.uniform_(low, high)
    return model


@torch.no_grad()
def settle(model: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """Gives every BatchNorm statistics near those of random inputs, which so differ at its outputs.

    With statistics of another kind, deep networks answer all inputs alike.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(*(torch.randn(8, *tensor.shape[1:]) for tensor in inputs))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        spread = norm.running_var.sqrt()
        norm.running_mean.add_(0.2 * spread * torch.randn_like(spread))
        norm.running_var.mul_(0.7 + 0.6 * torch.rand_like(spread))
    return model.eval()


# -- convolutions ----------------------------------------------------------------------------------


class _OptionB(nn.Module):
    """A residual block whose shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inside + self.shortcut(x))


def classifier(*layers: nn.Module, width: int) -> nn.Sequential:
    """Puts pooling and a linear layer behind convolutions."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def resnet_b(depth: int) -> Built:
    widths = [16, *(width for width in (16, 32, 64) for _ in range((depth - 2) // 6))]
    blocks = [_OptionB(a, b) for a, b in pairwise(widths)]
    return classifier(conv_norm(3, 16, 3), *blocks, width=64), images(16)


def conv_norm(before: int, after: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.SiLU())


def vgg() -> Built:
    features: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        features += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)]
        features += [nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    model = vision().VGG(nn.Sequential(*features), num_classes=CLASSES, dropout=0.5)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0] = nn.Linear(64 * 4, 64)
    model.classifier[3] = nn.Linear(64, 48)
    model.classifier[6] = nn.Linear(48, CLASSES)
    return model, images(16)


def mobilenet_v2() -> Built:
    setting = [[1, 16, 1, 1], [6, 16, 2, 2], [6, 24, 2, 2]]
    model = vision().MobileNetV2(CLASSES, inverted_residual_setting=setting, round_nearest=4)
    return model, images(32)


def mobilenet_v3() -> Built:
    module = vision().mobilenetv3
    rows = [
        module.InvertedResidualConfig(*row, width_mult=1.0)
        for row in (
            (16, 3, 16, 16, True, "RE", 2, 1),
            (16, 3, 48, 24, False, "RE", 2, 1),
            (24, 5, 64, 24, True, "HS", 1, 1),
        )
    ]
    return vision().MobileNetV3(rows, 64, num_classes=CLASSES), images(32)


def efficientnet() -> Built:
    module = vision().efficientnet
    rows = [
        module.MBConvConfig(*row, width_mult=0.5, depth_mult=1.0)
        for row in ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2))
    ]
    return vision().EfficientNet(rows, 0.2, num_classes=CLASSES), images(32)


def regnet() -> Built:
    module = vision().regnet
    params = module.BlockParams.from_init_params(
        depth=4, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return vision().RegNet(params, num_classes=CLASSES), images(32)


def densenet() -> Built:
    return vision().DenseNet(8, (2, 3), 16, num_classes=CLASSES), images(32)


def shufflenet() -> Built:
    widths = [8, 16, 32, 64, 64]
    return vision().ShuffleNetV2([2, 1, 1], widths, num_classes=CLASSES), images(32)


def resnext() -> Built:
    module = vision().resnet
    model = vision().ResNet(module.Bottleneck, [1, 2, 1, 1], CLASSES, groups=8, width_per_group=4)
    return model, images(32)


def convnext() -> Built:
    return timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)), images(32)


def unet() -> Built:
    return SmallUNet(3, 4, 8), images(16)


class _Split(nn.Module):
    """The block of YOLO: half of the channels pass on, and all that is made of them is joined."""

    def __init__(self, before: int, after: int, depth: int) -> None:
        super().__init__()
        half = after // 2
        self.first = conv_norm(before, after, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_norm(half, half, 3), conv_norm(half, half, 3)) for _ in range(depth)
        )
        self.last = conv_norm((2 + depth) * half, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


def yolo() -> Built:
    layers = [conv_norm(3, 16, 3), _Split(16, 32, 2), _Split(32, 32, 1)]
    return classifier(*layers, width=32), images(16)


def conv1d() -> Built:
    body = [nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 3), nn.ReLU()]
    head = [nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(4 * 32, CLASSES)]
    return nn.Sequential(*body, *head), (torch.randn(1, 3, 20),)


def conv3d() -> Built:
    body = [nn.Conv3d(3, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.ReLU(), nn.Conv3d(8, 16, 3)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(*body, *head), (torch.randn(1, 3, 8, 8, 8),)


def group_norm() -> Built:
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 32, 3)]
    layers += [nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 16, 1)]
    return classifier(*layers, width=16), images(12)


def depthwise() -> Built:
    layers = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16)]
    return classifier(*layers, nn.Hardswish(), nn.Conv2d(16, 32, 1), width=32), images(12)


def transposed() -> Built:
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 24, 2, 2), nn.BatchNorm2d(24)]
    layers += [nn.ReLU(), nn.ConvTranspose2d(24, 24, 2, 2, groups=24), nn.ConvTranspose2d(24, 4, 1)]
    return nn.Sequential(*layers), images(8)


# -- attention and sequences -----------------------------------------------------------------------


def vit() -> Built:
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    return timm_model("vit_tiny_patch16_224", img_size=32, **sizes), images(32)


def torchvision_vit() -> Built:
    model = vision().VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES)
    return model, images(32)


def deit() -> Built:
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    return timm_model("deit_tiny_distilled_patch16_224", img_size=32, **sizes), images(32)


def swin() -> Built:
    sizes = {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24, "window_size": 4}
    return timm_model("swin_tiny_patch4_window7_224", img_size=32, **sizes), images(32)


def mobilevit() -> Built:
    model = timm_model("mobilevit_xxs")
    for module in model.modules():
        if hasattr(module, "transformer"):
            module.transformer = module.transformer[:1]
    return model, images(64)


def efficientformer() -> Built:
    return timm_model("efficientformerv2_s0", img_size=64), images(64)


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 12)
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.table(tokens))[0])[0])


def lstm() -> Built:
    return _Tagger(), sentence()


def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 4))
    return model, (torch.randn(1, 6, 8),)


def bert() -> Built:
    vision()
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return BertForSequenceClassification(config), sentence()


def gpt2() -> Built:
    vision()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), sentence()


def llama(heads: int, key_value_heads: int, layers: int = 1) -> Built:
    vision()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=8 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=96,
    )
    return LlamaForCausalLM(config), sentence()


def mixtral() -> Built:
    vision()
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config), sentence()


class _Experts(nn.Module):
    """A mixture in which every token passes through all experts."""

    def __init__(self, width: int = 16, experts: int = 4, hidden: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.2)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = self.router(x).softmax(-1).transpose(1, 2)
        hidden = functional.silu(torch.einsum("btc,ech->beth", x, self.up))
        of_experts = torch.einsum("beth,ehc->betc", hidden, self.down)
        return self.head((weights[..., None] * of_experts).sum(1))


def experts() -> Built:
    return _Experts(), (torch.randn(1, 5, 8),)


# -- the table -------------------------------------------------------------------------------------

TIMM, TRANSFORMERS, VISION = "timm", "transformers", "torchvision"

ARCHITECTURES: dict[str, tuple[Builder, str]] = {
    "ResNet-20 A": (lambda: (build_cifar_resnet(20), images(16)), ""),
    "ResNet-56 A": (lambda: (build_cifar_resnet(56), images(16)), ""),
    "ResNet-20 B": (lambda: resnet_b(20), ""),
    "ResNet-56 B": (lambda: resnet_b(56), ""),
    "VGG": (vgg, VISION),
    "MobileNetV2": (mobilenet_v2, VISION),
    "MobileNetV3": (mobilenet_v3, VISION),
    "EfficientNet": (efficientnet, VISION),
    "RegNet": (regnet, VISION),
    "DenseNet": (densenet, VISION),
    "ShuffleNetV2": (shufflenet, VISION),
    "ResNeXt": (resnext, VISION),
    "ConvNeXt": (convnext, TIMM),
    "ViT": (vit, TIMM),
    "ViT of torchvision": (torchvision_vit, VISION),
    "DeiT": (deit, TIMM),
    "Swin": (swin, TIMM),
    "MobileViT": (mobilevit, TIMM),
    "EfficientFormerV2 S0": (efficientformer, TIMM),
    "U-Net": (unet, ""),
    "YOLO chunk and cat": (yolo, ""),
    "Conv1d": (conv1d, ""),
    "Conv3d": (conv3d, ""),
    "GroupNorm": (group_norm, ""),
    "depthwise": (depthwise, ""),
    "transposed": (transposed, ""),
    "LSTM": (lstm, ""),
    "Transformer encoder": (encoder, ""),
    "BERT": (bert, TRANSFORMERS),
    "GPT-2": (gpt2, TRANSFORMERS),
    "Llama 8/8": (lambda: llama(8, 8), TRANSFORMERS),
    "Llama 8/4": (lambda: llama(8, 4, layers=2), TRANSFORMERS),
    "Llama 9/3": (lambda: llama(9, 3), TRANSFORMERS),
    "Llama 8/1": (lambda: llama(8, 1), TRANSFORMERS),
    "mixture of experts": (experts, ""),
    "Mixtral": (mixtral, TRANSFORMERS),
}
"""By name: the builder, and the package that it needs beside torch."""


def why_missing(name: str) -> str:
    """Words why an architecture cannot be built here, "" where it can."""
    package = ARCHITECTURES[name][1]
    is_there = not package or importlib.util.find_spec(package) is not None
    return "" if is_there else f"{package} is not installed"


def build(name: str, seed: int = 0) -> Built:
    """Builds a network in eval mode with random weights and statistics."""
    torch.manual_seed(seed)
    model, inputs = ARCHITECTURES[name][0]()
    return settle(randomize(model), inputs), inputs


def two_examples(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Makes a batch of two different examples of one."""
    return tuple(
        torch.cat([x, torch.randn_like(x) if x.is_floating_point() else (x + 7) % TOKENS])
        for x in inputs
    )
