"""The two models of a run: where they lie, their limits and tokenizer, and loading them."""

import importlib.util
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from ...hf import check_same_tokenizer, context_length, load_model, load_tokenizer
from ...hf.checkpoint import Stored, is_rounded, own_dtype, stored_tensors, update_and_rounding
from ...hf.heads import lm_head_names, vocabulary_of
from ...hf.loading import adapter_base, load_without_weights
from ...installation import how_to_install
from ...ops import backends
from ..errors import JobError

#: By the names that --dtype has for them; auto is each checkpoint's own.
DTYPES: dict[str, torch.dtype | Literal["auto"]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "auto": "auto",
}
#: A rounding that changes W_RL − W_base by more than this share of its norm is told.
_TOLD_ROUNDING = 0.02
_DEVICES = ("cpu", "cuda")

_Loaded = TypeVar("_Loaded")
#: What is taken of a repository on the Hub: its top level, without pickles and weights for other frameworks.
_DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelPlace(NamedTuple):
    """A model as the user named it, the directory in which its files lie, and whether code in it may be run.

    An adapter has a `base`, the model that it was trained on.
    """

    option: str
    name: str
    directory: Path
    trust_remote_code: bool
    base: Any = None

    @property
    def whole(self) -> "ModelPlace":
        """The model of which most weights are."""
        return self.base or self

    def absolute(self) -> "ModelPlace":
        """With paths that mean the same in another directory."""
        base = None if self.base is None else self.base.absolute()
        return self._replace(directory=Path(self.directory).absolute(), base=base)

    def __str__(self) -> str:
        return f"{self.option} {self.name}"

    @property
    def revision(self) -> str | None:
        """The commit of a model of the Hub; None of a directory of the user's."""
        named_after_commit = _COMMIT.fullmatch(self.directory.name)
        return self.directory.name if named_after_commit and not Path(self.name).exists() else None


class Reading(NamedTuple):
    """How the text of the data becomes token ids, and which ids both models take."""

    tokenizer: Any
    vocabulary: int
    context: int | None


