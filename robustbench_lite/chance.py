"""What chance makes of figures: intervals and tests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson, 1927, equation 12)."""
    from scipy.special import ndtri  # scipy.stats has it too, and takes seconds to import

    z, p = float(ndtri(0.975)), successes / trials
    centre, half = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    return low if successes else 0.0, high if successes < trials else 1.0


def mcnemar(
    one: NDArray[np.bool_],
    other: NDArray[np.bool_],
    alternative: Literal["two-sided", "less", "greater"] = "two-sided",
) -> float:
    """The p-value of the same inputs being true equally often in ``one`` and ``other``, by the exact test of those on
    which they differ (McNemar, 1947); ``greater``: against ``one`` being true more often."""
    from scipy.special import bdtr  # scipy.stats has the test, and takes seconds to import

    alone, both = int((one & ~other).sum()), int((one != other).sum())
    fewer, more = float(bdtr(alone, both, 0.5)), float(bdtr(both - alone, both, 0.5))
    return {"less": fewer, "greater": more, "two-sided": min(1.0, 2 * min(fewer, more))}[alternative]
