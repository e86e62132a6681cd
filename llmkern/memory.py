"""Placement of weights in memory, and memory returned to the system.

A decoded token reads every weight once, and the pages' addresses are part of the price: with pages of 4 KiB a core
looks up an address for every 4 KiB that it streams, and Linux maps a checkpoint's file with such pages only.
Transparent huge pages (2 MiB) are there for anonymous memory that asks for them (madvise(2), MADV_HUGEPAGE).  A large
weight gets such pages where it lies (mremap(2)), and nobody can tell; small ones are copied to memory in which many
share a page.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from llmkern.checks import PLAIN_TENSORS

__all__ = ["MIN_BYTES", "give_back", "move_back_", "move_to_huge_pages_"]

MIN_BYTES = 32 << 20
"""Weights of less than this are left where they are: caches hold much of them."""
_LARGE = 8 << 20  # of a storage: then at least three quarters of it are whole pages
_ARENA_BYTES = 64 << 20  # of one piece of memory, which is given back when the last tensor in it is gone
_PAGE = 2 << 20
_ALIGNMENT = 64
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class _Arena(mmap.mmap):
    """Anonymous memory that asks for huge pages, from an address on that is a multiple of theirs."""

    begin: int
    end: int
    used: int

    def __new__(cls, size: int) -> _Arena:
        self = super().__new__(cls, -1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self, dtype=torch.uint8)
        self.begin, self.end = whole.data_ptr(), whole.data_ptr() + len(self)
        self.used = -self.begin % _PAGE
        return self

    def take(self, size: int) -> Tensor:
        """Some bytes, a storage of their own."""
        begin, self.used = self.used, self.used + _aligned(size)
        return torch.frombuffer(self, dtype=torch.uint8, count=size, offset=begin)


_arenas: weakref.WeakSet[_Arena] = weakref.WeakSet()
_remapped: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensors that have huge pages where they lie, and where


@torch.inference_mode(mode=False)  # what is made within one can never be trained
def move_to_huge_pages_(model: nn.Module) -> int:
    """Copy the model's parameters and buffers on the CPU to huge pages; returns how many bytes were copied.

    Tensors stay the objects that they are, with their values, strides and storages in common.  Storages of 8 MiB and
    more stay where they are, too, on other pages; of smaller ones the memory (`data_ptr`) is another.
    Nothing is moved where that would not help or not be safe: fewer than `MIN_BYTES`, a system without transparent
    huge pages, memory that is pinned or shared with other processes, small storages that somebody else has tensors of
    as well (views, an older state_dict), tensor subclasses, and what has been moved before.
    """
    if not _available():
        return 0
    storages: dict[int, list[Tensor]] = {}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        storages.setdefault(tensor.untyped_storage().data_ptr() if _plain(tensor) else 0, []).append(tensor)
    storages.pop(0, None)  # subclasses and empty tensors
    sizes = {begin: _bytes(tensors) for begin, tensors in storages.items() if _movable(begin, tensors)}
    if sum(sizes.values()) < MIN_BYTES:
        return 0
    moved = 0
    for begin in [begin for begin, size in sizes.items() if size >= _LARGE]:
        if _remap(begin, size := sizes.pop(begin)):
            moved += size
            for tensor in storages[begin]:
                _remapped[tensor] = begin
    sizes = {begin: size for begin, size in sizes.items() if not _has_others(storages[begin])}
    with contextlib.suppress(OSError):  # no memory for more: what has been moved may stay
        for (begin, size), to in zip(sizes.items(), _places(list(sizes.values())), strict=True):
            tensors = storages.pop(begin)
            _rehouse(tensors, to)
            moved += size
    _trim()
    return moved


@torch.inference_mode(mode=False)
def move_back_(model: nn.Module) -> int:
    """Undo `move_to_huge_pages_`; returns how many bytes were copied.

    What was copied to memory with huge pages gets memory of its own again, one storage for those that share one, but
    where somebody else has tensors of it by now.  What lies where it always did stays there: nobody can tell.
    """
    storages: dict[int, list[Tensor]] = {}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if _plain(tensor) and _in_arena(begin := tensor.untyped_storage().data_ptr()):
            storages.setdefault(begin, []).append(tensor)
    moved = 0
    for tensors in storages.values():
        if not _has_others(tensors):
            _rehouse(tensors, torch.empty(size := _bytes(tensors), dtype=torch.uint8, device="cpu"))
            moved += size
    return moved


def _rehouse(tensors: list[Tensor], to: Tensor) -> None:
    """Move the storage that these tensors share to the bytes `to`, a storage of its own."""
    # Not by copy_: its threads wait for one another at the end of each of hundreds of small copies.
    ctypes.memmove(to.data_ptr(), tensors[0].untyped_storage().data_ptr(), _bytes(tensors))
    for tensor in tensors:
        with torch.inference_mode(tensor.is_inference()):
            view = torch.empty(0, dtype=tensor.dtype, device="cpu")
            view.set_(to.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor.data = view


def give_back() -> None:
    """Return what is not in use to the system: what only cycles hold, and what the C library keeps for later."""
    gc.collect()
    _trim()


def _trim() -> None:
    """Return what the C library keeps for later to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's; another C library may lack the function


