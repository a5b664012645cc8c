"""The text of single tokens."""

from typing import Any

import numpy as np

_SENTENCEPIECE_SPACE = "▁"
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """Looks up what a token id stands for, each id once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_ids: np.ndarray) -> list[str]:
        """The text of each id."""
        ids = token_ids.tolist()
        for token_id in set(ids) - self._known.keys():
            self._known[token_id] = self._look_up(token_id)
        return [self._known[token_id] for token_id in ids]

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
