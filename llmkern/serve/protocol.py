"""Request fields, named as in OpenAI's API, and the errors for unsupported ones.

A field that is not served is an error that names it, unless its value asks for nothing (null, or what it is by
default); ignoring it would give an answer to another question.
"""

from __future__ import annotations

import abc
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmkern.serve.http import ApiError
from llmkern.serve.options import ServeOptions
from llmkern.serve.sampling import Sampling

__all__ = ["ChatRequest", "CompletionRequest", "EmbeddingRequest", "GenerationRequest", "TokenizeRequest", "parse"]

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

# Fields of OpenAI's that ask for nothing with these values; with others they are refused.
_ASKING_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# Fields about the caller, not about the answer.
_ABOUT_THE_CALLER = frozenset({"metadata", "user", "safety_identifier", "prompt_cache_key"})


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(_Strict, abc.ABC):
    """Fields that chat and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, None where the context is the limit."""
        return self.max_tokens

    @property
    @abc.abstractmethod
    def alternatives(self) -> int | None:
        """Likely tokens to report beside each token; None for no log-probabilities."""

    def check(self, vocabulary: int) -> None:
        """Raise ApiError for constraints that the fields' types do not express."""
        if len(self.stops) > MAX_STOPS:
            raise ApiError(400, f"stop has {len(self.stops)} strings, at most {MAX_STOPS} are accepted", "stop")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is given without stream", "stream_options")
        for token in self.logit_bias or {}:
            if not token.isdecimal() or int(token) >= vocabulary:
                raise ApiError(400, f"logit_bias has {token!r}, expected token ids below {vocabulary}", "logit_bias")

    def sampling(self, defaults: Sampling) -> Sampling:
        """The settings of this request, where it has none those of the model."""

        def of(name: str) -> Any:
            asked = getattr(self, name)
            return getattr(defaults, name) if asked is None else asked

        return Sampling(
            temperature=of("temperature"),
            top_p=of("top_p"),
            top_k=max(of("top_k"), 0),
            seed=self.seed,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=of("repetition_penalty"),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=self.alternatives,
        )


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Return the message for a chat template; `developer` is OpenAI's newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, vocabulary: int) -> None:
        super().check(vocabulary)
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs", "top_logprobs")


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | _Texts | _Ids | Annotated[list[_Ids], Field(min_length=1, max_length=2048)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class EmbeddingRequest(_Strict):
    """POST /v1/embeddings."""

    model: str
    input: (
        Annotated[str, Field(min_length=1)]
        | _Texts
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    def inputs(self) -> list[str | list[int]]:
        """One or more texts or lists of tokens."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input  # type: ignore[return-value]


class TokenizeRequest(_Strict):
    """POST /tokenize: of a text, or of messages with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


def parse(kind: type[Any], body: Any, options: ServeOptions) -> Any:
    """Parse a request of this kind from a JSON body.  Raises ApiError 400, naming the field, and 404 for another
    model.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {_shown(body)}, expected an object")
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _named(error) from None
    _refuse_extras(request, "")
    if request.model not in (None, options.name):
        raise ApiError(404, f"model is {request.model!r}, this server has {options.name!r}", "model", "model_not_found")
    return request


def _refuse_extras(model: BaseModel, path: str) -> None:
    """Refuse fields that are not served unless they ask for nothing, in nested objects too."""
    for name, value in (model.model_extra or {}).items():
        harmless = value is None or value in _ASKING_NOTHING.get(name, ()) or name in _ABOUT_THE_CALLER
        if not harmless:
            raise ApiError(400, f"{path}{name} is not supported", f"{path}{name}", "unsupported_parameter")
    for name in type(model).model_fields:
        value = getattr(model, name)
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, BaseModel):
                _refuse_extras(item, f"{path}{name}[{i}]." if isinstance(value, list) else f"{path}{name}.")


def _named(error: ValidationError) -> ApiError:
    """Describe the first error, by the field's path."""
    first = error.errors(include_url=False)[0]
    path = ""
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif path == "" or step in ("role", "content", "type", "text", "include_usage"):
            path += f".{step}" if path else str(step)
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing", path)
    return ApiError(400, f"{path} is {_shown(first['input'])}: {first['msg']}", path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
