"""What kernels of 16-bit models are given; importing this imports neither Numba nor NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

BF16, F16 = 0, 1
KINDS = {"BF16": BF16, "F16": F16}
"""What the bits may mean, by the name of the type."""


class Packed(NamedTuple):
    """The operands of a block as they were read, where all are of one 16-bit type.

    Who decodes `bits` writes the numbers of NaN and infinite entries to `special`.
    """

    bits: Array
    """(operands, elements), the base last."""
    kind: int
    """`BF16` or `F16`."""
    start: int
    """Where the block's elements begin."""
    special: Array
    """(operands,)"""

    def behind(self, done: int) -> Packed:
        """The same without so many elements."""
        return self._replace(start=self.start + done)


class Steps(NamedTuple):
    """What is done to the models' task vectors, one step after the other."""

    kinds: Array
    """(steps, 2): what, as `kernels.tiles` names it, and to which model."""
    values: Array
    """Factors, probabilities and thresholds."""
    keys: Array
    """Random keys."""
    left: Array
    """How many equal entries are still to be taken; counted down."""
    flags: Array
    """(models, bytes) of bits, or empty."""
