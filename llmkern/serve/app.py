"""HTTP endpoints of the server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from openai.types import CreateEmbeddingResponse, Embedding, Model
from openai.types.create_embedding_response import Usage
from starlette.exceptions import HTTPException
from torch import nn

from llmkern import __version__
from llmkern.serve.embedding import EmbeddingEngine
from llmkern.serve.engine import Dead, Engine, Event, Failed, Generation, Overloaded
from llmkern.serve.http import ApiError, HungUp, authorised, error_body, json_body, unless_hung_up
from llmkern.serve.options import ServeOptions
from llmkern.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    TokenizeRequest,
    parse,
)
from llmkern.serve.replies import ChatReplies, CompletionReplies, usage
from llmkern.serve.sampling import Sampling

__all__ = ["create_app"]

# Without a key: probes, scrapers, and a page that asks for the key.
_OPEN = frozenset({"/", "/health", "/version", "/metrics"})
_CLOSED_BY_CLIENT = 499  # nginx's status; only logs see it


def create_app(model: nn.Module, tokenizer: Any, options: ServeOptions) -> FastAPI:
    """Create the server's application: generation for a causal language model, embeddings for an encoder.

    `app.state.engine` has the worker's state, `app.state.engine.died` is set when it has ended.
    Raises ValueError where the model cannot be served with these options.
    """
    options = options.for_model(model, tokenizer)
    generates = model.can_generate()  # type: ignore[operator]
    engine = (Engine if generates else EmbeddingEngine)(model, tokenizer, options)
    tokens = _Tokens(tokenizer)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await engine.start()
            yield
        finally:
            await engine.stop()
            tokens.close()

    async def keyed(request: Request) -> None:
        if request.url.path not in _OPEN and not authorised(request, options.api_key):
            raise ApiError(401, "the API key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="llmkern",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(keyed)],
    )
    app.state.engine = engine
    _add_errors(app)

    @app.get("/")
    async def page() -> HTMLResponse:
        text = (Path(__file__).parent / "page.html").read_text()
        # The page's own lines and this server: nothing from elsewhere runs or is asked.
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        if engine.dead:
            raise ApiError(503, "the worker has ended")
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(options)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        if name != options.name:
            raise ApiError(404, f"model is {name!r}, this server has {options.name!r}", "model", "model_not_found")
        return _model(options)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        body: TokenizeRequest = parse(TokenizeRequest, await json_body(request, options.max_body), options)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt or messages is expected, one of them", "prompt")
        if body.messages is not None:
            ids = await tokens.of_chat([message.plain() for message in body.messages])
        else:
            ids = await tokens.of_text(body.prompt or "", special=body.add_special_tokens)
        return {"count": len(ids), "max_model_len": options.max_context, "tokens": ids}

    if isinstance(engine, Engine):
        _add_generation(app, engine, tokens, options)
    else:
        _add_embeddings(app, engine, tokens, options)
    return app


class _Tokens:
    """A tokenizer in a thread of its own: long texts do not hold the loop up, and tokenizers are not thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def of_text(self, text: str, *, special: bool = True) -> list[int]:
        return await self._run(lambda: self.tokenizer(text, add_special_tokens=special)["input_ids"])

    async def of_chat(self, turns: list[dict[str, str]]) -> list[int]:
        """Raises ApiError where the tokenizer has no chat template, and where the template refuses the turns."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, "the model has no chat template; /v1/completions continues plain text", "messages")
        try:
            return await self._run(
                lambda: self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            )
        except Exception as error:  # templates raise what they like
            raise ApiError(400, f"the chat template refuses the messages: {str(error)[:200]}", "messages") from None

    def name(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text

    def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, work: Callable[[], Any]) -> list[int]:
        found = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        return list(found)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after)}).response()

    @app.exception_handler(Dead)
    async def dead(request: Request, error: Dead) -> Response:
        return ApiError(503, str(error)).response()

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return ApiError(500, str(error)).response()

    @app.exception_handler(HungUp)
    async def hung_up(request: Request, error: HungUp) -> Response:
        return Response(status_code=_CLOSED_BY_CLIENT)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


def _add_generation(app: FastAPI, engine: Engine, tokens: _Tokens, options: ServeOptions) -> None:
    defaults = _defaults(engine.model)
    vocabulary: int = engine.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body: ChatRequest = parse(ChatRequest, await json_body(request, options.max_body), options)
        body.check(vocabulary)
        ids = await tokens.of_chat([message.plain() for message in body.messages])
        replies = ChatReplies(options.name, tokens.name, body.alternatives is not None)
        return await answer(request, body, [ids], replies, "messages")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body: CompletionRequest = parse(CompletionRequest, await json_body(request, options.max_body), options)
        body.check(vocabulary)
        prompts = [each if isinstance(each, list) else await tokens.of_text(each) for each in body.prompts()]
        replies = CompletionReplies(options.name, tokens.name, body.alternatives is not None)
        return await answer(request, body, prompts, replies, "prompt")

    async def answer(
        request: Request, body: GenerationRequest, prompts: list[list[int]], replies: Any, field: str
    ) -> Response:
        n = body.n or 1
        if n * len(prompts) > options.max_concurrent + options.max_queue:
            most = options.max_concurrent + options.max_queue
            raise ApiError(400, f"n asks for {n * len(prompts)} answers, at most {most} are accepted", "n")
        limits = [_limit(ids, body.limit, options, field, vocabulary) for ids in prompts]
        sampling = body.sampling(defaults)
        generation = engine.submit(list(zip(prompts, limits, strict=True)), n, sampling, body.stops)
        if body.stream:
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            lines = _stream(generation, replies, len(prompts) if with_usage else None, options.timeout)
            return _Events(generation, lines)
        async with generation:
            events = await unless_hung_up(request, _collect(generation, options.timeout))
        whole = replies.answer(events, usage(generation.timings, len(prompts)), generation.timings)
        return JSONResponse(whole.model_dump(mode="json", exclude_unset=True))


def _add_embeddings(app: FastAPI, engine: EmbeddingEngine, tokens: _Tokens, options: ServeOptions) -> None:
    vocabulary: int = engine.model.config.vocab_size  # type: ignore[union-attr, assignment]

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Any:
        body: EmbeddingRequest = parse(EmbeddingRequest, await json_body(request, options.max_body), options)
        texts = [each if isinstance(each, list) else await tokens.of_text(each) for each in body.inputs()]
        for ids in texts:
            _limit(ids, 0, options, "input", vocabulary)
        try:
            found = await asyncio.wait_for(unless_hung_up(request, engine.embed(texts)), options.timeout)
        except asyncio.TimeoutError:
            raise _too_slow(options.timeout) from None
        count = sum(len(ids) for ids in texts)
        whole = CreateEmbeddingResponse(
            object="list",
            model=options.name,
            data=[
                Embedding.model_construct(object="embedding", index=i, embedding=_coded(one, body.encoding_format))
                for i, one in enumerate(found)
            ],
            usage=Usage(prompt_tokens=count, total_tokens=count),
        )
        return JSONResponse(whole.model_dump(mode="json", warnings=False))


class _Events(StreamingResponse):
    """Server-sent events of a generation, whose places are given back however the response ends."""

    def __init__(self, generation: Generation, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._generation:
            await super().__call__(scope, receive, send)


async def _collect(generation: Generation, timeout: float) -> list[list[Event]]:
    """Collect each sequence's events until all have finished."""
    found: list[list[Event]] = [[] for _ in generation.sequences]

    async def all_events() -> None:
        async for event in generation.events():
            found[event.index].append(event)

    try:
        await asyncio.wait_for(all_events(), timeout)
    except asyncio.TimeoutError:
        raise _too_slow(timeout) from None
    return found