def check_device(name: str | None) -> str:
    """The device of the option --device, CUDA if there is one by default; JobError if it can not be used here."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in _DEVICES:
        raise JobError(f"--device is {name!r}, which can not be used here: expected cpu or cuda, such as cuda:1")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch built without CUDA says so with an assertion.
        reason = str(error).splitlines()[0]
        raise JobError(f"--device is {name!r}, which can not be used here: {reason}") from error
    backends.warn_of_missing_kernels(device)
    return str(device)


def find_pair(rl: str | Path, base: str | Path, *, trust_remote_code: bool) -> tuple[ModelPlace, ModelPlace]:
    """The directories of the models of --rl and --base, see `find_model`."""
    return (
        find_model("--rl", rl, trust_remote_code=trust_remote_code),
        find_model("--base", base, trust_remote_code=trust_remote_code),
    )


def find_model(option: str, name: str | Path, *, trust_remote_code: bool) -> ModelPlace:
    """The directory of a model, downloaded if `name` is one of the Hub; JobError if there are no weights in it."""
    place = _find(option, name, trust_remote_code=trust_remote_code)
    return place._replace(base=_base_of(place)) if _is_adapter(place.directory) else place


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def _find(option: str, name: str | Path, *, trust_remote_code: bool) -> ModelPlace:
    """A model, or an adapter without what it is of."""
    directory = Path(name)
    if not directory.exists():
        directory = _download(option, str(name), trust_remote_code=trust_remote_code)
    if not directory.is_dir():
        raise JobError(f"{option} {name}: it is a file, expected a directory with config.json and *.safetensors")
    if not _is_adapter(directory) and not (directory / "config.json").is_file():
        raise JobError(f"{option} {name}: the directory has no config.json, expected that of a causal language model")
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which is not opened" if pickles else ""
        raise JobError(f"{option} {name}: the directory has no weights, expected *.safetensors{found}")
    return ModelPlace(option, str(name), directory, trust_remote_code)


def _base_of(adapter: ModelPlace) -> ModelPlace:
    if importlib.util.find_spec("peft") is None:
        raise JobError(
            f"{adapter}: it is an adapter, and peft can not be imported, expected the extra 'trl': "
            f"{how_to_install('trl')}"
        )
    name = _load(adapter, "the adapter", adapter_base)
    assert name is not None
    base = _find(f"{adapter}, an adapter of", name, trust_remote_code=adapter.trust_remote_code)
    if _is_adapter(base.directory):
        raise JobError(f"{base}: it is itself an adapter, expected a whole model: merge it into its own first")
    return base


def _download(option: str, name: str, *, trust_remote_code: bool) -> Path:
    patterns = [*_DOWNLOADED, "*.py"] if trust_remote_code else _DOWNLOADED
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise JobError(
            f"{option} {name}: there is no such directory, and no model of that name could be had from the Hub: "
            f"{_first_line(error)}"
        ) from error


def read_pair(rl: ModelPlace, base: ModelPlace) -> Reading:
    """The tokenizer that both models share and the limits of the smaller one, without reading any weights."""
    tokenizer, base_tokenizer = (_load_trusting(place, "the tokenizer", load_tokenizer) for place in (rl, base))
    try:
        # Which token ends a text or pads it does not enter the numbers, and often differs after training.
        check_same_tokenizer(tokenizer, base_tokenizer, ignore=("eos_token", "pad_token"))
    except ValueError as error:
        raise JobError(f"the tokenizers of {rl} and {base} disagree: {error}") from error
    limits = [_load_trusting(place, "the config", _limits) for place in (rl, base)]
    contexts = [context for _, context in limits if context is not None]
    return Reading(tokenizer, min(vocabulary for vocabulary, _ in limits), min(contexts, default=None))


def _limits(directory: Path, **options: Any) -> tuple[int, int | None]:
    """Vocabulary and context of a model."""
    model = load_without_weights(directory, **options)
    return vocabulary_of(model), context_length(model)


def _lm_head_names(directory: Path, **options: Any) -> tuple[str, ...]:
    return lm_head_names(load_without_weights(directory, **options))


def warn_of_rounding(rl: ModelPlace, base: ModelPlace, dtype: str) -> None:
    """UserWarning where weights that --dtype rounds lose some of what the two models differ by.

    The weights are read only where the files hold more digits than that dtype, and a block of rows at a time.
    """
    pair = [_load(place.whole, "the model", stored_tensors) for place in (rl, base)]
    kept = [_kept_dtype(dtype, tensors) for tensors in pair]
    if not any(is_rounded(stored, to) for tensors, to in zip(pair, kept, strict=True) for stored in tensors.values()):
        return
    last_layer = _load_trusting(rl, "the config", _lm_head_names)
    updates = update_and_rounding(pair[0], pair[1], (kept[0], kept[1]), last_layer)
    if all(update.rounding <= _TOLD_ROUNDING * update.norm for update in updates):
        return
    told = ", ".join(
        f"{update.rounding:.3g} beside {update.norm:.3g} in {what}"
        for what, update in zip(("all weights", "the last layer"), updates, strict=True)
    )
    remedy = "fp32" if dtype == "auto" else "auto"
    warnings.warn(
        f"--dtype {dtype} rounds away some of what {rl} and {base} differ by: ‖rounding‖ beside ‖W_RL − W_base‖ is "
        f"{told}. Δlog p is off in that measure; --dtype {remedy} rounds no weight",
        stacklevel=2,
    )


def warn_of_rounded_start(base: ModelPlace, dtype: str) -> None:
    """UserWarning where a training in --dtype begins with rounded weights."""
    tensors = _load(base.whole, "the model", stored_tensors)
    rounded = sum(is_rounded(stored, _kept_dtype(dtype, tensors)) for stored in tensors.values())
    if rounded:
        warnings.warn(
            f"--dtype {dtype} rounds {rounded} of the {len(tensors)} weights of {base} before the first step, and "
            "drops each update that is below half its step; --dtype fp32 does neither",
            stacklevel=2,
        )


def _kept_dtype(dtype: str, tensors: Mapping[str, Stored]) -> torch.dtype:
    chosen = DTYPES[dtype]
    # Quantised weights are nothing to round: float64 keeps all that there is.
    return (own_dtype(tensors) or torch.float64) if chosen == "auto" else chosen


def load_weights(place: ModelPlace, dtype: str, device: torch.device) -> Any:
    """The model in memory; JobError if its files can not be read or lack weights."""
    return _load_trusting(place, "the model", load_model, dtype=DTYPES[dtype], device=device)


def _load_trusting(place: ModelPlace, what: str, load: Callable[..., _Loaded], **options: Any) -> _Loaded:
    """With the code that comes with the model, where the user trusts it."""
    return _load(place, what, load, trust_remote_code=place.trust_remote_code, **options)


def _load(place: ModelPlace, what: str, load: Callable[..., _Loaded], **options: Any) -> _Loaded:
    try:
        return load(place.directory, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise JobError(f"{place}: {what} can not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
