"""Small Qwen3 models and word-level tokenizers, for the demo pair and for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

# The types of a model and a tokenizer are for callers too, which must not import `transformers` themselves.
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .loading import load_model, load_tokenizer

#: Of `Qwen3Config`, unless others are given.
_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def tiny_qwen3(
    vocab_size: int, *, num_layers: int = 3, num_heads: int = 4, seed: int = 0, **options: Any
) -> Qwen3ForCausalLM:
    """A Qwen3 of the given sizes with random float32 weights; the global random state is left as it was.

    `options` are of `Qwen3Config`, by default 0.3 million parameters beside the embeddings; TypeError for one that it
    does not have, which it would keep and ignore.
    """
    unknown = [name for name in options if not hasattr(Qwen3Config(), name)]
    if unknown:
        raise TypeError(f"tiny_qwen3 is given {', '.join(unknown)}, expected options of Qwen3Config")
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": num_layers, "num_attention_heads": num_heads}
    config = Qwen3Config(**{**_SIZES, **sizes, **options}, dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def word_tokenizer(
    words: Sequence[str],
    *,
    pad_token: str = "<pad>",
    bos_token: str = "<bos>",
    eos_token: str = "<eos>",
    sep_token: str = "<sep>",
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the four special words (ids 0 to 3), then `words` in their order.

    Text splits at white space and around special words; nothing is added to it. Decoding joins words with
    single spaces, so encoding a decoded sequence gives its ids back. A word that is not in the vocabulary
    raises: there is no unknown token. Padding goes to the left.
    """
    vocabulary = [pad_token, bos_token, eos_token, sep_token, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("words: expected each word once, and none of the special words")
    split = [word for word in vocabulary if word.split() != [word]]
    if split:
        raise ValueError(f"words: expected non-empty words without white space, got {split}")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad_token,
        bos_token=bos_token,
        eos_token=eos_token,
        sep_token=sep_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_local(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write a model (safetensors, config) and its tokenizer into one directory."""
    # Trainers switch the key-value cache off and leave it so.
    model.config.use_cache = True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_local(directory: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model (in evaluation mode) and the tokenizer of a local directory, without any network access."""
    return load_model(Path(directory)), cast(PreTrainedTokenizerFast, load_tokenizer(Path(directory)))
