"""A worker of batch jobs without a model, which starts in a fraction of the time; its answers are rows' ids.

What it does beside that is in the job's settings.  seconds: of each slice.  deaths: a folder with a file for each time
that a worker is to kill its process in the middle of a slice.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from llmkern.integrations.ray.files import Slice, format_of


class StubWorker:
    def __init__(self, answering: Any) -> None:
        self._settings = answering.settings
        self._slices = 0

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        (text,) = batch["slice"]
        piece = Slice(**json.loads(text))
        rows: Any = format_of(Path(piece.path)).read(piece)
        self._slices += 1
        if self._slices == 2:
            for death in Path(self._settings.get("deaths", "nowhere")).glob("*"):
                death.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._settings.get("seconds", 0.0))
        answers = [{"output": str(row["id"]), "completion_tokens": 2, "error": None} for row in rows]
        return {"slice": [piece.number], "task": ["generate"], "answers": [json.dumps(answers)]}
