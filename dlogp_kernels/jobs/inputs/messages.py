"""Conversations and tools, checked, and as the chat template of a tokenizer renders them."""

import contextlib
import inspect
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

from .encoding import GIVE_IDS, Encoded, encode_after, plain_ids
from .values import BrokenLine, as_text, is_missing, kind_of, shown

#: Seconds of CPU time that a chat template may take for a conversation; one takes less than a millisecond.
TEMPLATE_SECONDS = 2.0
#: Stands in the place of a response to see what a template writes around it.
_PLACEHOLDER = "Pr0bEt3xt"
#: Keys of a message under which templates expect the reasoning that came before the content.
_REASONING = ("reasoning_content", "reasoning", "thinking")
#: What the last message may have of a response.
RESPONSE_KEYS = ("content", "tool_calls", *_REASONING)
#: What a model is told; a template may shorten earlier turns of the assistant, but not these.
_TOLD_BY = ("system", "developer", "user")


class ChatTemplate:
    """The chat template of a tokenizer, with what a line gives beside its messages: `tools`, `chat_template_kwargs`.

    BrokenLine if the tokenizer has none; `otherwise` is what the line could have.
    """

    def __init__(self, tokenizer: Any, columns: Mapping[str, Any], *, otherwise: str) -> None:
        if not tokenizer.chat_template:
            raise BrokenLine(f"it has messages, but the tokenizer has no chat template: expected {otherwise}")
        self._tokenizer = tokenizer
        self._tools = _tools(columns.get("tools"))
        self._options = _template_options(tokenizer, columns.get("chat_template_kwargs"))

    def encode_prompt(self, conversation: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation that the assistant is to go on with."""
        return plain_ids(self._tokenizer, self._prompt(conversation))

    def encode_pair(self, conversation: list[dict[str, Any]]) -> Encoded:
        """Prompt: all messages but the last, as generation starts; response: the last one, to the end of the turn."""
        *before, last = conversation
        prompt = self._prompt(before)
        whole = self._render(conversation, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise BrokenLine(
                f"the chat template does not render the response as a continuation of its prompt: {GIVE_IDS}"
            )
        around = self._around(before, last, whole, len(prompt))
        turn = whole[len(prompt) : around.end]
        remark = None
        if around.begin > len(prompt) and whole[len(prompt) : around.begin].strip():
            # Such as an empty block of reasoning: the response was written after it.
            remark = f"the chat template writes {shown(whole[len(prompt) : around.begin])} before the response, which "
            remark += "is read as part of the prompt"
            prompt, turn = whole[: around.begin], whole[around.begin : around.end]
        encoded = encode_after(self._tokenizer, prompt, turn, partial(plain_ids, self._tokenizer))
        return encoded._replace(remark=encoded.remark or remark)

    def _prompt(self, conversation: list[dict[str, Any]]) -> str:
        """The rendering as generation starts, which holds what the model was told."""
        prompt = self._render(conversation, add_generation_prompt=True)
        for message in conversation:
            if message["role"] in _TOLD_BY and message["content"].strip() not in prompt:
                raise BrokenLine(
                    f"the chat template leaves out or changes {shown(message['content'])} of the role {message['role']}"
                )
        for tool in self._tools or ():
            name = _function(tool).get("name")
            if not isinstance(name, str) or name not in prompt:
                raise BrokenLine(f"the chat template does not show the tool {shown(name)}")
        return prompt

    def _around(self, before: list[dict[str, Any]], last: dict[str, Any], whole: str, start: int) -> "_Place":
        """The place of the last message in the rendering `whole`, checked to hold what was given from `start` on."""
        if last.get("tool_calls"):
            return self._place_of_calls(before, last, whole, start)
        content = last["content"]
        probe = self._render([*before, last | {"content": _PLACEHOLDER}], add_generation_prompt=False)
        head, found, tail = probe.rpartition(_PLACEHOLDER)
        if _PLACEHOLDER in head:
            raise BrokenLine(f"the chat template renders the response more than once: {GIVE_IDS}")
        end = len(whole) - len(tail)
        begin = end - len(content)
        changed = not found or begin < 0 or whole[begin:] != content + tail
        # Where it begins in the prompt, such as with an opening that the template writes, that is not by chance.
        beside = whole[:begin] != head if begin > start else begin < start and not whole[begin:start].strip()
        if changed or beside:
            raise BrokenLine(f"the chat template does not render the response as it was given, but changed: {GIVE_IDS}")
        reasoning = _reasoning(last)
        _check_held(reasoning, whole[start:begin], "the reasoning")
        ending = self._ending(tail)
        if ending and content.endswith(ending.strip()):
            ending = ""
        # Reasoning was written by the model, with what the template sets around it.
        return _Place(0 if reasoning else begin, end + len(ending))

    def _place_of_calls(self, before: list[dict[str, Any]], last: dict[str, Any], whole: str, start: int) -> "_Place":
        reasoning = _reasoning(last)
        _check_held([*reasoning, last["content"]], whole[start:], "the response")
        end = start
        for spellings in _spellings(last["tool_calls"]):
            places = [(whole.find(text, begin), text) for begin in (end, start) for text in spellings]
            place, text = next((found for found in places if found[0] >= 0), (-1, ""))
            if place < 0:
                raise BrokenLine(f"the chat template leaves {shown(spellings[0])} of the tool calls out: {GIVE_IDS}")
            end = max(end, place + len(text))
        # What ends a turn of text ends a turn of calls, too.
        probe = self._render([*before, {"role": "assistant", "content": _PLACEHOLDER}], add_generation_prompt=False)
        head, _, tail = probe.rpartition(_PLACEHOLDER)
        begin = len(head) if whole.startswith(head) and not reasoning else 0
        ending = self._ending(tail).strip()
        place = whole.find(ending, end) if ending else -1
        return _Place(begin, place + len(ending) if place >= 0 else len(whole.rstrip()))

    def _ending(self, tail: str) -> str:
        """The token that ends a turn in what a template writes after a text, with spaces before it; "" for none."""
        tokens = sorted(filter(str.strip, self._tokenizer.get_added_vocab()), key=len, reverse=True)
        match = re.match(rf"\s*(?:{'|'.join(map(re.escape, tokens))})", tail) if tokens else None
        return match[0] if match else ""

    def _render(self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            with cpu_time_limit(TEMPLATE_SECONDS):
                return self._tokenizer.apply_chat_template(
                    conversation,
                    tools=self._tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self._options,
                )
        except TimeoutError as error:
            raise BrokenLine(f"the chat template takes more than {TEMPLATE_SECONDS:g} s") from error
        except Exception as error:  # a template is code that comes with the model, and may raise anything
            raise BrokenLine(f"the chat template refuses it: {str(error) or type(error).__name__}") from error


class _Place(NamedTuple):
    """Where a response begins in a rendering (0: with the turn), and where its turn ends."""

    begin: int
    end: int


def _reasoning(message: Mapping[str, Any]) -> list[str]:
    return [message[name].strip() for name in _REASONING if message.get(name)]


def _check_held(texts: Sequence[str], rendered: str, what: str) -> None:
    for text in texts:
        if text not in rendered:
            raise BrokenLine(f"the chat template leaves {what} {shown(text)} out, or changes it: {GIVE_IDS}")


def _spellings(calls: Any) -> Iterator[list[str]]:
    """How a template may write each name and each value of tool calls."""
    for call in calls:
        function = _function(call)
        yield [str(function.get("name"))]
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        for leaf in _leaves(arguments):
            spellings = [leaf if isinstance(leaf, str) else str(leaf)]
            spellings += [json.dumps(leaf, ensure_ascii=ascii_only).strip('"') for ascii_only in (False, True)]
            yield spellings


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values in their order, however deeply they are nested."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += reversed([part for item in value.items() for part in item])
        elif isinstance(value, list):
            left += reversed(value)
        elif value is not None and value != "":
            yield value


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def as_conversation(messages: Any) -> list[dict[str, Any]]:
    """The messages without their nulls; BrokenLine unless each has a role and Unicode texts."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BrokenLine(f"messages is a {kind_of(messages)}, expected a list of objects with role and content")
    # Parquet gives every message every key.
    conversation = [{key: value for key, value in message.items() if not is_missing(value)} for message in messages]
    for message in conversation:
        # Many templates join strings, and take nothing else.
        message["content"] = _content(message.get("content"))
        if not as_text("messages role", message.get("role")):
            raise BrokenLine("messages role is empty, expected the name of who speaks")
        for name in _REASONING:
            if name in message:
                as_text(f"messages {name}", message[name])
        if "tool_calls" in message and not _is_list_of_objects(message["tool_calls"]):
            raise BrokenLine(f"messages tool_calls is {shown(message['tool_calls'])}, expected a list of objects")
    _check_unicode("messages", conversation)
    return conversation


def _content(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts that are text alone."""
    if content is None or isinstance(content, str):
        return as_text("messages content", content or "")
    if not _is_list_of_objects(content):
        raise BrokenLine(f"messages content is a {kind_of(content)}, expected a string or a list of parts")
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise BrokenLine(f"messages content has the part {shown(part)}, expected text alone")
    return as_text("messages content", "".join(part["text"] for part in content))


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _check_unicode(name: str, value: Any) -> None:
    try:
        as_text(name, json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise BrokenLine(f"{name} is nested too deeply") from error


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of objects, or the text of one, as data sets with one type a column have it."""
    if is_missing(value) or value in ([], ""):
        return None
    tools = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(value)
    if not _is_list_of_objects(tools):
        raise BrokenLine(f"tools is {shown(value)}, expected a list of objects")
    _check_unicode("tools", tools)
    return tools or None


def _template_options(tokenizer: Any, value: Any) -> dict[str, Any]:
    """The column `chat_template_kwargs`: what a template takes beside messages and tools."""
    if is_missing(value):
        return {}
    if not isinstance(value, dict):
        raise BrokenLine(f"chat_template_kwargs is a {kind_of(value)}, expected an object")
    _check_unicode("chat_template_kwargs", value)
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() & value.keys()
    if taken:
        raise BrokenLine(f"chat_template_kwargs has {', '.join(sorted(taken))}, expected variables of the template")
    return value


@contextlib.contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds of CPU time; no limit outside the main thread, which alone takes signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before if before is not None else signal.SIG_DFL)
