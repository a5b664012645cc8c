"""Text and conversations as token ids that hold what was given, once and in its place, and nothing that nobody wrote.

A response is what a model wrote after it had read the prompt: its tokens continue those of the prompt, and end with the
token that ends a turn. What a chat template or a tokenizer adds around it is no part of it; what they leave out of it
can not be measured, and the line is refused.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .values import BrokenLine

#: The end of a prompt that is decoded to see what a response after it reads like.
_TOKENS_OF_CONTEXT = 8
#: How byte-level and SentencePiece vocabularies spell the space at the beginning of a word.
_SPACES = ("▁", "Ġ")
GIVE_IDS = "give prompt_ids and response_ids instead"

_Encode = Callable[[str], list[int]]


class Encoded(NamedTuple):
    """A prompt and a response to it as token ids, and a remark on how they came about, if there is one to make."""

    prompt_ids: list[int]
    response_ids: list[int]
    remark: str | None = None


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids after the special tokens of a beginning, which the text may spell out itself, and none of an end."""
    plain, wrapped = plain_ids(tokenizer, text), _ids(lambda: tokenizer.encode(text, add_special_tokens=True))
    opening = _opening(tokenizer, plain, wrapped)
    spelt_out = next(n for n in range(len(opening), -1, -1) if plain[:n] == opening[len(opening) - n :])
    return opening + plain[spelt_out:]


def _opening(tokenizer: Any, plain: list[int], wrapped: list[int]) -> list[int]:
    """What stands before `plain` in `wrapped`."""
    if not plain:
        end = tokenizer.eos_token_id
        return wrapped[: wrapped.index(end)] if end in wrapped and end != tokenizer.bos_token_id else wrapped
    for begin in range(len(wrapped) - len(plain) + 1):
        if wrapped[begin : begin + len(plain)] == plain:
            return wrapped[:begin]
    raise BrokenLine(f"the tokenizer splits the prompt otherwise beside special tokens: {GIVE_IDS}")


def encode_after(tokenizer: Any, prompt: str, response: str, encode: _Encode) -> Encoded:
    """The prompt as it is when it stands alone, as generation reads it, and the response as it continues it."""
    prompt_ids = encode(prompt)
    response_ids, remark = _continue(tokenizer, prompt, prompt_ids, response, encode) if response else ([], None)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in response_ids and tokenizer.unk_token not in response:
        raise BrokenLine(
            f"the tokenizer has no token for some of the response ({tokenizer.unk_token} stands for it), so no model "
            f"with it wrote this: {GIVE_IDS}"
        )
    return Encoded(prompt_ids, response_ids, remark)


def _continue(
    tokenizer: Any, prompt: str, prompt_ids: list[int], response: str, encode: _Encode
) -> tuple[list[int], str | None]:
    """Tokens of the response in its context; by itself where its first token would reach into the prompt."""
    alone = plain_ids(tokenizer, response)
    spaces = len(response) - len(response.lstrip(" "))
    # As the tokenizer spells it; whether it shows a space at the beginning depends on its kind.
    spelt = " " * spaces + _text(tokenizer, alone).lstrip(" ")

    def rest(before: Sequence[int], both: Sequence[int]) -> list[int] | None:
        """What follows `before` in `both`, if that is the response: a special token may swallow spaces behind it."""
        ids, end = list(both[len(before) :]), list(before[-_TOKENS_OF_CONTEXT:])
        same = both[: len(before)] == before and _text(tokenizer, end + ids) == _text(tokenizer, end) + spelt
        return ids if same and (tokenizer.unk_token_id in alone or tokenizer.unk_token_id not in ids) else None

    with contextlib.suppress(BrokenLine):  # the two may meet in a word that has no tokens
        in_context = rest(prompt_ids, encode(prompt + response))
        if in_context is not None:
            return in_context, None
    if not _spelling(tokenizer, alone).startswith(_SPACES):
        return alone, None
    # The tokenizer may begin every text with a space. Behind another text there is none.
    for before in ("\n", "a"):
        with contextlib.suppress(BrokenLine):
            without_space = rest(plain_ids(tokenizer, before), plain_ids(tokenizer, before + response))
            if without_space is not None:
                return without_space, None
    if response.startswith((" ", *_SPACES)):
        return alone, None
    return alone, "the tokenizer puts a space before the response that stands nowhere in the text"


def _spelling(tokenizer: Any, ids: Sequence[int]) -> str:
    return (tokenizer.convert_ids_to_tokens(ids[0]) or "") if ids else ""


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return _ids(lambda: tokenizer.encode(text, add_special_tokens=False))


def _ids(encode: Callable[[], Any]) -> list[int]:
    try:
        return list(encode())
    except Exception as error:
        # The tokenizers library raises the bare class for a word that is not in a vocabulary without an unknown token.
        if type(error) is not Exception and not isinstance(error, ValueError | TypeError | KeyError):
            raise
        raise BrokenLine(f"the tokenizer refuses it: {error}") from error
