"""What the CPU kernels of whole layers take."""

from __future__ import annotations

MAX_HEAD_DIM = 256
