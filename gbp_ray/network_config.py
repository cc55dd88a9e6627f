"""The sections of a job about how its network starts: from which weights, behind which encoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gbp_ray.sections import Section

__all__ = ["EncodingConfig", "TransferConfig"]


class TransferConfig(Section):
    """Starting from the weights of another training, with a new head where the classes differ."""

    checkpoint: str = ""
    """File of weights of this network, by path or s3:// address: .safetensors or an index of them,
    or what torch.save wrote (.pt, .pth, .ckpt, .bin): a state dict, or a dictionary that holds one.
    Empty starts from the network as built."""
    checkpoint_digest: str = ""
    """SHA-256 of that file, by which the trial is known; filled in when the job is read."""
    new_head: tuple[str, ...] = ()
    """Globs of weights that are not taken from the checkpoint but drawn anew, such as "linear.*";
    the file may lack them or have them in another shape."""


class EncodingConfig(Section):
    """A layer without learned weights in front of the network, which then takes intensities."""

    kind: Literal["none", "normalise", "thermometer", "one_hot"] = "none"
    """normalise: subtracts a mean, divides by a deviation. one_hot: each intensity becomes a 1 in
    the channel of its level and 0 in the others. thermometer: 1 in those of lower levels, too. The
    layer is saved with the network, so what is exported takes intensities in [0, 1] as well. Names
    of weights then begin with "network."."""
    levels: int = Field(8, ge=2, le=1024)
    """Channels that one_hot and thermometer make of each input channel."""
    mean: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] = ()
    """Of the intensities of each channel, for normalise; where neither this nor deviation is given,
    the workload's own are taken."""
    deviation: tuple[Annotated[float, Field(le=1e6)], ...] = ()
    """Likewise; 1 where the mean alone is given."""

    @model_validator(mode="after")
    def _can_divide(self) -> EncodingConfig:
        if any(value < 1e-6 for value in self.deviation):
            raise ValueError("deviation: must be above 0 in each channel, 1e-6 or more")
        return self
