"""What the ops take, as structures. An op's flat list of arguments is their fields in order, made and read here alone.

Backends in Python are handed the structures; C++ reads the flat list, in which the base model's names begin with
`base_` and a Transform is one argument.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class Transform(NamedTuple):
    """z = softcap_c(logit_scale · raw) / temperature with softcap_c(x) = c·tanh(x / c), or x if the softcap is None."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(cls, flat: list[float]) -> "Transform":
        temperature, softcap, logit_scale = flat
        return cls(temperature, softcap or None, logit_scale)


def flat_transform(temperature: float, softcap: float | None, logit_scale: float) -> list[float]:
    """A Transform as an op takes it, 0 for no softcap. (A named tuple in place of the list takes PyTorch longer.)"""
    return [float(temperature), 0.0 if softcap is None else float(softcap), float(logit_scale)]


class Head(NamedTuple):
    """One model's last layer: hidden (…, D), weight (V, D), bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Transform

    @property
    def dtype(self) -> torch.dtype:
        """What multiplies: the wider of both."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)


class OptionalHead(NamedTuple):
    """That of a model which need not be given: then its tensors are None."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    transform: Transform

    def given(self) -> Head | None:
        if self.hidden is None or self.weight is None:
            return None
        return Head(self.hidden, self.weight, self.bias, self.transform)


class Logits(NamedTuple):
    """One model's given logits (…, V)."""

    logits: Tensor
    transform: Transform


class Targets(NamedTuple):
    """target (N, K) int64."""

    target: Tensor
    ignore_index: int


class Shards(NamedTuple):
    """Who holds the vocabulary: rank r of the process group of this name has tokens starts[r] to starts[r + 1].

    The weights and biases beside it are those of this rank's tokens.
    """

    group: str
    starts: list[int]


class Asked(NamedTuple):
    """What forward computes only on demand: `top`, the most likely token of each model and its log p."""

    top: bool


class NoiseInputs(NamedTuple):
    """What the noise of a draw depends on: row_id (N,) int64, or None for 0 … N − 1, the seed (64 bits, as int64) and
    the step, which come as numbers, or from the device as int64 tensors, (1,) and (1,) or (N,), which then count.

    first_token: of a part of a vocabulary, the place in the whole where it begins, a multiple of 4.
    """

    row_id: Tensor | None
    seed: int
    step: int
    seed_tensor: Tensor | None
    step_tensor: Tensor | None
    first_token: int = 0


class SampleOptions(NamedTuple):
    """Of both draws, and of the criterion, as `extrapolated_sample` has them."""

    gamma: float
    criterion: str
    threshold: float | None
    draft: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def truncate(self, vocabulary: int) -> bool:
        """A filter has to see a whole row of logits before a token is drawn; at temperature 0 none changes it."""
        return self.temperature > 0.0 and (0 < self.top_k < vocabulary or self.top_p < 1.0 or self.min_p > 0.0)


class Gradients(NamedTuple):
    """Upstream gradients by one model's statistics: by log p (N, K), by the others (N,); None counts as 0."""

    logp: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None


class PairGradients(NamedTuple):
    """Those of a pair, by the divergences too; that by delta_logp is part of those by both log p."""

    model: Gradients
    base: Gradients
    kl: Tensor | None
    reverse_kl: Tensor | None


class Saved(NamedTuple):
    """What backward has from forward of one model: its entropy (N,), and `extra` (2 or more, N), lse in two parts.

    log p_j = (z_j − extra[0]) − log1p(extra[1]), the row's maximum and Σ e^{z − maximum} without that of the maximum,
    the normalizer: lse would have lost, to a common offset of the logits, what distinguishes tokens. Of a maximum that
    is rounded the difference is in the sum.
    """

    entropy: Tensor
    extra: Tensor


class PairSaved(NamedTuple):
    """Those of a pair, in whose `extra` (4 or more, N) the base's normalizer follows that of the model."""

    entropy: Tensor
    base_entropy: Tensor
    kl: Tensor
    reverse_kl: Tensor
    extra: Tensor

    @property
    def model(self) -> Saved:
        return Saved(self.entropy, self.extra)

    @property
    def base(self) -> Saved:
        return Saved(self.base_entropy, self.extra[2:])


class Argument(NamedTuple):
    """One of an op's flat list, with its type in the schema."""

    type: str
    name: str


#: Types of fields that are one argument; a field of another type is a structure of its own.
_ARGUMENT_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool", float: "float", float | None: "float?",
    str: "str", Transform: "float[]", list[int]: "int[]",
}  # fmt: skip
_PREFIXES = {"model": "", "base": "base_"}


def arguments(structure: Any, prefix: str = "") -> tuple[Argument, ...]:
    """Of the flat list that holds `structure`."""
    found: list[Argument] = []
    for name, kind in get_type_hints(structure).items():
        if kind in _ARGUMENT_TYPES:
            found.append(Argument(_ARGUMENT_TYPES[kind], prefix + name))
        else:
            found += arguments(kind, prefix + _PREFIXES[name])
    return tuple(found)


def rebuilt(structures: Iterable[Any], flat: Iterator[Any]) -> list[Any]:
    """The structures, or single arguments, that a flat list begins with; the rest of it stays in `flat`."""
    return [_rebuild(structure, flat) for structure in structures]


def _rebuild(structure: Any, flat: Iterator[Any]) -> Any:
    if structure is Transform:
        return Transform.of(next(flat))
    if structure in _ARGUMENT_TYPES:
        return next(flat)
    return structure._make([next(flat) if kind is None else _rebuild(kind, flat) for kind in _parts(structure)])


@functools.cache
def _parts(structure: Any) -> tuple[Any, ...]:
    """Of each field: the structure that it is, or None."""
    kinds = get_type_hints(structure).values()
    return tuple(None if kind in _ARGUMENT_TYPES and kind is not Transform else kind for kind in kinds)
