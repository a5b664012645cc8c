"""Text to token ids and back, for tokenizers of the kinds that are in use."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dlogp_kernels.jobs.inputs import messages
from dlogp_kernels.jobs.inputs.models import Reading
from dlogp_kernels.jobs.inputs.problems import read_problems
from dlogp_kernels.jobs.inputs.records import BrokenLine, Encoder, Record
from dlogp_kernels.jobs.token_text import TokenTexts


def byte_level(special="", *, post=None, template=None, swallowing=(), prefix_space=False, **names):
    """One token a byte, as GPT-2 spells them, and special tokens, some of which swallow the spaces after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    words = special.split()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False, rstrip=w in swallowing) for w in words])
    if post:
        tokens = [(word, tokenizer.token_to_id(word)) for word in words]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=tokens)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def encode(tokenizer, columns):
    """The sample of a line."""
    return Encoder(tokenizer, vocabulary=10**6, context=None)(Record(1, columns))


def texts(tokenizer, columns):
    """Prompt and response as the models are fed them; or why the line is refused."""
    try:
        sample = encode(tokenizer, columns)
    except BrokenLine as error:
        return str(error)
    return tuple(tokenizer.decode(ids.tolist()) for ids in (sample.prompt_ids, sample.response_ids))


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


# A post-processor, special tokens, a prompt, and how the models read it.
OPENINGS = {
    "none": (None, "<s>", "2+2=", "2+2="),
    "opening": ("<s> $A", "<s>", "2+2=", "<s>2+2="),
    "opening spelt out": ("<s> $A", "<s>", "<s>2+2=", "<s>2+2="),
    "ending": ("$A </s>", "</s>", "2+2=", "2+2="),
    "both": ("<s> $A </s>", "<s> </s>", "2+2=", "<s>2+2="),
    "both, of nothing": ("<s> $A </s>", "<s> </s>", "", "<s>"),
    "both, of an ending": ("<s> $A </s>", "<s> </s>", "</s>", "<s></s>"),
    "two": ("[gMASK] <sop> $A", "[gMASK] <sop>", "2+2=", "[gMASK]<sop>2+2="),
    "two spelt out": ("[gMASK] <sop> $A", "[gMASK] <sop>", "[gMASK]<sop>2+2=", "[gMASK]<sop>2+2="),
    "one of two spelt out": ("[gMASK] <sop> $A", "[gMASK] <sop>", "<sop>2+2=", "[gMASK]<sop>2+2="),
}


@pytest.mark.parametrize("kind", OPENINGS)
def test_special_tokens_open_a_prompt_once_and_none_ends_it(kind, tmp_path):
    post, special, prompt, expected = OPENINGS[kind]
    names = {name: token for name, token in (("bos_token", "<s>"), ("eos_token", "</s>")) if token in special}
    tokenizer = byte_level(special, post=post, **names)
    assert texts(tokenizer, {"prompt": prompt, "response": "\n4"}) == (expected, "\n4")
    (tmp_path / "problem.jsonl").write_text(json.dumps({"prompt": prompt}))
    reading = Reading(tokenizer, 10**6, None)
    [problem] = read_problems(tmp_path / "problem.jsonl", reading, max_new_tokens=1, needs_answer=False)
    assert tokenizer.decode(problem.prompt_ids) == expected


