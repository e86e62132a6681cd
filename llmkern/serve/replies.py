"""Answers and chunks as the types of the package `openai`, which is what its clients parse them into."""

from __future__ import annotations

import abc
import time
import uuid
from collections.abc import Callable
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from llmkern.serve.engine import Event
from llmkern.serve.sampling import Drawn
from llmkern.serve.timings import Timings

__all__ = ["ChatReplies", "CompletionReplies", "usage"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def usage(timings: list[Timings], prompts: int) -> CompletionUsage:
    """Tokens of a request: each of its prompts once, all answers.

    timings: those of n sequences for each prompt, in order.
    """
    prompt = sum(one.prompt_tokens for one in timings[:: len(timings) // prompts])
    answers = sum(one.tokens for one in timings)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)


class _Replies(abc.ABC):
    """Build one request's answer.  name: returns a token's text."""

    prefix: str
    whole: type[Any]
    part: type[Any]
    object_of_whole: str
    object_of_part: str

    def __init__(self, model: str, name: Callable[[int], str], with_logprobs: bool) -> None:
        self._fields = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._name, self._with_logprobs = name, with_logprobs

    def answer(self, events: list[list[Event]], used: CompletionUsage, timings: list[Timings]) -> Any:
        """Build the whole answer from each sequence's events."""
        choices = [self._choice(i, each) for i, each in enumerate(events)]
        shown = [one.to_dict() for one in timings]
        return self.whole(**self._fields, object=self.object_of_whole, choices=choices, usage=used, timings=shown[0])

    def chunk(self, event: Event, timings: Timings | None) -> Any:
        """Build the chunk of one token; with the timings in the last of a sequence."""
        extra = {} if timings is None else {"timings": timings.to_dict()}
        return self._chunk([self._delta(event)], **extra)

    def used(self, used: CompletionUsage) -> Any:
        """Build the chunk that `stream_options.include_usage` asks for."""
        return self._chunk([], usage=used)

    def _chunk(self, choices: list[Any], **extra: Any) -> Any:
        return self.part(**self._fields, object=self.object_of_part, choices=choices, **extra)

    @abc.abstractmethod
    def _choice(self, index: int, events: list[Event]) -> Any:
        """A sequence of the whole answer."""

    @abc.abstractmethod
    def _delta(self, event: Event) -> Any:
        """A sequence's part of a chunk."""


class ChatReplies(_Replies):
    """Replies of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", ChatCompletion, ChatCompletionChunk
    object_of_whole, object_of_part = "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> ChatCompletionChunk:
        """The chunk that says who speaks."""
        delta = ChoiceDelta(role="assistant", content="")
        return self._chunk([ChunkChoice(index=index, delta=delta, finish_reason=None)])

    def _choice(self, index: int, events: list[Event]) -> Choice:
        text = "".join(event.text for event in events)
        finish, logprobs = events[-1].finish, None
        assert finish is not None, "these are all events of a sequence"
        if self._with_logprobs:
            logprobs = ChoiceLogprobs(content=[self._logprob(event.drawn) for event in events], refusal=None)
        return Choice(
            index=index,
            message=ChatCompletionMessage(role="assistant", content=text),
            finish_reason=finish,
            logprobs=logprobs,
        )

    def _delta(self, event: Event) -> ChunkChoice:
        logprobs = None
        if self._with_logprobs:
            logprobs = ChunkLogprobs(content=[self._logprob(event.drawn)], refusal=None)
        return ChunkChoice(
            index=event.index,
            delta=ChoiceDelta(content=event.text),
            finish_reason=event.finish,
            logprobs=logprobs,
        )

    def _logprob(self, drawn: Drawn) -> ChatCompletionTokenLogprob:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._name(token)
            # A part of a character has no text; its bytes differ from one tokenizer to the next.
            known = None if _INCOMPLETE in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": known}

        assert drawn.logprob is not None
        top = [TopLogprob(**entry(*each)) for each in drawn.top]
        return ChatCompletionTokenLogprob(**entry(drawn.token, drawn.logprob), top_logprobs=top)


class CompletionReplies(_Replies):
    """Replies of /v1/completions."""

    prefix, whole, part = "cmpl", Completion, Completion
    object_of_whole = object_of_part = "text_completion"

    def __init__(self, model: str, name: Callable[[int], str], with_logprobs: bool) -> None:
        super().__init__(model, name, with_logprobs)
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, events: list[Event]) -> CompletionChoice:
        text = "".join(event.text for event in events)
        return self._made(index, text, events[-1].finish, events)

    def _delta(self, event: Event) -> CompletionChoice:
        return self._made(event.index, event.text, event.finish, [event])

    def _made(self, index: int, text: str, finish: str | None, events: list[Event]) -> CompletionChoice:
        logprobs = self._logprobs(index, events) if self._with_logprobs else None
        # The type has no place for an answer that goes on; OpenAI's own chunks have null there.
        return CompletionChoice.model_construct(index=index, text=text, finish_reason=finish, logprobs=logprobs)

    def _logprobs(self, index: int, events: list[Event]) -> Logprobs:
        names = [self._name(event.drawn.token) for event in events]
        offsets = []
        for event in events:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(event.text)
        return Logprobs(
            tokens=names,
            token_logprobs=[event.drawn.logprob for event in events if event.drawn.logprob is not None],
            top_logprobs=[{self._name(token): value for token, value in event.drawn.top} for event in events],
            text_offset=offsets,
        )
