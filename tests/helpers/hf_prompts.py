"""Prompts for the tests of generation."""

import hf_models
import torch
from torch import Tensor


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random tokens of the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, hf_models.VOCABULARY - 2, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Tokens and attention mask (B, T)."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64).unbind()
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place] = tokens
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