def metaspace(scheme):
    """Characters after spaces that are spelt ▁, one of which begins a text, as SentencePiece does it."""
    words = ["<unk>", "<s>", "▁", *"abcdefghijklmnopqrstuvwxyzTH.:=\n0123456789+"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in ("<s>", "<|assistant|>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


PAIRS = [("<|assistant|>\n", "The end"), ("2+2=", "4"), ("2+2 =", " 4"), ("a ", "b")]


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer", "bytes"])
@pytest.mark.parametrize(
    ("prompt", "response"), [("<|assistant|>\n", "The end"), ("2+2=", "4"), ("2+2 =", " 4"), ("a ", "b")]
)
def test_a_response_has_no_space_that_stands_nowhere_in_the_text(scheme, prompt, response):
    tokenizer = byte_level("<|assistant|>", prefix_space=True) if scheme == "bytes" else metaspace(scheme)
    sample = encode(tokenizer, {"prompt": prompt, "response": response})
    both = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
    assert both == tokenizer.encode(prompt + response) and sample.remark is None


def test_nor_where_a_special_token_stands_before_it():
    tokenizer = metaspace("normalizer")
    sample = encode(tokenizer, {"prompt": "<|assistant|>", "response": " b"})
    assert tokenizer.convert_ids_to_tokens(sample.response_ids.tolist()) == ["▁", "b"]


def test_a_space_that_can_not_be_left_out_is_remarked_upon():
    sample = encode(sentencepiece_like(), {"prompt": "the cat", "response": "cat the"})
    assert "a space before the response that stands nowhere" in sample.remark


def test_a_response_that_the_tokenizer_has_no_tokens_for_is_refused():
    assert "no token for some of the response (<unk> stands for it)" in texts(
        metaspace("first"), {"prompt": "a", "response": "π"}
    )
    assert texts(metaspace("first"), {"prompt": "π", "response": "a"}) == ("<s> <unk>", "a")


# Chat templates of the shapes that are in use, with their special tokens (the first one ends a text).
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {
    "ChatML": ("<|im_end|> <|im_start|>", CHATML),
    "ChatML of a base model": ("<|endoftext|> <|im_start|> <|im_end|>", CHATML),
    "ChatML, generation marked": (
        "<|endoftext|> <|im_start|> <|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "ChatML, empty reasoning": (
        "<|im_end|> <|im_start|> <think> </think>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set r = m.reasoning_content or '' %}{% set c = m.content %}{% if '</think>' in c %}"
        "{% set r = c.split('</think>')[0].split('<think>')[-1] %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c }}"
        "{% for t in m.tool_calls or [] %}{{ '\\n' }}<tool_call>{{ t.function | tojson }}</tool_call>{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ),
    "Gemma": (
        "<eos> <bos> <start_of_turn> <end_of_turn>",
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "Llama 2": (
        "</s> <s>",
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content.strip() }} </s>{% else %}"
        "<s>[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}",
    ),
    "Llama 3": (
        "<|end_of_text|> <|eot_id|> <|header|>",
        "{% for m in messages %}<|header|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant\n\n{% endif %}",
    ),
    "Mistral": (
        "</s> <s>",
        "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    ),
    "Phi": (
        "<|endoftext|> <|user|> <|assistant|> <|end|> <|system|>",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    ),
    "GLM": (
        "<|endoftext|> [gMASK] <sop> <|user|> <|assistant|>",
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ),
    "DeepSeek": (
        "<eos> <bos> <User> <Assistant>",
        "<bos>{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>"
        "{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<Assistant>{% endif %}",
    ),
    "text alone": (
        "</s>",
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    ),
    "channels": (
        "<|return|> <|start|> <|channel|> <|message|> <|end|>",
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if m.thinking %}"
        "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
        "<|channel|>final{% endif %}<|message|>"
        "{{ m.content }}{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ),
}
USER = {"role": "user", "content": "2+2?"}
REASONED = "<think>\ntwo and two\n</think>\n\n4"
CHANGED = "does not render the response as it was given"
CHATML_PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
NOT_THINKING = f"{CHATML_PROMPT}<think>\n\n</think>\n\n"
# Shape, the response (a text, or keys of its message), and what the models are fed: prompt and response, or a refusal.
TURNS = [
    ("ChatML", "4", (CHATML_PROMPT, "4<|im_end|>")),
    ("ChatML", "4<|im_end|>", (CHATML_PROMPT, "4<|im_end|>")),
    ("ChatML", " 4\n", (CHATML_PROMPT, " 4\n<|im_end|>")),
    ("ChatML", "user", (CHATML_PROMPT, "user<|im_end|>")),
    ("ChatML", [{"type": "text", "text": "4"}], (CHATML_PROMPT, "4<|im_end|>")),
    ("ChatML", [{"type": "image", "url": "x"}], "messages content has the part"),
    ("ChatML", {"content": "4", "reasoning_content": "two"}, "leaves the reasoning 'two' out"),
    ("ChatML of a base model", "4", (CHATML_PROMPT, "4<|im_end|>")),
    ("ChatML, generation marked", "4", (CHATML_PROMPT, "4<|im_end|>")),
    ("ChatML, empty reasoning", "4", (NOT_THINKING, "4<|im_end|>")),
    ("ChatML, empty reasoning", "\n4", (NOT_THINKING, "\n4<|im_end|>")),
    ("ChatML, empty reasoning", REASONED, (CHATML_PROMPT, f"{REASONED}<|im_end|>")),
    ("ChatML, empty reasoning", "<think>two</think>4", CHANGED),
    (
        "ChatML, empty reasoning",
        {"content": "4", "reasoning_content": "two and two"},
        (CHATML_PROMPT, f"{REASONED}<|im_end|>"),
    ),
    ("Gemma", "4", ("<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n", "4<end_of_turn>")),
    ("Gemma", "4\n", CHANGED),
    ("Llama 2", "4", ("<s>[INST] 2+2? [/INST]", " 4 </s>")),
    ("Llama 2", "4 ", CHANGED),
    ("Llama 3", "4", ("<|header|>user\n\n2+2?<|eot_id|><|header|>assistant\n\n", "4<|eot_id|>")),
    ("Llama 3", "\n4", CHANGED),
    ("Mistral", "4", ("<s>[INST] 2+2? [/INST]", "4</s>")),
    ("Phi", "4", ("<|user|>2+2?<|end|><|assistant|>", "4<|end|>")),
    ("Phi", " \n4", ("<|user|>2+2?<|end|><|assistant|>", " \n4<|end|>")),
    ("GLM", "\n4", ("[gMASK]<sop><|user|>\n2+2?<|assistant|>\n", "\n4")),
    ("DeepSeek", "4", ("<bos><User>2+2?<Assistant>", "4<eos>")),
    ("DeepSeek", REASONED, CHANGED),
    ("text alone", "4", ("### user:\n2+2?\n\n### assistant:\n", "4")),
    (
        "channels",
        "4",
        ("<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>", "4<|return|>"),
    ),
    (
        "channels",
        {"content": "4", "thinking": "two"},
        (
            "<|start|>user<|message|>2+2?<|end|><|start|>assistant",
            "<|channel|>analysis<|message|>two<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        ),
    ),
]


def chat_tokenizer(shape):
    special, template = SHAPES[shape]
    swallowing = special.split()[1:] if shape == "Phi" else ()
    return byte_level(special, template=template, swallowing=swallowing, eos_token=special.split()[0])


@pytest.mark.parametrize(("shape", "turn", "expected"), TURNS)
def test_a_response_is_what_was_given_to_the_end_of_its_turn(shape, turn, expected):
    message = {"role": "assistant"} | (turn if isinstance(turn, dict) else {"content": turn})
    found = texts(chat_tokenizer(shape), {"messages": [USER, message]})
    assert found == expected if isinstance(expected, tuple) else expected in found


def test_what_a_template_writes_before_a_response_is_remarked_upon():
    tokenizer = chat_tokenizer("ChatML, empty reasoning")
    columns = {"messages": [USER, {"role": "assistant", "content": "4"}]}
    assert "writes '<think>\\n\\n</think>\\n\\n' before the response" in encode(tokenizer, columns).remark
    sample = encode(tokenizer, columns | {"chat_template_kwargs": {"enable_thinking": False}})
    assert sample.remark is None and tokenizer.decode(sample.prompt_ids.tolist()) == NOT_THINKING
    assert "expected variables of the template" in texts(tokenizer, columns | {"chat_template_kwargs": {"tokenize": 1}})


# What goes wrong in a template, with a user's text before the response.
BAD_TEMPLATES = {
    "endless": (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "takes more than 0.1 s",
    ),
    "growing": (
        "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
        "takes more than 0.1 s",
    ),
    "raising": ("{{ raise_exception('no') }}", "the chat template refuses it: no"),
    "failing": ("{{ 1 / 0 }}", "the chat template refuses it: division by zero"),
    "recursive": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "not a template": ("{% if %}", "the chat template refuses it"),
    "twice": ("{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}", "more than once"),
    "upper case": ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "leaves out or changes 'say it'"),
    "writes into it": ("{% for m in messages %}{{ m.content | replace('o', 'o!') }}</s>{% endfor %}", CHANGED),
    "without the user": ("{{ messages[1].content }}</s>", "the chat template refuses it"),
    "without the response": ("{{ messages[0].content }}", CHANGED),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_templates_that_can_not_be_right_are_named(kind, monkeypatch):
    template, reason = BAD_TEMPLATES[kind]
    monkeypatch.setattr(messages, "TEMPLATE_SECONDS", 0.1)
    tokenizer = byte_level("</s>", template=template, eos_token="</s>")
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "four"}]
    assert reason in texts(tokenizer, {"messages": turns})
    if kind != "without the response":
        return
    assert texts(tokenizer, {"messages": [*turns[:1], {"role": "system", "content": "be kind"}, turns[1]]}) == (
        "the chat template leaves out or changes 'be kind' of the role system"
    )


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "note": 'a "π"'}}}]
CALLED = '{"name": "add", "arguments": {"a": 2, "note": "a \\"π\\""}}'


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}, {"content": "I add"}])
def test_calls_of_tools_are_a_response(content):
    tokenizer = chat_tokenizer("ChatML, empty reasoning")
    message = {"role": "assistant", "tool_calls": CALLS, **content}
    said = content.get("content") or ""
    response = f"{said}\n<tool_call>{CALLED}</tool_call><|im_end|>"
    assert texts(tokenizer, {"messages": [USER, message]}) == (NOT_THINKING, response)
    assert "of the tool calls out" in texts(chat_tokenizer("ChatML"), {"messages": [USER, message]})


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]', [{"function": {"name": "add"}}]])
def test_tools_are_in_the_prompt_or_the_line_is_refused(tools):
    template = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
    tokenizer = byte_level("<|im_end|> <|im_start|>", template=template, eos_token="<|im_end|>")
    columns = {"messages": [USER, {"role": "assistant", "content": "4"}], "tools": tools}
    prompt, response = texts(tokenizer, columns)
    assert '"add"' in prompt and response == "4<|im_end|>"
    assert texts(chat_tokenizer("ChatML"), columns) == "the chat template does not show the tool 'add'"
    assert texts(tokenizer, columns | {"tools": []}) == (CHATML_PROMPT, response)
    assert "expected a list of objects" in texts(tokenizer, columns | {"tools": "add"})


