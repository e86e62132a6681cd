"""Read request bodies and keys, write errors in OpenAI's format, and notice clients that disconnect."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

__all__ = ["ApiError", "HungUp", "authorised", "error_body", "json_body", "unless_hung_up"]

T = TypeVar("T")
_BODY_SECONDS = 30.0


class ApiError(Exception):
    """An answer with an error: status, one sentence, the field at fault and OpenAI's code, where there are such."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        return JSONResponse(error_body(self), self.status, self.headers)


class HungUp(Exception):
    """The client has disconnected; nobody reads an answer."""


def error_body(error: ApiError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def authorised(request: Request, key: str | None) -> bool:
    """Return True if the request carries the key as OpenAI's clients send it; compared in constant time."""
    if key is None:
        return True
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())


async def json_body(request: Request, limit: int) -> Any:
    """The request's JSON.  Raises ApiError: 413 past `limit` bytes, 408 where it does not come, 400 for no JSON."""
    too_large = ApiError(413, f"the body has more than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    try:
        body = await asyncio.wait_for(_read(request, limit), _BODY_SECONDS)
    except asyncio.TimeoutError:  # TimeoutError's own name before Python 3.11
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} seconds") from None
    if body is None:
        raise too_large
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:100]}") from None


async def _read(request: Request, limit: int) -> bytes | None:
    """Return the body, or None if it is longer than the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


async def unless_hung_up(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it and raise HungUp when the client disconnects."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
