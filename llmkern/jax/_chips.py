"""Data about TPU chips, and launches for chips that are not present.  Needs no JAX.

Sizes of VMEM and rates are those that JAX has for them (jax/_src/pallas/mosaic/tpu_info.py), and of a single core.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from llmkern.scoped import assigned

__all__ = ["CHIPS", "Chip", "assume", "assumed", "chip_named", "current", "interpret", "interpreted", "no_tpu"]

MIB = 2**20


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one step of a grid.

    matmul: M, N, K of linear, int8_matmul and int8_linear.  packed: those of quantized_linear.
    attention: queries, keys.  decode: keys of attention_decode.
    rows: bytes in fp32, of ops that read and write each row once.
    """

    matmul: tuple[int, int, int]
    packed: tuple[int, int, int]
    attention: tuple[int, int]
    decode: int
    rows: int


@dataclass(frozen=True)
class Chip:
    """One core of a TPU.

    vmem: bytes.  mxu: rows and columns of a matrix unit.  bandwidth: of HBM, bytes a second.  bf16, int8: operations
    a second, 0 where there are no products of that dtype.
    """

    name: str
    kinds: tuple[str, ...]
    vmem: int
    mxu: int
    bandwidth: float
    bf16: float
    int8: float
    blocks: Blocks

    @property
    def budget(self) -> int:
        """Bytes of VMEM that one kernel's blocks may take; the compiler needs the rest."""
        return self.vmem * 3 // 4

    def seconds(self, moved: float, operations: float, dtype: str) -> float:
        """Return the least time for so many bytes and operations; a product in fp32 is six in bf16."""
        rate = {"int8": self.int8, "float32": self.bf16 / 6}.get(dtype, self.bf16)
        return max(moved / self.bandwidth, operations / rate if rate else 0.0)


# fmt: off
_BLOCKS = {
    #             matmul             packed            attention    decode  rows
    "v4":  Blocks((256, 256, 512),   (128, 128, 4096), (256, 256),  512,    MIB // 2),
    "v5e": Blocks((256, 512, 1024),  (256, 256, 4096), (512, 512),  512,    MIB),
    "v5p": Blocks((512, 512, 1024),  (256, 256, 4096), (512, 512),  1024,   MIB),
    "v6e": Blocks((512, 1024, 1024), (512, 512, 4096), (512, 1024), 1024,   2 * MIB),
}
_TABLE = (
    #            kinds                       vmem       mxu  bandwidth bf16      int8
    Chip("v4",  ("TPU v4",),                 16 * MIB,  128, 615e9,    137.5e12, 0,       _BLOCKS["v4"]),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"),  128 * MIB, 128, 820e9,    197e12,   394e12,  _BLOCKS["v5e"]),
    Chip("v5p", ("TPU v5", "TPU v5p"),       64 * MIB,  128, 1230e9,   229.5e12, 459e12,  _BLOCKS["v5p"]),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"),  128 * MIB, 256, 1640e9,   920e12,   1840e12, _BLOCKS["v6e"]),
)
# fmt: on
CHIPS = {chip.name: chip for chip in _TABLE}
"""Chips by name."""
DEFAULT = "v5e"
"""The chip whose blocks the interpreter uses."""


class _State:
    chip: Chip | None = None
    interpret: bool = False


_state = _State()


def chip_named(name: str) -> Chip:
    """Return the chip of this name; raises ValueError with the known names."""
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}, expected {' or '.join(CHIPS)}")
    return CHIPS[name]


def assume(chip: str) -> AbstractContextManager[None]:
    """Plan and lower kernels for this chip within the block, whatever the machine has."""
    return assigned(_state, chip=chip_named(chip))


def interpreted() -> AbstractContextManager[None]:
    """Run kernels in Pallas's interpreter within the block: on any machine, slowly."""
    return assigned(_state, interpret=True)


def assumed() -> Chip | None:
    """Return the chip of the surrounding `assume`, or None."""
    return _state.chip


def interpret() -> bool:
    """Return whether kernels run in the interpreter: it is asked for, and no chip is assumed."""
    return _state.chip is None and _state.interpret


def no_tpu() -> str | None:
    """Return why JAX has no TPU to run a kernel on, or None."""
    import jax

    if jax.default_backend() == "tpu":
        return None
    return (
        "JAX finds no TPU here; llmkern.jax.interpreted() runs the kernels in Pallas's interpreter, "
        "llmkern.jax.assume('v5e') lowers them for a chip"
    )


def current() -> Chip:
    """Return the chip that a launch is for: the assumed one, this machine's, or in the interpreter v5e.

    Raises RuntimeError where there is none, ValueError for one without block sizes.
    """
    if _state.chip is not None:
        return _state.chip
    if interpret():
        return CHIPS[DEFAULT]
    reason = no_tpu()
    if reason is not None:
        raise RuntimeError(reason)
    import jax

    kind = jax.devices()[0].device_kind
    for chip in CHIPS.values():
        if kind in chip.kinds:
            return chip
    raise ValueError(
        f"there are no block sizes for {kind!r}; llmkern.jax.assume(...) takes those of {', '.join(CHIPS)}"
    )
