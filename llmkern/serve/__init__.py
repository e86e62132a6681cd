"""An OpenAI-compatible server over transformers' continuous batching: `llmkern serve MODEL`.

=============  =======================================================================================
file           what it holds
=============  =======================================================================================
options        every setting of a server, checked
manager        transformers' manager, with our sampling in each step and errors kept to their request
sampling       the next token of each sequence: penalties, temperature, top-k, top-p, seed, log-probabilities
engine         what requests see: admission, tokens as they come, cancellation, the end of the worker
embedding      the same for encoders: texts of many requests in one forward
text           tokens to text as they come, and stop strings
protocol       what a request may say; whatever is not supported is an error that names the field
replies        answers and chunks, as the types of the package `openai`
http           bodies, keys, errors and clients that hang up
app            the endpoints
timings        when things happened to a sequence
metrics        Prometheus metrics, by vLLM's names
run            the process: sockets, signals, exit status
=============  =======================================================================================

Importing this package imports nothing of the extra `serve`; `llmkern.serve.app` does.
"""

from __future__ import annotations

from llmkern.extras import need

__all__ = ["require"]


def require() -> None:
    """Raise ModuleNotFoundError, with what to install, where a package of the extra `serve` is missing."""
    need("serving", "serve", "transformers", "fastapi", "uvicorn", "openai", "prometheus_client", "psutil")
