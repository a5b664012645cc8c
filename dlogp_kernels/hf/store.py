"""A base model's hidden states on disk, so that the two models of a pair need not be in memory together."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..report.files import replaced_atomically
from .heads import LmHead, lm_head
from .metrics import lm_head_inputs

_HEAD = "lm_head.safetensors"
_SAMPLES = "samples"
_SUFFIX = ".safetensors"
_LONGEST_NAME = 200
_DIGEST = "sha256"


class HiddenStore:
    """A directory with one safetensors file a sample, (T, D) as the model gave it, and the model's last layer.

    Files appear whole or not at all (they are written beside and renamed), so an interrupted run can be resumed; each
    holds a digest of all that is in it, and one that was damaged since is not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def create(cls, directory: str | Path, head: LmHead) -> "HiddenStore":
        """A store for the model whose last layer is `head`; one of the same model that is there is opened.

        Raises ValueError where `directory` holds the hidden states of another model.
        """
        store = cls(Path(directory))
        (store.directory / _SAMPLES).mkdir(parents=True, exist_ok=True)
        stored, packed = _whole(store.directory / _HEAD), _packed(head)
        if stored is None:
            _write(store.directory / _HEAD, *packed)
        elif stored[1][_DIGEST] != _digest(*packed):
            raise ValueError(
                f"{directory}: holds hidden states of a model with another last layer, expected the same model"
            )
        return store

    @classmethod
    def open(cls, directory: str | Path) -> "HiddenStore":
        """The store in `directory`; FileNotFoundError if there is none."""
        store = cls(Path(directory))
        if not (store.directory / _HEAD).is_file():
            raise FileNotFoundError(f"{directory}: has no {_HEAD}, expected a directory that HiddenStore.create made")
        return store

    @classmethod
    def whole(cls, directory: str | Path) -> "HiddenStore | None":
        """The store in `directory` if there is one whose last layer is not damaged; the samples may be."""
        return None if _whole(Path(directory) / _HEAD) is None else cls(Path(directory))

    def head(self) -> LmHead:
        """The last layer, its tensors mapped from the file."""
        tensors, options = _read(self.directory / _HEAD)
        fields: dict[str, Any] = tensors | {name: float(text) for name, text in options.items() if name != _DIGEST}
        return LmHead(**fields)

    def has(self, key: str, *, input_ids: Tensor | Sequence[int] | None = None) -> bool:
        """Whether a whole file of this sample is there, and of these tokens; a damaged one is not."""
        try:
            self.read(key, input_ids=input_ids)
        except (KeyError, ValueError):
            return False
        return True

    def keys(self) -> list[str]:
        """Of the samples there are, sorted."""
        names = (self.directory / _SAMPLES).glob(f"*{_SUFFIX}")
        return sorted(unquote(file.name.removesuffix(_SUFFIX)) for file in names)

    def write(self, key: str, hidden: Tensor, *, input_ids: Tensor | Sequence[int] | None = None) -> None:
        """Keep `hidden` (T, D) of the sample `key` in its dtype, and a fingerprint of the tokens (T) it belongs to.

        Raises ValueError for shapes that do not fit, or for a key whose file name would be too long.
        """
        if hidden.dim() != 2:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (T, D) of one sample")
        options = {"key": key}
        if input_ids is not None:
            tokens = _one_sample(input_ids)
            if tokens.shape[0] != hidden.shape[0]:
                raise ValueError(f"input_ids has {tokens.shape[0]} tokens, expected {hidden.shape[0]}, as hidden has")
            options["tokens"] = _fingerprint(tokens)
        _write(self._path(key), {"hidden": hidden.detach().cpu().contiguous()}, options)

    def read(self, key: str, *, input_ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """The hidden states (T, D) of a sample, mapped from the file into memory (read-only in effect).

        Raises:
            KeyError: no such sample.
            ValueError: its file is damaged or not one of this sample, or `input_ids` are not the tokens it was
                written with.
        """
        path = self._path(key)
        if not path.is_file():
            raise KeyError(f"{self.directory} has no sample {key!r}")
        tensors, options = _read(path)
        if "hidden" not in tensors or options.get("key") != key:
            raise ValueError(f"{path}: is not of the sample {key!r}, expected a file that HiddenStore.write made")
        if input_ids is not None and options.get("tokens") != _fingerprint(_one_sample(input_ids)):
            raise ValueError(f"{path}: belongs to other tokens than input_ids, expected those it was written with")
        return tensors["hidden"]

    def _path(self, key: str) -> Path:
        name = quote(key, safe=" ,=+@")
        if not name or len(name) > _LONGEST_NAME or name.startswith("."):
            raise ValueError(
                f"key is {key!r}, expected 1 to {_LONGEST_NAME} characters (escaped as in a URL), the first not a dot"
            )
        return self.directory / _SAMPLES / f"{name}{_SUFFIX}"


def store_base_hidden(
    model: nn.Module,
    samples: Iterable[tuple[str, Tensor | Sequence[int]]],
    directory: str | Path,
    *,
    prefill_chunk: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> HiddenStore:
    """Run a base model over a data set and keep its hidden states; samples that are there already are skipped.

    Args:
        model: a causal language model of `transformers`, or a PeftModel of one.
        samples: pairs of a key, one of its own for each sample, and token ids (T).
        directory: of the `HiddenStore`, made if it is not there.
        prefill_chunk: as in `lm_head_inputs`.
        progress: called with the key of each sample that is done, skipped ones included.

    Returns:
        HiddenStore: `store.read(key)[None]` and `store.head()` are `base_hidden` and `base_model` of `token_metrics`.

    A damaged file, or one written for other tokens, is computed again. Raises ValueError where `directory` holds
    the hidden states of another model.
    """
    with torch.no_grad():
        store = HiddenStore.create(directory, lm_head(model))
        for key, input_ids in samples:
            tokens = _one_sample(input_ids)
            if not store.has(key, input_ids=tokens):
                on_device = tokens.to(next(model.parameters()).device)
                hidden = lm_head_inputs(model, on_device[None], prefill_chunk=prefill_chunk).hidden[0]
                store.write(key, hidden, input_ids=tokens)
            if progress is not None:
                progress(key)
    return store


def _one_sample(input_ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids (T), int64, on the CPU."""
    tokens = torch.as_tensor(input_ids)
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected (T,) integers, T ≥ 1"
        )
    return tokens.to("cpu", torch.int64)


def _fingerprint(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _packed(head: LmHead) -> tuple[dict[str, Tensor], dict[str, str]]:
    given = {name: value for name, value in head._asdict().items() if value is not None}
    tensors = {name: x.detach().cpu().contiguous() for name, x in given.items() if isinstance(x, Tensor)}
    return tensors, {name: repr(value) for name, value in given.items() if name not in tensors}


def _write(path: Path, tensors: dict[str, Tensor], options: dict[str, str]) -> None:
    with replaced_atomically(path) as temporary:
        save_file(tensors, temporary, metadata=options | {_DIGEST: _digest(tensors, options)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            options = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated or not a safetensors file ({error}); remove it") from error
    if options.get(_DIGEST) != _digest(tensors, options):
        raise ValueError(f"{path}: is damaged, its digest is not that of its content; remove it")
    return tensors, options


def _whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What a file holds, if it is there and not damaged."""
    try:
        return _read(path) if path.is_file() else None
    except ValueError:
        return None


def _digest(tensors: dict[str, Tensor], options: dict[str, str]) -> str:
    """SHA-256 of all that a file holds, but for the digest itself."""
    hasher = hashlib.sha256(repr(sorted(item for item in options.items() if item[0] != _DIGEST)).encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