CHAT = [USER, {"role": "assistant", "content": "from messages"}]
IDS, TEXT = {"prompt_ids": [1], "response_ids": [2]}, {"prompt": "2+2=", "response": "from text"}
NOTHING = (
    "prompt_ids", "response_ids", "messages", "prompt", "response", "completion", "input", "output",
)  # fmt: skip


@pytest.mark.parametrize("nothing", [None, float("nan"), []])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (TEXT, "from text"),
        ({"messages": CHAT}, "from messages<|im_end|>"),
        (IDS, "#"),
        (TEXT | {"messages": CHAT}, "from messages<|im_end|>"),
        (TEXT | {"messages": CHAT} | IDS, "#"),
        (TEXT | {"prompt_ids": [1]}, "from text"),
        ({"prompt": "2+2=", "completion": "from TRL"}, "from TRL"),
        ({"prompt": [USER], "completion": CHAT[1:], "input": "2+2="}, "from messages<|im_end|>"),
        ({"prompt": "2+2=", "input": "2+2=", "output": "from verl"}, "from verl"),
    ],
)
def test_the_first_form_that_has_values_counts(nothing, columns, expected):
    tokenizer = chat_tokenizer("ChatML")
    row = dict.fromkeys(NOTHING, nothing) | dict.fromkeys(("id", "source", "tools")) | columns
    sample = encode(tokenizer, row)
    assert tokenizer.decode(sample.response_ids.tolist()) == expected and sample.sample_id == "1"
