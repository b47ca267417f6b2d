"""A network as an ONNX model, which runs without Python, torch and fisherprint (decision 027)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fisherprint import inference
from fisherprint.network import SKIPS, Network

# The first with the axes of all reductions as inputs; runtimes since early 2023 have it.
_OPSET, _IR_VERSION = 18, 8


def as_onnx(network: Network, metadata: Mapping[str, str]) -> bytes:
    """The network in evaluation mode as a serialized ONNX model in float32.

    ONNX knows no complex numbers. B is free:

    | name | shape | |
    |---|---|---|
    | `coefficients` | (B, 2K) | input: K real parts, then K imaginary parts, of any scale |
    | `extra` | (B, n) | input of a network that has some beside the coefficients |
    | `estimates` | (B, E) | output: parameters in SI units; NaN for zeros, NaN or Inf |

    Args:
        network: on any device, with any option.
        metadata: what the model is to say of itself, by key.

    Raises:
        ModuleNotFoundError: onnx is not installed.
    """
    onnx = _package()
    network = Network.from_weights({k: v.cpu() for k, v in network.state_dict().items()})
    graph = _Graph(onnx)
    width, n_extra = 2 * network.rank, network.n_extra
    x, usable = _features(graph, network)

    kept = {0: x if n_extra == 0 else graph("Slice", x, [0], [width], [1])}
    layers = inference.layers(network.linear[:-1], network.norm, "float32")
    for number, layer in enumerate(layers, start=1):
        y = graph("Gemm", x, np.asarray(layer.weight), layer.bias)
        if number in SKIPS:
            skip = kept[SKIPS[number]]
            if SKIPS[number] == 0 and layer.group:
                groups = graph("Reshape", skip, [-1, width // layer.group, layer.group])
                mean = graph("ReduceMean", groups, [2])
                skip = graph("Reshape", graph("Sub", groups, mean), [-1, width])
            y = graph("Add", y, skip)
        kept[number] = y
        if layer.group:
            n_out = len(layer.bias)
            groups = graph("Reshape", y, [-1, n_out // layer.group, layer.group])
            square = graph("ReduceMean", graph("Mul", groups, groups), [2])
            rms = graph("Sqrt", graph("Add", square, np.float32(layer.epsilon)))
            y = graph("Reshape", graph("Div", groups, rms), [-1, n_out])
        x = graph("Relu", graph("Add", graph("Mul", y, layer.scale), layer.shift))
    weights = network.state_dict()
    last = (weights[f"linear.{len(layers)}.{part}"] for part in ("weight", "bias"))
    y = graph("Gemm", x, *(_numbers(values).T for values in last))
    # A runtime's ReLU may make zeros of NaN.
    graph("Where", usable, _in_units(graph, network, y), np.float32(np.nan), out="estimates")
    return graph.serialized(
        {"coefficients": width} | ({"extra": n_extra} if n_extra else {}),
        {"estimates": len(network.output_mean)},
        metadata,
    )


def _features(graph: _Graph, network: Network) -> tuple[str, str]:
    """What the first layer sees, and for which rows it is finite, (B, 1)."""
    # Divided by the sum of magnitudes first: squares of small or large scales leave float32.
    total = graph("ReduceSum", graph("Abs", "coefficients"), [1])
    c = graph("Div", "coefficients", total)
    if network.without_phase is not None:
        c = _first_real(graph, c, network.rank)
    x = graph("Div", c, graph("ReduceL2", c, [1]))
    # One for finite sums but zero, else NaN.
    one = graph("Div", total, total)
    if network.extra_inputs is not None:
        mean, spread = _numbers(network.extra_inputs)
        scaled = graph("Div", graph("Sub", "extra", mean), spread)
        x = graph("Concat", x, scaled, axis=1)
        one = graph("Add", one, graph("ReduceSum", graph("Mul", "extra", np.float32(0)), [1]))
    return x, graph("Equal", one, np.float32(1))


def _first_real(graph: _Graph, c: str, rank: int) -> str:
    """The coefficients turned so that the first is real and positive, or zero."""
    re, im = (graph("Slice", c, [k * rank], [(k + 1) * rank], [1]) for k in range(2))
    first = [graph("Slice", part, [0], [1], [1]) for part in (re, im)]
    size = graph("Sqrt", graph("Add", *(graph("Mul", part, part) for part in first)))
    none = graph("Equal", size, np.float32(0))
    cos, sin = (
        graph("Where", none, np.float32(without), graph("Div", part, size))
        for part, without in zip(first, (1, 0), strict=True)
    )
    turned_re = graph("Add", graph("Mul", re, cos), graph("Mul", im, sin))
    turned_im = graph("Sub", graph("Mul", im, cos), graph("Mul", re, sin))
    return graph("Concat", turned_re, turned_im, axis=1)


def _in_units(graph: _Graph, network: Network, y: str) -> str:
    """Mean + spread·y, or the logistic function with this tangent at y = 0."""
    mean, spread = _numbers(network.output_mean), _numbers(network.output_spread)
    if network.output_range is None:
        return graph("Add", mean, graph("Mul", spread, y))
    low, high = _numbers(network.output_range)
    width = high - low
    p = (mean - low) / width
    at_zero, slope = np.log(p / (1 - p)), spread / (width * p * (1 - p))
    share = graph("Sigmoid", graph("Add", at_zero, graph("Mul", slope, y)))
    return graph("Add", low, graph("Mul", width, share))


class _Graph:
    """Nodes and constants of an ONNX graph; a call adds a node and returns its output's name."""

    def __init__(self, onnx: ModuleType) -> None:
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._names = (f"v{number}" for number in itertools.count())

    def __call__(
        self,
        operator: str,
        *inputs: str | NDArray[Any] | np.float32 | list[int],
        out: str | None = None,
        **attributes: int,
    ) -> str:
        """Inputs are names, float32 constants, or lists of integers."""
        names = [name if isinstance(name, str) else self._constant(name) for name in inputs]
        out = next(self._names) if out is None else out
        self._nodes.append(self._onnx.helper.make_node(operator, names, [out], **attributes))
        return out

    def serialized(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], metadata: Mapping[str, str]
    ) -> bytes:
        """The model with these inputs and outputs, (B, width), checked."""
        helper = self._onnx.helper
        ends = [
            [
                helper.make_tensor_value_info(name, self._onnx.TensorProto.FLOAT, ["B", width])
                for name, width in tensors.items()
            ]
            for tensors in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "fisherprint", *ends, self._constants)
        model = helper.make_model(
            graph,
            producer_name="fisherprint",
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
        )
        helper.set_model_props(model, dict(metadata))
        self._onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    def _constant(self, value: NDArray[Any] | np.float32 | list[int]) -> str:
        array = np.array(value, dtype=np.int64 if isinstance(value, list) else np.float32)
        name = next(self._names)
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name


def _numbers(values: torch.Tensor) -> NDArray[np.float32]:
    return values.detach().float().numpy()


def _package() -> ModuleType:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ONNX models are written with the package onnx, which is not installed. "
            'Install it: pip install "fisherprint[onnx]"'
        ) from error
    return onnx
