"""The text of single tokens."""

import functools
from typing import Any

import numpy as np

_SENTENCEPIECE_SPACE = "▁"
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """Looks up what a token id stands for, each id once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text = functools.cache(self._look_up)

    def __call__(self, token_ids: np.ndarray) -> list[str]:
        """The text of each id."""
        return list(map(self._text, token_ids.tolist()))

    def joined(self, token_ids: np.ndarray) -> str:
        """The text of ids that follow each other, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _look_up(self, token_id: int) -> str:
        """As it reads inside a text; the vocabulary's own spelling for a piece of a character; "" for padding rows."""
        spelling = self._tokenizer.convert_ids_to_tokens(token_id)
        if not spelling:
            return ""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _REPLACEMENT in text:
            return spelling
        # SentencePiece drops the space at the beginning of a text.
        return f" {text}" if spelling.startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" ") else text
