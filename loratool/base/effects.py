"""What a delta adds to its weight: exact factors, or the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Effect:
    """ΔW of a parameter of `shape`, as exact factors (out, r) and (r, in · kernel), or whole; `before` is its ‖W₀‖, where a
    base tells."""

    shape: tuple[int, ...]
    factors: tuple[Tensor, Tensor] | None
    whole: Tensor | None
    before: float | None = None

    def dense(self) -> Tensor:
        """ΔW in float32, of `shape`."""
        if self.whole is not None:
            return self.whole
        assert self.factors
        up, down = self.factors
        return (up @ down).reshape(self.shape)
