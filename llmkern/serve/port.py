"""The socket that a server listens on."""

from __future__ import annotations

import socket

from llmkern.serve.options import ServeOptions

__all__ = ["bound_socket"]


def bound_socket(options: ServeOptions) -> socket.socket:
    """Return a socket bound to the options' host and port, to any free one for port 0.

    Raises OSError, with one line that names the option, where the port is taken.
    """
    made = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((options.host, options.port))
    except OSError as error:
        made.close()
        taken = f"--port is {options.port}, which cannot be taken on {options.host}: {error.strerror}"
        raise OSError(taken) from None
    return made
