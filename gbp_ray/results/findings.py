"""The findings of `gbp-ray explain` about a trial: kept beside it, read without torch.

<storage>/<job>/explained/<trial_id>/findings.json          everything that is a number or a word
                                     pictures.safetensors   images and input-gradient maps
                                     shared.json            their record
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from gbp_ray.errors import StoreError
from gbp_ray.results.store import Store

__all__ = [
    "ClassFinding",
    "ExampleFinding",
    "Findings",
    "LayerSaliency",
    "read_findings",
]

_JSON, _PICTURES = "findings.json", "pictures.safetensors"
_FOLDER = "explained/"


@dataclass(frozen=True)
class LayerSaliency:
    """Saliency of a layer, before and after pruning.

    Attributes:
        dense_all: Sum of the scores of all its weights in the dense network.
        dense_kept: Of those that the pruned network keeps.
        pruned: Sum of the scores in the pruned network.
    """

    name: str
    num_weights: int
    num_kept: int
    dense_all: float
    dense_kept: float
    pruned: float


@dataclass(frozen=True)
class ClassFinding:
    """Right answers among the test examples of a class."""

    label: int
    num_examples: int
    num_right_dense: int
    num_right_pruned: int


@dataclass(frozen=True)
class ExampleFinding:
    """A test example as both networks see it; its pictures have the same place in the arrays."""

    index: int
    label: int
    answer_dense: int
    answer_pruned: int
    confidence_dense: float
    confidence_pruned: float

    @property
    def is_changed(self) -> bool:
        """Whether the answers differ."""
        return self.answer_dense != self.answer_pruned


@dataclass(frozen=True)
class Findings:
    """The findings about one round of a trial.

    Attributes:
        criterion: By which saliency was measured.
        num_changed: Test examples whose answer changed; of them `num_hurt` from right to wrong and
            `num_helped` from wrong to right.
        agreement: Mean cosine of the two networks' input gradients, over examples whose answer
            stayed ("same") and over those whose answer changed ("changed").
        class_names: By label, as far as the data have names.
        images: (n, height, width, 1 or 3) uint8, empty where inputs are no images.
        maps_dense: (n, height, width) float32, |gradient| of the true class's output.
        maps_pruned: Likewise.
        left_out: Parts that could not be measured, a sentence each.
    """

    trial_id: str
    round: int
    criterion: str
    num_examples: int
    layers: tuple[LayerSaliency, ...]
    classes: tuple[ClassFinding, ...] = ()
    num_changed: int = 0
    num_hurt: int = 0
    num_helped: int = 0
    agreement: Mapping[str, float] = field(default_factory=dict)
    examples: tuple[ExampleFinding, ...] = ()
    class_names: tuple[str, ...] = ()
    images: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 1), np.uint8))
    maps_dense: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1), np.float32))
    maps_pruned: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1), np.float32))
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Findings on round {self.round} of {self.trial_id}: " + (
            f"{self.num_changed} of {self.num_examples} answers changed>"
            if self.classes
            else "saliency only>"
        )

    def to_files(self) -> dict[str, bytes]:
        """Writes the files that are kept."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        return {
            _JSON: json.dumps(self.to_dict(), indent=1).encode() + b"\n",
            _PICTURES: save_arrays(arrays),
        }

    def to_dict(self) -> dict[str, Any]:
        """Gives everything but the pictures as plain values."""
        # asdict would copy the arrays.
        small = {k: v for k, v in vars(self).items() if k not in _ARRAYS}
        for name in ("layers", "classes", "examples"):
            small[name] = [asdict(item) for item in small[name]]
        lists = {name: list(getattr(self, name)) for name in ("left_out", "class_names")}
        return {**small, "agreement": dict(self.agreement), **lists}

    def name_class(self, label: int) -> str:
        """Names a class as the data do, or by its number."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], source: str) -> Findings:
        """Reads them back.

        Raises:
            StoreError: They are of another kind, or of another version.
        """
        try:
            tree = json.loads(files[_JSON])
            kinds = get_type_hints(cls)
            for name in [name for name in tree if name not in _ARRAYS]:
                # Each by its own type; a name that is none of ours is a KeyError.
                tree[name] = TypeAdapter(kinds[name]).validate_python(tree[name])
            arrays: dict[str, Any] = load_arrays(files[_PICTURES])
            return cls(**tree, **arrays)
        except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
            raise StoreError(
                f"'{source}': cannot be read ({type(error).__name__}: {error}); run gbp-ray "
                "explain again"
            ) from None

    def save(self, store: Store) -> str:
        """Commits them beside the trial; returns where."""
        folder = f"{_FOLDER}{self.trial_id}"
        store.write_shared(folder, self.to_files(), {"round": self.round})
        return store.objects.uri_of(folder)


_ARRAYS = ("images", "maps_dense", "maps_pruned")


def read_findings(store: Store, trial_id: str) -> Findings | None:
    """Reads what was found about a trial, or None where nobody asked.

    Raises:
        StoreError: It is damaged.
    """
    folder = f"{_FOLDER}{trial_id}"
    found = store.read_shared(folder)
    return None if found is None else Findings.from_files(found[1], store.objects.uri_of(folder))
