"""Loading models and tokenizers, and comparing the tokenizers of a pair."""

import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import find_adapter_config_file

from .checkpoint import Stored, own_dtype, stored_tensors

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
#: What old versions of `transformers` kept beside the weights: they follow from the config.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(attn|attention)\.masked_bias$")
#: Splits differ between tokenizers of one vocabulary where their rules for digits, case, spaces and scripts differ.
_SAMPLE = (
    "Let x = 3.14159, y = -2; so f(x) = 1234567890 / y**2.\n\n\tThe café's  naïve WORDS don't split alike: it's "
    "2026-01-31, isn't it? 数学问题：求解。 π ≈ 22/7 🙂 <|endoftext|> \\boxed{42}\r\n    return x  # ok"
)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, from safetensors only (pickles are not opened).

    Args:
        name_or_path: a directory with config.json and *.safetensors, or the name of a model on the Hub; or of a PEFT
            adapter (adapter_config.json), which is put into the model that it names.
        dtype: of its weights in memory. "auto": that of most weights in its files, whatever config.json says, so that
            none is rounded; float16 on a CPU is computed in float32, with a UserWarning.
        device: where it is put.
        trust_remote_code: run code that comes with the model.

    Raises:
        FileNotFoundError: the directory is missing, or has no config.json or no *.safetensors.
        ValueError: a file is damaged; the files lack weights that the model needs, hold them in other shapes, or hold
            weights that the model does not take (unless its class in `transformers` declares that it may be without).
    """
    _check_directory(name_or_path, ("config.json", "adapter_config.json"), "config.json and weights in *.safetensors")
    _check_directory(name_or_path, ("*.safetensors",), "weights in *.safetensors")
    base = adapter_base(name_or_path)
    if base is not None:
        model: Any = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
        found = model.load_adapter(str(name_or_path))
        if found is not None:
            _check_complete(name_or_path, model, found.to_dict())
        return model.to(device).eval()
    tensors = stored_tensors(name_or_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name_or_path,
        dtype=_dtype_in_memory(name_or_path, tensors, device) if dtype == "auto" else dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        # They are told below, by name.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, loading = loaded
    _check_complete(name_or_path, model, loading)
    if getattr(model.config, "quantization_config", None) is None:
        _check_floating(name_or_path, model, tensors)
    return model.to(device).eval()


def load_without_weights(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model on the meta device, from its config alone: what it takes is known before it is loaded.

    An adapter's is that of the model which it was trained on. Raises OSError where there is no config, ValueError where
    it is not that of a causal language model.
    """
    config = AutoConfig.from_pretrained(adapter_base(name_or_path) or name_or_path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def adapter_base(name_or_path: str | Path) -> str | None:
    """The directory or name of the model that a PEFT adapter was trained on; None for a model that is none.

    Raises ValueError for an adapter that does not say.
    """
    config_file = find_adapter_config_file(str(name_or_path))
    if config_file is None:
        return None
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str):
        raise ValueError(f"{config_file}: has no base_model_name_or_path, expected the model that it was trained on")
    return base


def _dtype_in_memory(
    name_or_path: str | Path, tensors: Mapping[str, Stored], device: str | torch.device
) -> torch.dtype | Literal["auto"]:
    own = own_dtype(tensors)
    if own == torch.float16 and torch.device(device).type == "cpu":
        warnings.warn(
            f"{name_or_path}: its weights are float16, which a CPU is slow at: they are computed in float32, which "
            "rounds none of them and takes twice the memory",
            stacklevel=3,
        )
        return torch.float32
    # Quantised weights have their own way to a dtype.
    return own or "auto"


