"""What a step sees: samples with a random M0 and noise, and what the first layer takes (§2.4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fisherprint.network import Network
from fisherprint.train.config import Samples, TrainingConfig

Tensors = Sequence[Tensor]
"""Coefficients, θ, bound and known parameters, each with the axis S first."""


def augment(
    coefficients: Tensor,
    crb: Tensor,
    config: TrainingConfig,
    generator: Generator,
    *,
    noises: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    r"""Random M0 and noise for each sample, with the bound that goes with them (§2.4).

        c' = M0 c + ε,   |M0| ~ U(scale_range),  arg M0 ~ U(0, 2π),  Re ε, Im ε ~ N(0, σ²)
        CRB' = (σ/|M0|)² CRB

    The basis is orthonormal, so coefficients have the noise of the signal.

    Args:
        coefficients: c for M0 = 1, shape (S, K), complex.
        crb: bound for σ = |M0| = 1, shape (S, E).
        config: `scale_range` and σ = `noise_std`.
        generator: on the device of the tensors.
        noises: (N,) for N draws of the noise with each sample's M0; () for one, without an axis.

    Returns:
        c', shape (S, K) or (S, N, K), and CRB', shape (S, E).
    """

    def uniform() -> Tensor:
        return torch.rand((len(crb), 1), generator=generator, dtype=crb.dtype, device=crb.device)

    low, high = config.scale_range
    scale = low + (high - low) * uniform()
    phase = 2 * torch.pi * uniform()
    n_samples, rank = coefficients.shape
    noise = torch.randn(
        (n_samples, *noises, rank, 2),
        generator=generator,
        dtype=crb.dtype,
        device=crb.device,
    )
    scaled = torch.polar(scale, phase) * coefficients
    if noises:
        scaled = scaled[:, None]
    noisy = scaled + config.noise_std * torch.view_as_complex(noise)
    return noisy, crb * (config.noise_std / scale).square()


def extra_inputs(
    config: TrainingConfig,
    coefficients: NDArray[Any],
    known: NDArray[np.float64],
    *,
    noise_std: float,
) -> NDArray[np.float64]:
    """What a network of this config is given beside the coefficients, shape (..., n).

    Args:
        config: `inputs` and `snr_input`.
        coefficients: x, shape (..., K).
        known: the parameters that `inputs` names, shape (..., len(inputs)) or such that it
            becomes this by repetition.
        noise_std: σ of the coefficients' real and imaginary part each.
    """
    columns = [np.broadcast_to(known, (*coefficients.shape[:-1], len(config.inputs)))]
    if config.snr_input:
        # Without signal there is no estimate, and this is -Inf.
        with np.errstate(divide="ignore"):
            norm = np.linalg.norm(coefficients, axis=-1, keepdims=True)
            columns.append(np.log(norm / noise_std))
    return np.concatenate(columns, axis=-1)


def to_tensors(samples: Samples, config: TrainingConfig) -> Tensors:
    """Samples in single precision; coefficients are free of noise, for M0 = 1."""
    chosen, known = samples.select(config.estimated), samples.select(config.inputs)
    arrays = (chosen.coefficients, chosen.theta, chosen.crb, known.theta)
    kinds = (np.complex64, np.float32, np.float32, np.float32)
    return [
        torch.as_tensor(np.array(array, dtype=kind))
        for array, kind in zip(arrays, kinds, strict=True)
    ]


def augmented(
    clean: Tensors,
    config: TrainingConfig,
    generator: Generator,
    *,
    noises: tuple[int, ...] = (),
) -> Tensors:
    """The same with an M0 and noise."""
    coefficients, theta, crb, known = clean
    coefficients, crb = augment(coefficients, crb, config, generator, noises=noises)
    return coefficients, theta, crb, known


def batches(clean: Tensors, config: TrainingConfig, generator: Generator) -> Iterator[Tensors]:
    """The steps of an epoch: all fingerprints in a new order, with M0 and noise."""
    n_samples = len(clean[0])

    def order() -> tuple[Tensor, ...]:
        shuffled = torch.randperm(n_samples, generator=generator, device=generator.device)
        return torch.split(shuffled, config.fingerprints)

    if config.noises:
        # All noises of an epoch would not fit into memory.
        for part in order():
            some = [tensor[part] for tensor in clean]
            yield augmented(some, config, generator, noises=config.noises)
    else:
        noisy = augmented(clean, config, generator)
        for part in order():
            yield [tensor[part] for tensor in noisy]


def first_layer_inputs(
    network: Network, coefficients: Tensor, known: Tensor, config: TrainingConfig
) -> Tensor:
    """What the first layer sees of coefficients (S, K) or (S, N, K), one row each."""
    flat = coefficients.flatten(0, -2)
    extra = [known.repeat_interleave(math.prod(coefficients.shape[1:-1]), dim=0)]
    if config.snr_input:
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        extra.append((norm / config.noise_std).log())
    return network.features(flat, torch.cat(extra, dim=1))
