"""A signal model out of any torch function, with derivatives by automatic differentiation.

The one part of the models that needs torch: `fisherprint.models` loads it when it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.func import jacfwd, vmap

from fisherprint.models.protocol import Fingerprints, Named, checked
from fisherprint.parameters import Parameter

# Forward mode keeps its level in a global variable: one thread at a time.
_one_at_a_time = threading.Lock()
# Signals and derivatives of a batch take this many bytes; intermediate results some times that.
_CHUNK_BYTES = 16e6


class TorchModel(Named):
    """A user's own function θ → signal, as the paper's theory has it: any model will do.

    Derivatives are exact, by forward mode through the function (`torch.func.jacfwd`), for many
    parameter sets at once (`torch.func.vmap`), in double precision.

    Args:
        function: from θ, a float64 tensor of shape (P,), to the signal for M0 = 1, shape (T,),
            real or complex. Written with torch's functions, without `if` on values of θ (use
            `torch.where`) and without changing a tensor in place. A function of a module, unlike
            one made on the spot, can travel to other processes.
        parameters: the P parameters, with units and bounds; θ outside of them is refused.

    Raises:
        ValueError: names that come twice, or a function that does not return such a signal.

    Examples:
        >>> import torch
        >>> from fisherprint import Parameter
        >>> from fisherprint.models import TorchModel
        >>> times = torch.arange(1, 4) * 0.02
        >>> T2 = Parameter("T2", "$T_2$", "s", (1e-3, 5.0))
        >>> model = TorchModel(lambda θ: torch.exp(-times / θ[0]), [T2])
        >>> model.simulate([[0.06]]).jacobian[0, :, 0].real.round(3)
        array([3.981, 5.705, 6.131])
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], parameters: Sequence[Parameter]
    ) -> None:
        self.function = function
        self.parameters = tuple(parameters)
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(
                f"expected parameters of different names, at least one; got {self.names}. "
                "Give each of them once."
            )
        # The number of samples does not depend on where the function is asked.
        inside = [_inside(parameter.bounds) for parameter in parameters]
        self.n_samples = len(self._one(torch.tensor(inside, dtype=torch.float64)))

    def simulate(self, theta: ArrayLike) -> Fingerprints:
        """Signals and exact derivatives for M0 = 1.

        Args:
            theta: parameter sets, shape (S, P), SI units.

        Returns:
            signal (S, T) and jacobian (S, T, P), complex128.

        Raises:
            ValueError: wrong shape, NaN or Inf, a value outside its bounds, or a function that
                torch cannot differentiate, or whose signal or derivative is not finite.
        """
        theta = checked(theta, self.parameters)
        if len(theta) == 0:
            empty = np.zeros((0, self.n_samples, len(self.parameters)), dtype=np.complex128)
            return Fingerprints(theta, empty[..., 0], empty)

        def twice(θ: Tensor) -> tuple[Tensor, Tensor]:
            parts = self._parts(θ)
            return parts, parts

        jacobian, signal = self._many(jacfwd(twice, has_aux=True), theta, len(self.parameters) + 1)
        # (S, T, 2, P): real and imaginary parts next to each other make complex numbers.
        return Fingerprints(theta, _complex(signal), _complex(np.swapaxes(jacobian, 2, 3)))

    def signal(self, theta: ArrayLike) -> NDArray[np.complex128]:
        """The signal alone, shape (S, T); arguments and errors as for `simulate`."""
        theta = checked(theta, self.parameters)
        if len(theta) == 0:
            return np.zeros((0, self.n_samples), dtype=np.complex128)
        (signal,) = self._many(lambda θ: (self._parts(θ),), theta, 1)
        return _complex(signal)

    def _one(self, θ: Tensor) -> Tensor:
        signal = self.function(θ)
        if not isinstance(signal, Tensor) or signal.ndim != 1 or len(signal) == 0:
            got = f"the shape {tuple(signal.shape)}" if isinstance(signal, Tensor) else signal
            raise ValueError(
                f"expected a function that turns θ of shape ({len(self.parameters)},) into a "
                f"signal of shape (T,), a torch tensor; got {got}. Return one sample a time point."
            )
        return signal

    def _parts(self, θ: Tensor) -> Tensor:
        """Real and imaginary part of the signal, shape (T, 2)."""
        return torch.view_as_real(self._one(θ).to(torch.complex128))

    def _many(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], theta: NDArray[np.float64], n: int
    ) -> list[NDArray[np.float64]]:
        """A function of one θ for all, in chunks; n is what each result holds, in signals."""
        size = max(1, int(_CHUNK_BYTES / (16 * n * self.n_samples)))
        try:
            with _one_at_a_time:
                results = vmap(function, chunk_size=size)(torch.from_numpy(theta))
        except RuntimeError as error:
            raise ValueError(
                "expected a function that torch can batch and differentiate; got an error inside "
                f"it: {error}\nUse torch.where in place of `if` on values of θ, and no changes in "
                "place, .item() or numpy."
            ) from error
        arrays = [result.detach().numpy() for result in results]
        for array in arrays:
            bad = ~np.isfinite(array).reshape(len(theta), -1).all(axis=1)
            if bad.any():
                raise ValueError(
                    "expected a finite signal with finite derivatives; got NaN or Inf for "
                    f"{dict(zip(self.names, theta[bad][0].tolist(), strict=True))} (and "
                    f"{bad.sum() - 1} more). Narrow the parameters' bounds, or mind roots and "
                    "quotients at 0."
                )
        return arrays


def _inside(bounds: tuple[float, float]) -> float:
    """A value within bounds of which one or both may be infinite."""
    low, high = bounds
    if np.isfinite(low) and np.isfinite(high):
        return (low + high) / 2
    if np.isfinite(low):
        return low + 1.0
    return high - 1.0 if np.isfinite(high) else 0.5


def _complex(parts: NDArray[np.float64]) -> NDArray[np.complex128]:
    """(S, T, 2) to (S, T), or (S, T, P, 2) to (S, T, P)."""
    return np.ascontiguousarray(parts).view(np.complex128)[..., 0]
