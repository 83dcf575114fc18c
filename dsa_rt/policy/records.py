"""What a calibration run leaves: confidence and error of every chunk after every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_rt.errors import BundleError, PolicyError


@dataclass(frozen=True, eq=False)
class Records:
    """Runs in which every chunk took all passes and was judged after each.

    confidence [clips, chunks, passes]: the head's, in [0, 1]. error [clips, chunks, passes], 0 or more:
    distance of the clean prediction after that pass from whatever the refinement should approach, in any
    unit, small where the chunk is good. At least 2 chunks and 2 passes. Raises :class:`PolicyError`.
    """

    confidence: NDArray[np.float64]
    error: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("confidence", "error"):
            values = np.array(getattr(self, name), dtype=np.float64)
            if values.ndim != 3 or values.shape[0] < 1 or min(values.shape[1:]) < 2:
                raise PolicyError(
                    f"Records: {name} has shape {list(values.shape)}; "
                    "expected [clips, chunks, passes] with 2 or more chunks and passes"
                )
            least, most = values.min(), values.max()  # NaN where there is one
            limit = 1.0 if name == "confidence" else np.finfo(np.float64).max
            if not (least >= 0 and most <= limit):
                expected = "from 0 to 1" if name == "confidence" else "of 0 or more"
                raise PolicyError(
                    f"Records: {name} has values from {least} to {most}; expected finite numbers {expected}"
                )
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        if self.confidence.shape != self.error.shape:
            shapes = f"{list(self.confidence.shape)} and {list(self.error.shape)}"
            raise PolicyError(f"Records: confidence and error differ in shape: {shapes}")

    @property
    def clips(self) -> int:
        return self.error.shape[0]

    @property
    def chunks(self) -> int:
        return self.error.shape[1]

    @property
    def passes(self) -> int:
        return self.error.shape[2]

    def gain(self) -> NDArray[np.float64]:
        """[clips, chunks, passes]: error removed since the first pass, 0 there."""
        return self.error[..., :1] - self.error

    def select(self, clips: Any) -> Records:
        """The records of some clips (an index or a slice): to fit on some and to test on others."""
        return Records(self.confidence[clips], self.error[clips])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, 6 significant digits."""
        return {name: _rounded(getattr(self, name)).tolist() for name in ("confidence", "error")}

    @classmethod
    def from_dict(cls, data: Any) -> Records:
        """Inverse of :meth:`to_dict`; :class:`BundleError` where it is anything else."""
        try:
            return cls(np.asarray(data["confidence"], np.float64), np.asarray(data["error"], np.float64))
        except PolicyError as error:
            raise BundleError(str(error)) from error
        except (TypeError, ValueError, KeyError) as error:
            raise BundleError(
                f"records are not lists of confidence and error, all of one shape ({error})"
            ) from error


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 6 significant digits, which keeps files small and order intact."""
    with np.errstate(divide="ignore"):
        scale = 10.0 ** (5 - np.floor(np.log10(np.where(values == 0, 1.0, np.abs(values)))))
    return np.round(values * scale) / scale
