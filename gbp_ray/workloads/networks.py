"""Small networks for small images: residual, recurrent, and one for labels by pixel.

The residual ones were made for CIFAR-10 and differ from those made for ImageNet. Source: He, Zhang,
Ren and Sun, 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.
Their parameters bear the names that published checkpoints use: `conv1`, `bn1`,
`layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}`, `linear`. No operation works in place, so that gradients
per example (`torch.func.vmap`) and second derivatives go through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import WorkloadError

__all__ = [
    "CifarResNet",
    "RecurrentConvNet",
    "RecurrentLayer",
    "SmallUNet",
    "build_cifar_resnet",
]

_WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of residual blocks, average pooling and a linear layer.

    Images (B, 3, 32, 32) give logits (B, classes). The stages have 16, 32 and 64 channels; the
    second and the third begin by halving height and width.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1 = _stack_blocks(_WIDTHS[0], _WIDTHS[0], blocks_per_stage)
        self.layer2 = _stack_blocks(_WIDTHS[0], _WIDTHS[1], blocks_per_stage)
        self.layer3 = _stack_blocks(_WIDTHS[1], _WIDTHS[2], blocks_per_stage)
        self.linear = nn.Linear(_WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits (B, classes) of normalised images (B, 3, H, W)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self._halves = stride == 2
        added = channels_out - channels_in
        self._zeros = added // 2, added - added // 2

    def forward(self, hidden: Tensor) -> Tensor:
        residual = self.bn1(self.conv1(hidden))
        residual = self.bn2(self.conv2(functional.relu(residual)))
        return functional.relu(residual + self._shortcut(hidden))

    def _shortcut(self, hidden: Tensor) -> Tensor:
        """Option A: every second pixel, and zeros for half of the new channels on either side."""
        if not self._halves:
            return hidden
        return functional.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, *self._zeros))


def _stack_blocks(channels_in: int, channels_out: int, num_blocks: int) -> nn.Sequential:
    first = _Block(channels_in, channels_out)
    return nn.Sequential(first, *(_Block(channels_out, channels_out) for _ in range(1, num_blocks)))


def build_cifar_resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """Builds the ResNet with `depth` weighted layers: 20 (269,722 parameters), 32, 56, ...

    Raises:
        WorkloadError: The depth is not 6n + 2 for a whole n of at least 1.
    """
    blocks_per_stage, rest = divmod(depth - 2, 6)
    if rest or blocks_per_stage < 1:
        raise WorkloadError(
            f"workload.options.depth = {depth}: must be 6n + 2, such as 20, 32, 44, 56 or 110"
        )
    return CifarResNet(blocks_per_stage, num_classes)


class RecurrentLayer(nn.Module):
    """h_0 = relu(norm_0(V x)), h_t = relu(norm_t(V x + W h_{t-1})): one kernel W in all steps.

    Args:
        steps: How often the kernel is used.
        is_shared: Without it each step has a kernel of its own.
    """

    def __init__(self, channels_in: int, channels: int, steps: int, is_shared: bool) -> None:
        super().__init__()
        self.drive = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.kernels = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            for _ in range(1 if is_shared else steps)
        )
        # What arrives at a step has statistics of its own.
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(steps + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Computes the last step, (B, channels, H, W)."""
        driven = self.drive(images)
        hidden = functional.relu(self.norms[0](driven))
        for step in range(1, len(self.norms)):
            kernel = self.kernels[(step - 1) % len(self.kernels)]
            hidden = functional.relu(self.norms[step](driven + kernel(hidden)))
        return hidden


class RecurrentConvNet(nn.Module):
    """Two recurrent layers with 2x2 max pooling between them, average pooling, a linear layer."""

    def __init__(
        self, channels_in: int, num_classes: int, width: int, steps: int, is_shared: bool
    ) -> None:
        super().__init__()
        self.layer1 = RecurrentLayer(channels_in, width, steps, is_shared)
        self.layer2 = RecurrentLayer(width, 2 * width, steps, is_shared)
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits (B, classes) of images (B, channels, H, W)."""
        hidden = functional.max_pool2d(self.layer1(images), 2)
        return self.linear(self.layer2(hidden).mean(dim=(2, 3)))


class SmallUNet(nn.Module):
    """Two halvings of the resolution, and as many doublings that see what was there before.

    Source: Ronneberger, Fischer and Brox, 2015, "U-Net", arXiv 1505.04597; here with one
    convolution on each level, and BatchNorm.
    """

    def __init__(self, channels_in: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.down1 = _conv_norm(channels_in, width)
        self.down2 = _conv_norm(width, 2 * width)
        self.bottom = _conv_norm(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = _conv_norm(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = _conv_norm(2 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits (B, classes, H, W) of images (B, channels, H, W), sides in fours."""
        full = self.down1(images)
        half = self.down2(functional.max_pool2d(full, 2))
        hidden = self.bottom(functional.max_pool2d(half, 2))
        hidden = self.join2(torch.cat([self.up2(hidden), half], dim=1))
        return self.head(self.join1(torch.cat([self.up1(hidden), full], dim=1)))


def _conv_norm(channels_in: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