async def _stream(generation: Generation, replies: Any, prompts: int | None, timeout: float) -> AsyncIterator[str]:
    """Yield lines of server-sent events.  prompts: how many there were, if the usage is asked for."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    if isinstance(replies, ChatReplies):
        for sequence in generation.sequences:
            yield _line(replies.first(sequence.index))
    events = generation.events()
    try:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                event = await asyncio.wait_for(anext(events), end - loop.time())
                timings = generation.timings[event.index] if event.finish else None
                yield _line(replies.chunk(event, timings))
        if prompts is not None:
            yield _line(replies.used(usage(generation.timings, prompts)))
    except asyncio.TimeoutError:
        yield _error_line(_too_slow(timeout))
    except (Failed, Dead) as error:
        yield _error_line(ApiError(500, str(error)))
    yield "data: [DONE]\n\n"


def _line(chunk: Any) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True, warnings=False)}\n\n"


def _error_line(error: ApiError) -> str:
    return f"data: {json.dumps(error_body(error))}\n\n"


def _too_slow(timeout: float) -> ApiError:
    return ApiError(504, f"the answer was not complete after {timeout:g} seconds")


def _limit(ids: list[int], asked: int | None, options: ServeOptions, field: str, vocabulary: int) -> int:
    """Return the most tokens that an answer may have.  Raises ApiError if the prompt is not valid, or too long."""
    if not ids:
        raise ApiError(400, f"{field} has no tokens", field)
    if max(ids) >= vocabulary:
        raise ApiError(400, f"{field} has token {max(ids)}, the vocabulary has {vocabulary}", field)
    room = options.max_context - len(ids)
    wanted = max(asked or 0, 1) if asked != 0 else 0
    if room < wanted:
        raise ApiError(
            400,
            f"{field} has {len(ids)} tokens and the answer up to {wanted}; together at most {options.max_context}",
            field,
            "context_length_exceeded",
        )
    return room if asked is None else asked


def _defaults(model: Any) -> Sampling:
    """Return defaults for a request: the checkpoint's settings if it has any, else OpenAI's."""
    config = model.generation_config
    if not config.do_sample:
        return Sampling()
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )


def _model(options: ServeOptions) -> dict[str, Any]:
    model = Model(id=options.name, object="model", created=0, owned_by="llmkern")
    return model.model_dump() | {"max_model_len": options.max_context}


def _coded(embedding: list[float], form: str | None) -> Any:
    """Encode the numbers as a list, or as little-endian fp32 in base64, which OpenAI's Python client asks for."""
    if form != "base64":
        return embedding
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