def _check_complete(name_or_path: str | Path, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """ValueError unless the files have all weights of the model, in its shapes, and no others."""
    # Otherwise they would be random, with a warning.
    _refuse(name_or_path, model, loading["missing_keys"], "are missing", "all that {} of its config.json has")
    shapes = (f"{name}: {tuple(there)} for {tuple(here)}" for name, there, here in loading["mismatched_keys"])
    _refuse(name_or_path, model, shapes, "have other shapes (mismatched)", "those of {} with its config.json")
    # Otherwise they would be left out, and with them a bias, a scale of quantised weights, whole layers.
    unexpected = [name for name in loading["unexpected_keys"] if not _BUFFERS.search(name)]
    _refuse(name_or_path, model, unexpected, "of the files have no place", "only those that {} of its config.json has")


def _refuse(name_or_path: str | Path, model: PreTrainedModel, names: Iterable[str], what: str, expected: str) -> None:
    found = sorted(map(str, names))
    if found:
        shown = ", ".join(found[:3]) + ", …" * (len(found) > 3)
        raise ValueError(
            f"{name_or_path}: {len(found)} weights {what} ({shown}), expected {expected.format(type(model).__name__)}"
        )


def _check_floating(name_or_path: str | Path, model: PreTrainedModel, tensors: Mapping[str, Stored]) -> None:
    """ValueError for floating weights that the files hold as integers, which mean nothing without their scales."""
    integers = [
        f"{name}: {tensors[name].dtype}"
        for name, parameter in model.named_parameters()
        if name in tensors and parameter.is_floating_point() and tensors[name].dtype.startswith(("I", "U", "BOOL"))
    ]
    _refuse(name_or_path, model, integers, "are integers without a quantization_config", "floating weights of {}")


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or of a model on the Hub.

    A tokenizer.json in a directory is what the tokenizer is: where the class that `transformers` picks by the model's
    type would split otherwise, the file is taken as it is.

    Raises FileNotFoundError for a directory that is missing or has no tokenizer files.
    """
    _check_directory(name_or_path, ("*token*",), "a tokenizer (tokenizer.json or tokenizer_config.json)")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    file = Path(name_or_path) / "tokenizer.json"
    if file.is_file() and not _is_closed(tokenizer) and not _splits_as_file(tokenizer, file):
        return PreTrainedTokenizerFast.from_pretrained(name_or_path)
    return tokenizer


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase, *, ignore: Collection[str] = ()
) -> None:
    """ValueError, with what differs, unless both give every text the same ids.

    Compared are the vocabularies token by token, the ids that serve as `bos_token`, `eos_token`, `pad_token` and
    `unk_token`, and the split of a sample text. `ignore` names those of the four that may differ: a chat model often
    ends with another token than its base.
    """
    unknown = set(ignore) - set(_SPECIAL_TOKENS)
    if unknown:
        raise ValueError(f"ignore has {sorted(unknown)}, expected some of {_SPECIAL_TOKENS}")
    _check_same_vocabulary(tokenizer, base_tokenizer)
    for name in _SPECIAL_TOKENS:
        token_id, base_token_id = getattr(tokenizer, f"{name}_id"), getattr(base_tokenizer, f"{name}_id")
        if token_id != base_token_id and name not in ignore:
            raise ValueError(
                f"tokenizer has {_named(tokenizer, token_id)} as {name} and base_tokenizer "
                f"{_named(base_tokenizer, base_token_id)}: expected the same, or ignore=({name!r},)"
            )
    _check_same_split(tokenizer, base_tokenizer)


def context_length(model: PreTrainedModel) -> int | None:
    """The number of tokens that the model was made for, of its config; None where that sets no bound."""
    config = model.config.get_text_config(decoder=True)
    for name in _LENGTH_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _check_directory(name_or_path: str | Path, patterns: tuple[str, ...], expected: str) -> None:
    """FileNotFoundError for a local path without a file of any of `patterns`; names of the Hub pass."""
    path = Path(name_or_path)
    if not path.exists():
        text = str(name_or_path)
        if isinstance(name_or_path, Path) or path.is_absolute() or text.startswith(".") or text.count("/") > 1:
            raise FileNotFoundError(f"{path}: no such directory, expected one with {expected}")
        return
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: is a file, expected a directory with {expected}")
    if any(file for pattern in patterns for file in path.glob(pattern)):
        return
    pickles = sorted(file.name for pickle in _PICKLES for file in path.glob(pickle))
    found = f"it has {pickles[0]}, a pickle, which is not opened: convert it" if pickles else "it has none"
    raise FileNotFoundError(f"{path}: expected a directory with {expected}; {found}")


def _check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary, base_vocabulary = _by_id(tokenizer), _by_id(base_tokenizer)
    ids = sorted(vocabulary.keys() | base_vocabulary.keys())
    differing = [index for index in ids if vocabulary.get(index) != base_vocabulary.get(index)]
    if differing:
        first = differing[0]
        raise ValueError(
            f"tokenizer has {len(vocabulary)} tokens and base_tokenizer {len(base_vocabulary)}; {len(differing)} ids "
            f"differ, the first is {first}: {vocabulary.get(first)!r} against {base_vocabulary.get(first)!r}. Expected "
            "one vocabulary"
        )


def _check_same_split(tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase) -> None:
    if _is_closed(tokenizer):
        return
    ids, base_ids = tokenizer(_SAMPLE)["input_ids"], base_tokenizer(_SAMPLE)["input_ids"]
    if ids == base_ids:
        return
    pairs = enumerate(zip(ids, base_ids, strict=False))
    first = next((i for i, (one, other) in pairs if one != other), min(len(ids), len(base_ids)))
    raise ValueError(
        f"tokenizer splits a sample text into {len(ids)} tokens and base_tokenizer into {len(base_ids)}; from token "
        f"{first} on {tokenizer.convert_ids_to_tokens(ids[first : first + 4])} against "
        f"{base_tokenizer.convert_ids_to_tokens(base_ids[first : first + 4])}. Expected the same splits"
    )


def _splits_as_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    return own.encode(_SAMPLE, add_special_tokens=False).ids == ids


def _is_closed(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it takes only words of its vocabulary, which it can not split in two ways."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and type(backend.model).__name__ == "WordLevel" and tokenizer.unk_token is None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _named(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    return "none" if token_id is None else f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"
