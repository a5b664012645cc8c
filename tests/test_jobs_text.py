"""Text to token ids and back, for tokenizers of the kinds that are in use."""

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dlogp_kernels.jobs.data import Encoder, Record
from dlogp_kernels.jobs.token_text import TokenTexts


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, as GPT-2 spells them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words that carry the space before them, and a <s> at the beginning of a text, as Llama 2 has them."""
    vocabulary = {"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_pieces_of_characters_keep_the_spelling_of_the_vocabulary():
    tokenizer = byte_level()
    ids = np.array(tokenizer.encode(" a数"))
    spelt = tokenizer.convert_ids_to_tokens(ids[2:].tolist())
    assert TokenTexts(tokenizer)(ids) == [" ", "a", *spelt]
    assert len(spelt) == 3 and "\ufffd" not in "".join(spelt)


def test_a_space_that_belongs_to_a_token_is_kept_and_padding_rows_are_empty():
    assert TokenTexts(sentencepiece_like())(np.array([1, 2, 3, 0, 1, 99])) == [" the", " cat", "s", "<s>", " the", ""]


@pytest.mark.parametrize("prompt", ["the cat", "<s>the cat"])
def test_a_text_begins_once_and_a_response_does_not_begin(prompt):
    encode = Encoder(sentencepiece_like(), vocabulary=5, context=None)
    sample = encode(Record(7, {"prompt": prompt, "response": "cat the", "id": 12, "source": "rl", "other": None}))
    assert sample.prompt_ids.tolist() == [0, 1, 2]
    assert sample.response_ids.tolist() == [2, 1]
    assert (sample.line, sample.sample_id, sample.source) == (7, "12", "rl")
