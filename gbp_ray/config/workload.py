"""The sections of a job for the workload: factory, first weights, encoding of inputs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gbp_ray.config.schema import MOST_EXAMPLES, PLUG_IN, Idle, Section, plain

__all__ = ["EncodingConfig", "TransferConfig", "WorkloadConfig"]


_NO_CHECKPOINT = Idle('checkpoint = ""', lambda transfer: not transfer.checkpoint)
_NOT_NORMALISED = Idle("kind = {kind}", lambda encoding: encoding.kind != "normalise")
_NO_LEVELS = Idle("kind = {kind}", lambda encoding: encoding.kind in ("none", "normalise"))


class TransferConfig(Section):
    """A start from the weights of another training, with a new head where the classes differ."""

    checkpoint: str = ""
    """File of weights of this network, by path or s3:// address: .safetensors or an index of them,
    or what torch.save wrote (.pt, .pth, .ckpt, .bin): a state dict, or a dictionary that holds one.
    Empty starts from the network as built."""
    checkpoint_digest: Annotated[str, _NO_CHECKPOINT] = ""
    """SHA-256 of that file, by which the trial is known; filled in when the job is read."""
    new_head: Annotated[tuple[str, ...], _NO_CHECKPOINT] = ()
    """Globs of weights that are not taken from the checkpoint but drawn anew, such as "linear.*";
    the file may lack them or have them in another shape."""


class EncodingConfig(Section):
    """A layer without learned weights in front of the network, which then takes intensities."""

    kind: Literal["none", "normalise", "thermometer", "one_hot"] = "none"
    """normalise: subtracts a mean, divides by a deviation. one_hot: each intensity becomes a 1 in
    the channel of its level and 0 in the others. thermometer: 1 in those of lower levels, too. The
    layer is saved with the network, so what is exported takes intensities in [0, 1] as well. Names
    of weights then begin with "network."."""
    levels: Annotated[int, _NO_LEVELS] = Field(8, ge=2, le=1024)
    """Channels that one_hot and thermometer make of each input channel."""
    mean: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], _NOT_NORMALISED] = ()
    """Of the intensities of each channel, for normalise; where neither this nor deviation is given,
    the workload's own are taken."""
    deviation: Annotated[tuple[Annotated[float, Field(le=1e6)], ...], _NOT_NORMALISED] = ()
    """Likewise; 1 where only the mean is given."""

    @model_validator(mode="after")
    def _can_divide(self) -> EncodingConfig:
        if any(value < 1e-6 for value in self.deviation):
            raise ValueError("deviation: must be above 0 in each channel, 1e-6 or more")
        return self


class WorkloadConfig(Section):
    """The model to prune, and its data."""

    factory: str
    """Code that makes the workload, as "module:attr"; the attr is called with the options."""
    options: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    tie: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = ()
    """Groups of layers that share one weight, by name or glob: [["layer1.*.conv2"]]. Their shapes
    must be equal; the weight is that of the first layer."""
    eval_batch_size: int = Field(256, ge=1, le=MOST_EXAMPLES)
    """Examples per batch when metrics are measured, on each worker."""
    eval_precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of the passes that measure metrics (torch.autocast); losses get float32 outputs.
    Accuracy under attack is measured in float32, like the attack itself."""
    channels_last: bool = False
    """Whether images (B, C, H, W) lie in memory pixel by pixel, as convolutions like it on most
    processors: the same network, with other last bits."""
    transfer: TransferConfig = TransferConfig()
    encoding: EncodingConfig = EncodingConfig()
    validation: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of the training examples that the seed holds out, never trained or scored on. Rounds
    are then judged by them, and the test split is used once, at the end, for the chosen round."""
    train_sample: int = Field(1000, ge=0, le=MOST_EXAMPLES)
    """Training examples, not augmented, on which the metric is measured after each round, too; the
    gap to the held-out one is overfitting. 0 leaves it out."""

    @field_validator("factory")
    @classmethod
    def _is_plug_in(cls, value: str) -> str:
        if not PLUG_IN.fullmatch(value):
            raise ValueError('must read "module:attr", like "gbp_ray.zoo:digits_convnet"')
        return value

    @field_validator("options")
    @classmethod
    def _are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        plain_values = {}
        for name, option in value.items():
            try:
                plain_values[plain(name)] = plain(option)
            except (TypeError, ValueError, RecursionError):
                raise ValueError(
                    f"{name!r} must be text, a finite number, true or false, a list or a table; "
                    "put quotes around a date"
                ) from None
        return plain_values
