"""A recurrent ConvNet: layers that take several steps with one kernel.

Source: Liang and Hu, 2015, "Recurrent Convolutional Neural Network for Object Recognition", CVPR,
eq. 1 and figure 1, with BatchNorm in the place of local response normalisation.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RecurrentConvNet", "RecurrentLayer"]


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
