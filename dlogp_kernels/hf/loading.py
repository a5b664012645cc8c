"""Loading models and tokenizers, and comparing the tokenizers of a pair."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
#: Splits differ between tokenizers of one vocabulary where their rules for digits, case, spaces and scripts differ.
_SAMPLE = (
    "Let x = 3.14159, y = -2; so f(x) = 1234567890 / y**2.\n\n\tThe café's  naïve WORDS don't split alike: it's "
    "2026-01-31, isn't it? 数学问题：求解。 π ≈ 22/7 🙂 <|endoftext|> \\boxed{42}\r\n    return x  # ok"
)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, from safetensors only (pickles are not opened).

    Args:
        name_or_path: a directory with config.json and *.safetensors, or the name of a model on the Hub; or of a PEFT
            adapter (adapter_config.json), which is put into the model that it names.
        dtype: of its weights in memory.
        device: where it is put.
        trust_remote_code: run code that comes with the model.

    Raises:
        FileNotFoundError: the directory is missing, or has no config.json or no *.safetensors.
        ValueError: a file is truncated; the files lack weights that the model needs, or hold them in other shapes.
    """
    _check_directory(name_or_path, ("config.json", "adapter_config.json"), "config.json and weights in *.safetensors")
    _check_directory(name_or_path, ("*.safetensors",), "weights in *.safetensors")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(
            f"{name_or_path}: a safetensors file is truncated or damaged ({error}), expected whole files: get it again"
        ) from error
    model, loading = loaded
    # Otherwise they would be random, with a warning.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            names = ", ".join(sorted(map(str, loading[problem]))[:3])
            raise ValueError(
                f"{name_or_path}: {len(loading[problem])} weights are {problem.removesuffix('_keys')} ({names}, …), "
                f"expected all that {type(model).__name__} of its config.json has"
            )
    return model.to(device).eval()


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or of a model on the Hub.

    A tokenizer.json in a directory is what the tokenizer is: where the class that `transformers` picks by the model's
    type would split otherwise, the file is taken as it is.

    Raises FileNotFoundError for a directory that is missing or has no tokenizer files.
    """
    _check_directory(name_or_path, ("*token*",), "a tokenizer (tokenizer.json or tokenizer_config.json)")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    file = Path(name_or_path) / "tokenizer.json"
    if file.is_file() and not _is_closed(tokenizer) and _split_of_file(file) != _split(tokenizer):
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


def _split(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]


def _split_of_file(file: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(_SAMPLE, add_special_tokens=False).ids


def _is_closed(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it takes only words of its vocabulary, which it can not split in two ways."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and type(backend.model).__name__ == "WordLevel" and tokenizer.unk_token is None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _named(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    return "none" if token_id is None else f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"
