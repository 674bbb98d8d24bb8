"""Tensors of device `cuda:0` that keep their values on the CPU, and what a GPU would say of each operation on them.

FakeTensor has shapes without values, so it cannot decode, and it lets a tensor of the CPU be indexed by one of the GPU.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from fake_cuda.device import CUDA

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim}
"""Operations that bring a value to the host, which waits for all that was asked of the device before."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class OnCuda(torch.Tensor):
    """Usable inside `FakeCuda` only."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnCuda:
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )
        tensor.values = values
        return tensor

    def tolist(self) -> Any:
        """torch's own is not for subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{function} outside of FakeCuda")


class FakeCuda(TorchDispatchMode):
    """Runs operations on `OnCuda` tensors; raises RuntimeError where two devices meet in one, as a GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """What the host waited for, as "operation in file:function", and how often."""

    def __enter__(self) -> Any:
        # torch.tensor(..., device=...) makes its values on the CPU and has this mode move them.
        self._lifted_before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted_before)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = list(_tensors((args, *kwargs.values())))
        operation, device = function.overloadpacket, kwargs.get("device")
        if operation in (aten.is_pinned, aten._pin_memory):
            return args[0] if operation is aten._pin_memory else False
        is_on_cuda = any(isinstance(each, OnCuda) for each in given)
        if is_on_cuda and operation not in COPIES:
            _demand_one_device(function, args, given)
        if _waits(operation, args, kwargs, given):
            self.waits[f"{operation.__name__} in {_place()}"] += 1
        if device is not None:
            is_result_on_cuda = torch.device(device).type == CUDA.type
            kwargs["device"] = torch.device("cpu")
        else:
            is_result_on_cuda = isinstance(args[0], OnCuda) if operation is aten.copy_ else is_on_cuda
        result = function(
            *_mapped(args, OnCuda, _values), **{name: _mapped(each, OnCuda, _values) for name, each in kwargs.items()}
        )
        if operation is aten.copy_:
            return args[0]
        if not is_result_on_cuda:
            # A copy to the host is one even where the values were there.
            return result.clone() if operation is aten._to_copy and is_on_cuda else result
        wrapped = _mapped(result, torch.Tensor, OnCuda)
        return return_and_correct_aliasing(function, args, kwargs, wrapped) if is_on_cuda else wrapped


def on_cuda(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy on fake CUDA, its parameters in `dtype` and its buffers in their own, as DeepSpeed leaves them."""
    twins: dict[int, torch.Tensor] = {}
    for buffer in model.buffers():
        twins[id(buffer)] = buffer.detach().to(CUDA)
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(parameter.detach().to(CUDA, dtype), parameter.requires_grad)
    return copy.deepcopy(model, twins)


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _mapped(argument: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`argument`, or a list in it, with every tensor of `kind` changed. torch's own tree_map takes most of the time."""
    if isinstance(argument, kind):
        return change(argument)
    if isinstance(argument, list | tuple):
        return type(argument)(_mapped(each, kind, change) for each in argument)
    return argument


def _values(tensor: OnCuda) -> torch.Tensor:
    return tensor.values


def _demand_one_device(function: Any, args: Any, given: list[torch.Tensor]) -> None:
    """Tensors of the host are let in as single numbers, and as indices of a tensor on the GPU."""
    strangers = [each for each in given if not isinstance(each, OnCuda)]
    if function.overloadpacket in INDEXED:
        if not isinstance(args[0], OnCuda):
            raise RuntimeError(
                f"{function}: indices should be either on cpu or on the same device as the indexed tensor"
            )
    elif any(each.ndim for each in strangers):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")


def _waits(operation: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> bool:
    """Whether the host waits for the GPU."""
    if operation in COPIES:
        source, target = (args[1], args[0].device) if operation is aten.copy_ else (args[0], kwargs.get("device"))
        if target is None or torch.device(target).type == source.device.type:
            return False
        has_promise = kwargs.get("non_blocking") or (operation is aten.copy_ and len(args) > 2 and args[2])
        return isinstance(source, OnCuda) or not has_promise
    if not any(isinstance(each, OnCuda) for each in given):
        return False
    if operation in INDEXED:
        # Masks are turned into indices, and indices of the host are copied.
        indices = [each for each in args[1] if each is not None]
        return any(each.dtype == torch.bool or not isinstance(each, OnCuda) for each in indices)
    return operation in READS or function_repeats(operation, kwargs)


def function_repeats(operation: Any, kwargs: Any) -> bool:
    """`repeat_interleave` with a tensor of repeats has to know their sum."""
    return operation is aten.repeat_interleave and kwargs.get("output_size") is None


def _place() -> str:
    """The innermost function of the package, or else of a library, that asked for the operation."""
    frame: Any = sys._getframe(2)
    library = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("coconut_ds."):
            return f"{name.removeprefix('coconut_ds.')}:{frame.f_code.co_name}"
        if name.startswith("transformers.") and not library:
            library = f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return library or "torch"
