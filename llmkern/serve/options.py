"""Every setting of a server, checked where it is made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

__all__ = ["ServeOptions"]

_LOOPBACK_NAMES = ("localhost", "localhost.localdomain")


@dataclass(frozen=True)
class ServeOptions:
    """Settings of `llmkern serve`.

    max_concurrent: sequences that are generated at a time.  max_queue: sequences that may wait for a place; one more
    gets status 429.  max_context: tokens of a prompt and its answer together.  max_body: bytes of a request.
    timeout: seconds from a request's arrival to the end of its answer, and to wait for running ones at the end.
    Raises ValueError, naming the option, for a value that is not accepted.
    """

    name: str
    max_context: int
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
            if not least <= value <= most:
                shown = option.replace("_", "-")
                raise ValueError(f"--{shown} is {value}, expected {least} to {most}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("--api-key is empty or has characters that no HTTP header carries")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host in _LOOPBACK_NAMES
