"""The two models of a run: where they lie, their limits and tokenizer, and loading them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from ..hf import check_same_tokenizer, load_model, load_tokenizer
from ..hf.limits import model_limits
from .errors import JobError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_Loaded = TypeVar("_Loaded")
#: Of a repository on the Hub: its top level, without pickles and without weights for other frameworks.
_DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


class ModelPlace(NamedTuple):
    """A model as the user named it, and the directory in which its files lie."""

    option: str
    name: str
    directory: Path

    def __str__(self) -> str:
        return f"{self.option} {self.name}"


class Reading(NamedTuple):
    """How the text of the data becomes token ids, and which ids both models take."""

    tokenizer: Any
    vocabulary: int
    context: int | None


def check_device(name: str | None) -> str:
    """The device of the option --device, CUDA if there is one by default; JobError if it can not be used here."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch built without CUDA says so with an assertion.
        reason = str(error).splitlines()[0]
        raise JobError(f"--device is {name!r}, which can not be used here: {reason}") from error
    return str(device)


def find_model(option: str, name: str | Path, *, trust_remote_code: bool) -> ModelPlace:
    """The directory of a model, downloaded if `name` is one of the Hub; JobError if there are no weights in it."""
    directory = Path(name)
    if not directory.exists():
        directory = _download(option, str(name), trust_remote_code=trust_remote_code)
    if not directory.is_dir():
        raise JobError(f"{option} {name}: it is a file, expected a directory with config.json and *.safetensors")
    if not (directory / "config.json").is_file():
        raise JobError(f"{option} {name}: the directory has no config.json, expected that of a causal language model")
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which is not opened" if pickles else ""
        raise JobError(f"{option} {name}: the directory has no weights, expected *.safetensors{found}")
    return ModelPlace(option, str(name), directory)


def _download(option: str, name: str, *, trust_remote_code: bool) -> Path:
    patterns = [*_DOWNLOADED, "*.py"] if trust_remote_code else _DOWNLOADED
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise JobError(
            f"{option} {name}: there is no such directory, and no model of that name could be had from the Hub: "
            f"{_first_line(error)}"
        ) from error


def read_pair(rl: ModelPlace, base: ModelPlace, *, trust_remote_code: bool) -> Reading:
    """The tokenizer that both models share and the limits of the smaller one, without reading any weights."""
    tokenizer, base_tokenizer = (
        _load(place, "the tokenizer", partial(load_tokenizer, trust_remote_code=trust_remote_code))
        for place in (rl, base)
    )
    try:
        # Which token ends a text or pads it does not enter the numbers, and often differs after training.
        check_same_tokenizer(tokenizer, base_tokenizer, ignore=("eos_token", "pad_token"))
    except ValueError as error:
        raise JobError(f"the tokenizers of {rl} and {base} disagree: {error}") from error
    limits = [
        _load(place, "the config", partial(model_limits, trust_remote_code=trust_remote_code)) for place in (rl, base)
    ]
    contexts = [limit.context for limit in limits if limit.context is not None]
    return Reading(tokenizer, min(limit.vocabulary for limit in limits), min(contexts, default=None))


def load_weights(place: ModelPlace, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool) -> Any:
    """The model in memory; JobError if its files can not be read or lack weights."""
    return _load(
        place, "the model", partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    )


def _load(place: ModelPlace, what: str, load: Callable[[Path], _Loaded]) -> _Loaded:
    try:
        return load(place.directory)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise JobError(f"{place}: {what} can not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
