"""A conversation in; the characters of its rendering that the assistant would write, out.

A template may end the last turn in another way than the others, or drop reasoning from earlier turns, so the rendering
of the first messages is not always the beginning of the whole. Here every message is located by the difference between
two renderings, of which one has a mark in place of its text. A turn reaches from the end of the generation prompt to
the end of what closes it.
"""

from collections.abc import Sequence
from functools import cached_property

from onelayer.compiler.conversations.chat import MARK, Chat, Span, has_text, mark_span, marked
from onelayer.compiler.conversations.parts import Message
from onelayer.compiler.errors import InputError

ANSWER = "\ue003\ue004\ue005"  # another mark, for an answer after the marked message


class Turns:
    """The places of a conversation's messages in its rendering."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.text = chat.text

    def span(self, turn: int) -> Span:
        """Return the characters that the assistant writes as message `turn`."""
        return self.start(turn), self.end(turn)

    def start(self, turn: int) -> int:
        """Find where the generation prompt of a turn ends."""
        own = self._region(turn)[0]
        before = max((index for index in range(turn) if self._regions[index] is not None), default=None)
        end = 0 if before is None else self._region(before)[1]
        prompt = None if before is None else self._tail(self._marked(before)[:turn], prompt=True)
        if prompt is not None and self.text.startswith(prompt, end):
            end += len(prompt)
            if self.chat.messages[turn - 1]["role"] != "tool" or self._generation_prompt in prompt:
                return end
            # Some templates leave the prompt out after the result of a tool, and write it in the whole conversation.
            return end + (len(self._generation_prompt) if self.text.startswith(self._generation_prompt, end) else 0)
        general = self._generation_prompt
        if general and (found := self.text.rfind(general, end, own)) >= 0:
            return found + len(general)
        if before is None or prompt is None:
            return own
        # The template adds something to the prompt, or to this turn, that the other lacks.
        header = self._tail([*self._marked(before)[:turn], {"role": "assistant", "content": ANSWER}]) or ""
        return end + min(_common(self.text[end:own], prompt), _common(header.partition(ANSWER)[0], prompt))

    def end(self, turn: int) -> int:
        """Find where a turn ends, its closing token included."""
        after = next((region[0] for region in self._regions[turn + 1 :] if region is not None), None)
        if after is None:
            return len(self.text)
        end = self._region(turn)[1]
        between = self.text[end:after]
        closing = self._tail(self._marked(turn)[: turn + 1])
        if closing is None:  # some templates need a question
            closing = self._tail([{"role": "user", "content": ANSWER}, {"role": "assistant", "content": MARK}]) or ""
        if closing and between.startswith(closing):
            return end + len(closing)
        # The last turn of a conversation ends differently: what the next message begins with is not part of this one.
        opening = self.chat.rendered(self._marked(turn + 1)[turn + 1 :]) or ""
        header = _common(between[::-1], _before_mark(opening)[::-1])
        if header < len(between):
            return end + len(between) - header
        # Every message ends in the same way: the next one begins like a generation prompt.
        prompt = self._generation_prompt
        begins = [(_common(between[place:], prompt), place) for place in range(1, len(between))] if closing else []
        shared, place = max(begins, default=(0, 0))
        return end + (place if shared else 0)

    @cached_property
    def _regions(self) -> list[Span | None]:
        """The characters that depend on the text of each message; None for a message without one."""
        regions: list[Span | None] = []
        reached = 0
        for index, message in enumerate(self.chat.messages):
            if not has_text(message):
                regions.append(None)
                continue
            varied = self.chat.render(self._marked(index))
            first, last = mark_span(varied)
            start = min(_common(self.text, varied), first)
            end = len(self.text) - min(_common(self.text[::-1], varied[::-1]), len(varied) - last)
            if first < 0 or not reached <= start < end:
                raise InputError(
                    f"{self.chat.source}: the chat template of {self.chat.name} writes message {index} in more than "
                    "one place, so its tokens cannot be identified; put {% generation %} marks into the template, or "
                    "write 'prompt' and 'completion' as strings"
                )
            regions.append((start, end))
            reached = end
        return regions

    def _region(self, index: int) -> Span:
        region = self._regions[index]
        assert region is not None, "checked: a learned turn has a text"
        return region

    @cached_property
    def _generation_prompt(self) -> str:
        """The text that a template writes when it is the assistant's turn."""
        probe = [{"role": "user", "content": MARK}]
        closed, open_ = self._tail(probe), self._tail(probe, prompt=True)
        return "" if closed is None or open_ is None else open_.removeprefix(closed)

    def _tail(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """Return what a rendering has after the mark; None if the template refuses these messages."""
        text = self.chat.rendered(messages, prompt)
        if text is None or (last := mark_span(text)[1]) < 0:
            return None
        return text[last:]

    def _marked(self, index: int) -> list[Message]:
        """Return the messages with a mark in one of them."""
        messages = list(self.chat.messages)
        messages[index] = marked(messages[index])
        return messages


def learned_spans(chat: Chat) -> list[Span]:
    """Return the characters that a loss counts: the assistant's turns, those of weight 0 excepted.

    The template's own `{% generation %}` marks decide what of a turn is written by the assistant, if it has them.
    """
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    learned = [index for index in answers if chat.messages[index].get("weight") != 0]
    marked_spans = chat.generation_spans if chat.tokenizer.is_fast else None
    if marked_spans is not None and learned == answers:
        return marked_spans
    turns = Turns(chat)
    spans = [turns.span(turn) for turn in learned]
    if marked_spans is None:
        return spans
    both = [(max(one[0], other[0]), min(one[1], other[1])) for one in spans for other in marked_spans]
    return [(first, last) for first, last in both if first < last]


def completion_span(chat: Chat, prompt_messages: int) -> Span:
    """Return the characters of all messages after the first `prompt_messages`, to the end of the text."""
    return Turns(chat).start(prompt_messages), len(chat.text)


def _before_mark(text: str) -> str:
    first, _ = mark_span(text)
    return text[:first] if first >= 0 else ""


def _common(first: str, second: str) -> int:
    """Count the characters that both begin with."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
