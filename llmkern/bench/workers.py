"""The parent's side of `llmkern.bench.worker`: a process for each variant, asked one at a time.

While one works the others wait in a read and take no processor: what OpenMP's threads spin after their last parallel
region (libgomp: a few milliseconds unless OMP_WAIT_POLICY says otherwise, which is left as it is, because a passive
policy slows decoding itself) is over before the next turn, which begins after a pause.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["Failed", "WorkerProcess"]

PAUSE_SECONDS = 0.02
_ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A request was not answered with a result; the message is the variant's error."""


class WorkerProcess:
    """A worker; `module` is replaced in tests."""

    def __init__(self, threads: int, *, module: str = "llmkern.bench.worker") -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        threading = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | threading | {"PYTHONPATH": path},
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the parent's to answer
        )

    def ask(self, do: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        """The answer; `Failed` where it is an error, where the process died, or where it took too long."""
        self.begin(do, **arguments)
        return self.finish(timeout=timeout)

    def begin(self, do: str, **arguments: Any) -> None:
        """Send a request without waiting."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"do": do, **arguments}) + "\n").encode())
        except OSError:
            raise Failed(self._why_it_died()) from None

    def finish(self, *, timeout: float) -> dict[str, Any]:
        """Wait for the answer to what was begun."""
        assert self._process.stdout is not None
        line, end = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise Failed(f"no answer within {timeout:.0f} s")
            part = self._process.stdout.read(65536)
            if not part:
                raise Failed(self._why_it_died())
            line += part
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        time.sleep(PAUSE_SECONDS)
        return answer["ok"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def _why_it_died(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the process {ended}" + (f": {said[-1][:200]}" if said else "")
