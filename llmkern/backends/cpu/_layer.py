"""Declarations of the CPU kernels of whole layers: the calls that they take."""

from __future__ import annotations

MAX_HEAD_DIM = 256
