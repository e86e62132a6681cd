"""Server settings, checked when they are created."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["LONGEST_CONTEXT", "ServeOptions"]

LONGEST_CONTEXT = 4096  # where nobody says more: the cache is sized for it
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain")


@dataclass(frozen=True)
class ServeOptions:
    """Settings of `llmkern serve`.

    max_concurrent: sequences that are generated at a time.  max_queue: sequences that may wait for a place; one more
    gets status 429.  max_context: tokens of a prompt and its answer together; 0 for the model's own, LONGEST_CONTEXT at
    most.  max_body: bytes of a request.
    timeout: seconds from a request's arrival to the end of its answer, and to wait for running ones at the end.
    Raises ValueError, naming the option, for a value that is not accepted.
    """

    name: str
    max_context: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_concurrent: int = 16
    max_queue: int = 64
    max_body: int = 4 << 20
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for option, least, most in (
            ("max_concurrent", 1, 1024),
            ("max_queue", 0, 1 << 20),
            ("max_context", 2, 1 << 24),
            ("max_body", 1024, 1 << 30),
            ("timeout", 0.1, 86_400),
            ("port", 0, 65_535),
        ):
            value = getattr(self, option)
            if option == "max_context" and value == 0:
                continue
            if not least <= value <= most:
                shown = option.replace("_", "-")
                raise ValueError(f"--{shown} is {value}, expected {least} to {most}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("--api-key is empty or has characters that no HTTP header carries")

    def for_model(self, model: Any, tokenizer: Any) -> ServeOptions:
        """The same with a context in tokens.  Raises ValueError where the model cannot be served so.

        model: of transformers; it must have a tokenizer, and as many positions as `max_context`.
        """
        if tokenizer is None:
            raise ValueError(f"MODEL {self.name} has no tokenizer, so it cannot read a prompt")
        if model.config.is_encoder_decoder:
            raise ValueError(f"MODEL {self.name} is an encoder with a decoder, which continuous batching does not run")
        own = getattr(model.config, "max_position_embeddings", None)
        if self.max_context == 0:
            return replace(self, max_context=min(own or LONGEST_CONTEXT, LONGEST_CONTEXT))
        if own is not None and self.max_context > own:
            raise ValueError(f"--max-context is {self.max_context}, MODEL {self.name} has {own} positions")
        return self

    @property
    def is_loopback(self) -> bool:
        """Return True if only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host in _LOOPBACK_NAMES