def _available() -> bool:
    """Does this system give huge pages to those who ask?"""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
    )


def _in_arena(begin: int) -> bool:
    return any(arena.begin <= begin < arena.end for arena in _arenas)


def _movable(begin: int, tensors: list[Tensor]) -> bool:
    if _in_arena(begin) or any(_remapped.get(t) == begin for t in tensors):
        return False
    return not tensors[0].is_shared() and not (torch.cuda.is_available() and tensors[0].is_pinned())


def _has_others(tensors: list[Tensor]) -> bool:
    """Return True if other tensors share the storage of these."""
    storage = tensors[0].untyped_storage()
    held: int = torch._C._storage_Use_Count(storage._cdata)
    with_gradients = sum(
        t.grad is not None and t.grad.untyped_storage().data_ptr() == storage.data_ptr() for t in tensors
    )
    return held > len(tensors) + with_gradients + 1  # and `storage`


def _remap(begin: int, size: int) -> bool:
    """Put huge pages with the same contents in the place of those at an address, as far as whole ones fit; False where
    the system does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, length, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, types in (
        ("mmap", (pointer, length, flags, flags, flags, ctypes.c_long)),
        ("mremap", (pointer, length, length, flags, pointer)),
        ("munmap", (pointer, length)),
        ("madvise", (pointer, length, flags)),
    ):
        function = getattr(libc, name, None)
        if function is None:
            return False
        function.argtypes = types
        function.restype = pointer if name in ("mmap", "mremap") else flags
    first = -(-begin // _PAGE) * _PAGE
    size = (begin + size) // _PAGE * _PAGE - first
    failed = pointer(-1).value
    made = libc.mmap(None, size + _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if size <= 0 or made == failed:
        return False
    aligned = -(-made // _PAGE) * _PAGE
    libc.madvise(aligned, size, mmap.MADV_HUGEPAGE)
    ctypes.memmove(aligned, first, size)
    done = libc.mremap(aligned, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, first) != failed
    if aligned > made:
        libc.munmap(made, aligned - made)
    rest = aligned if not done else aligned + size
    if made + size + _PAGE > rest:
        libc.munmap(rest, made + size + _PAGE - rest)
    return bool(done)


def _bytes(tensors: list[Tensor]) -> int:
    return tensors[0].untyped_storage().nbytes()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _places(sizes: list[int]) -> Iterator[Tensor]:
    """Memory for each of the sizes, in arenas; made as it is asked for, so that what is left behind can go."""
    at = 0
    while at < len(sizes):
        last, total = at, 0
        while last < len(sizes) and (last == at or total + _aligned(sizes[last]) <= _ARENA_BYTES):
            total += _aligned(sizes[last])
            last += 1
        arena = _Arena(total)
        _arenas.add(arena)
        for size in sizes[at:last]:
            yield arena.take(size)
        at = last
