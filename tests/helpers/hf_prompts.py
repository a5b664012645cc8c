"""Tokens and prompts of the tiny models' vocabulary."""

import hf_models
import torch
from torch import Tensor


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ones (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, hf_models.VOCABULARY - 2, (rows, length), generator=generator)


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random ones of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, hf_models.VOCABULARY - 2, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Tokens and attention mask (B, T)."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64).unbind()
    for row, prompt in enumerate(rows):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place] = prompt
        mask[row, place] = 1
    return ids, mask


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1
