"""One call of a network: the arguments that it takes for some test examples, without their labels.

Networks are traced, compared and timed by it, whatever nest of tensors a batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.errors import ExportError
from gbp_ray.workloads.batch import call_arguments, kind_of, logits_of, map_tensors, take_part
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import take_batch

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """The arguments of a network for some examples.

    Attributes:
        positional: Arguments without a name.
        named: Arguments by name.
        size: Examples; tensors whose first axis is as long have one row for each.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]
    size: int

    @classmethod
    def of(cls, model: nn.Module, workload: Workload, size: int) -> Call:
        """Takes the first examples of the test split, all of them where there are fewer."""
        size = min(size, num_examples(workload.test))
        batch = take_batch(workload, workload.test, torch.arange(size))
        call = cls(*call_arguments(model, workload, batch), size)
        if "labels" in call.named:
            # A network in use has none; one that cannot do without is called with them.
            named = {name: value for name, value in call.named.items() if name != "labels"}
            with suppress(Exception):
                bare = cls(call.positional, named, size)
                bare.run(model)
                return bare
        return call

    @torch.no_grad()
    def pass_through(self, model: Callable[..., Any]) -> Any:
        """Calls a network, and returns what it returns."""
        return model(*self.positional, **self.named)

    def run(self, model: Callable[..., Any]) -> Tensor:
        """Calls a network; of outputs that name them returns the logits.

        Raises:
            ExportError: It returns neither a tensor nor logits.
        """
        outputs = logits_of(self.pass_through(model))
        if not isinstance(outputs, Tensor):
            raise ExportError(
                f"the network returns {kind_of(outputs)}, and only one that returns a tensor, or "
                "logits by name, can be compared with what is exported"
            )
        return outputs

    def part(self, number: int) -> Call:
        """Takes the first examples."""
        rows = slice(number)
        positional = take_part(self.positional, rows, self.size)
        return Call(positional, take_part(self.named, rows, self.size), number)

    def resized(self, number: int) -> Call:
        """Takes any number of examples, again from the first after the last."""
        places = torch.arange(number) % self.size

        def take(tensor: Tensor) -> Tensor:
            has_rows = tensor.ndim and len(tensor) == self.size
            return tensor[places.to(tensor.device)] if has_rows else tensor

        positional: tuple[Any, ...] = map_tensors(self.positional, take)
        return Call(positional, map_tensors(self.named, take), number)

    def tensors(self) -> dict[str, Tensor]:
        """Lists its tensors by the names that they are stored under."""
        if len(self.positional) == 1 and isinstance(self.positional[0], Tensor) and not self.named:
            return {"inputs": self.positional[0]}
        found = {f"inputs.{name}": value for name, value in self.named.items()}
        found |= {f"inputs.{place}": value for place, value in enumerate(self.positional)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def leaves(self) -> dict[str, Tensor]:
        """Lists all tensors, also nested ones, by names that code can have; positional first."""
        if list(self.tensors()) == ["inputs"]:
            return self.tensors()
        return dict(_leaves_of("inputs", self.positional)) | dict(_leaves_of("", self.named))

    def shortened(self) -> Call | None:
        """Leaves out the last place of named sequences; None where there are none."""
        rows = [t for t in self.named.values() if isinstance(t, Tensor) and t.ndim > 1]
        if not rows or len({t.shape[1] for t in rows}) > 1 or rows[0].shape[1] < 2:
            return None
        cut = {
            name: t[:, :-1] if any(t is row for row in rows) else t
            for name, t in self.named.items()
        }
        return Call(self.positional, cut, self.size)

    def in_code(self) -> str:
        """Writes the arguments as a call of the program has them."""
        if list(self.tensors()) == ["inputs"]:
            return "inputs"
        places = (f"inputs_{place}" for place in range(len(self.positional)))
        return ", ".join([*places, *(f"{name}={name}" for name in self.named)])

    def free_sizes(self) -> tuple[Any, dict[str, Any]]:
        """Describes the axes whose lengths may differ: examples, and those that padding fills."""
        # Two examples and more: a size of one would be taken for a constant.
        batch = torch.export.Dim("batch", min=1)

        def free(value: Any) -> Any:
            if isinstance(value, Tensor):
                is_padded = bool(self.named) and value.ndim > 1
                axes: dict[int, Any] = {0: batch} if len(value) == self.size else {}
                return axes | ({1: torch.export.Dim.AUTO} if is_padded else {})
            if isinstance(value, Mapping):
                return {key: free(inner) for key, inner in value.items()}
            return type(value)(map(free, value)) if isinstance(value, (tuple, list)) else None

        return tuple(map(free, self.positional)), free(self.named)


def _leaves_of(name: str, nest: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(nest, Tensor):
        yield name, nest
    elif isinstance(nest, (tuple, list, Mapping)):
        pairs = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
        for key, value in pairs:
            yield from _leaves_of(f"{name}_{key}" if name else str(key), value)
