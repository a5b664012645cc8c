"""Whether tokens come at their rates: chi-square against exact probabilities, and how often the tail comes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

#: Tensors of independent tokens (B,) from logits (B, V), a seed and a step.
Draw = Callable[[Tensor, int, int], Iterable[Tensor]]

_LOGIT_STD = 2.0
#: Draws that a cell of the chi-square expects, at least, and rows of a batch.
_LEAST_EXPECTED = 20
_ROWS = 20_000


class Tail(NamedTuple):
    """Tokens of the tail that were drawn, and how many should have been."""

    tokens: Tensor
    expected: float


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """Probability of a chi-square at least this large, of cells that all expect 10 or more."""
    assert expected.min() >= 10 and observed.sum() == expected.sum().round()
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor((expected.numel() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def cells_of(probability: Tensor, draws: int) -> Tensor:
    """A cell for each token: likely tokens alone, the others in runs of `_LEAST_EXPECTED` draws or more."""
    order = probability.argsort(descending=True)
    alone = int((probability * draws >= _LEAST_EXPECTED).sum())
    rest = (probability[order[alone:]].cumsum(0) * draws / _LEAST_EXPECTED).floor().long()
    cells = torch.cat([torch.arange(alone), alone + rest])
    last = int(cells[-1])
    # The last one may have been left with too little.
    cells = torch.where(cells == last, max(last - 1, 0), cells)
    _, cells = cells.unique(return_inverse=True)
    return torch.empty_like(cells).scatter_(0, order, cells)


def p_value(draw: Draw, vocabulary: int, draws: int, seed: int, device: torch.device) -> float:
    """Of `draws` tokens of a row of random logits, beside its probabilities in float64; `seed` is also the noise's."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * _LOGIT_STD
    probability = logits.double().softmax(-1)
    cells = cells_of(probability, draws)
    observed = torch.zeros(int(cells.max()) + 1, dtype=torch.float64)
    expected = torch.zeros_like(observed).index_add_(0, cells, probability * draws)
    row, drawn = logits.to(device), 0
    for step in range(draws):
        for tokens in draw(row.expand(min(_ROWS, draws // 2), -1), seed, step):
            tokens = tokens.cpu()[: draws - drawn]
            observed += cells[tokens].bincount(minlength=observed.numel())
            drawn += len(tokens)
        if drawn == draws:
            break
    return chi_square_p(observed, expected)


def tail(draw: Draw, rare: float, count: int, rows: int, batches: int, seed: int, device: torch.device) -> Tail:
    """`count` tokens of probability `rare` each, behind one that has the rest (vLLM #43150)."""
    logits = torch.zeros(1 + count, dtype=torch.float64)
    logits[1:] = torch.tensor(rare / (1 - rare * count), dtype=torch.float64).log()
    batch = logits.float().to(device).expand(rows, -1)
    hits, drawn = [], 0
    for step in range(batches):
        for tokens in draw(batch, seed, step):
            hits.append(tokens[tokens > 0].cpu())
            drawn += len(tokens)
    return Tail(torch.cat(hits), drawn * rare * count)
