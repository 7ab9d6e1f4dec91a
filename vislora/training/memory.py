"""Bytes that a training step keeps for its gradients, counted on the meta device, where tensors have no memory.

The real modules run there, on shapes alone. Attention counts as the one kernel that GPUs have, which keeps no table of
all pairs of tokens (Dao et al., arXiv 2205.14135, section 3.1), and layers take what they get in the type of their
weights, as under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from vislora.models.quantized import statistics
from vislora.training.optim import ParameterGroup, make_optimizer


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output and a number per row; shapes (..., tokens, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("it is only counted")


class _AsOnGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            return _attend(*args, **options)
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            args = args[0].to(args[1].dtype), *args[1:]
        return func(*args, **options)


def _attend(query: Tensor, key: Tensor, value: Tensor, *masks: Any, **options: Any) -> Tensor:
    out: Tensor = _Attention.apply(query, key, value)
    return out


def kept_bytes(compute: Callable[[], Any], lasting: Iterable[Tensor]) -> int:
    """Return the bytes of all that autograd keeps of `compute`, each storage once, but the weights `lasting`."""
    weights = {tensor.untyped_storage()._cdata for tensor in lasting}
    kept: dict[int, Tensor] = {}  # held, so that no storage's number comes again

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), _AsOnGpu():
        result = compute()
    del result
    return sum(tensor.untyped_storage().nbytes() for number, tensor in kept.items() if number not in weights)


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state, which one of its steps on a parameter of each shape shows.

    Raises `ConfigError` as `make_optimizer` does.
    """
    shapes = [tuple(parameter.shape) for parameter in parameters]
    each = {shape: nn.Parameter(torch.zeros(shape)) for shape in shapes}
    for parameter in each.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(name, [ParameterGroup(each.values(), 1e-4)], 0.0)
    optimizer.step()
    sizes = {shape: _bytes(optimizer.state[parameter].values()) for shape, parameter in each.items()}
    return sum(sizes[shape] for shape in shapes)


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of `module`, and of what goes with quantised ones."""
    return _bytes([*module.parameters(), *module.buffers(), *statistics(module)])


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
