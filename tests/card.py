"""Make-believe accelerators: tensors that say `card:0` or `card:1`, compute on the CPU, and refuse to meet each other
and the CPU's.

    with card() as device:
        graph = tcl.circuit_lasso(model.to(device), tokens)

They find what is left on the wrong device where there is no card. Of kernels, speed and rounding it tells nothing: the
numbers are the CPU's. The name is PyTorch's to give away once per process, so use it in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "card"
aten = torch.ops.aten

_COPIES = {aten._to_copy.default, aten.copy_.default}  # may cross
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_FROM_DATA = {torch.tensor, torch.as_tensor}  # read by PyTorch's own kernels, which the card has none of


class OnCard(Tensor):
    """A tensor on a card; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, index: int = 0) -> "OnCard":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, index),
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnCard({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return args[0].inner.tolist()
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert {args[0].device} device type tensor to numpy: use Tensor.cpu() first")
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


@contextmanager
def card() -> Iterator[torch.device]:
    """While it is open there are devices of the name "card"; the first of them."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
    with _Dispatch(), _FromData():
        yield torch.device(NAME, 0)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FROM_DATA and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _listless(args[1]), *args[2:])
        return func(*args, **kwargs)


def _listless(index: Any) -> Any:
    """Lists of numbers as tensors: PyTorch makes them with the same kernels."""
    if isinstance(index, tuple):
        return tuple(_listless(part) for part in index)
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    _refuse_mixtures(func, args, tensors, kwargs)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        index = (asked.index or 0) if asked.type == NAME else None
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        index = next((x.device.index for x in tensors if isinstance(x, OnCard)), None)
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]
    return tree_map(lambda x: OnCard(x, index) if isinstance(x, Tensor) and index is not None else x, out)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnCard) else x


def _refuse_mixtures(func: Any, args: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
    """The rules of a CUDA card: numbers (0-dimensional) of the CPU may join in and its indices select, copies cross."""
    on_card = [x for x in tensors if isinstance(x, OnCard)]
    asked = kwargs.get("device")
    generator = kwargs.get("generator")
    if generator is not None and (on_card or (asked is not None and torch.device(asked).type == NAME)):
        raise RuntimeError(f"Expected a 'card' device type for generator but found '{generator.device.type}' ({func})")
    if not on_card or func in _COPIES:
        return
    if func in _INDEXING and isinstance(args[0], OnCard):
        tensors = [x for x in args[2:3] if isinstance(x, Tensor)]
    left = [x for x in tensors if not isinstance(x, OnCard) and (x.ndim or (func in _INDEXING and x is args[0]))]
    left += [x for x in on_card if x.device != on_card[0].device]  # numbers of another card neither
    if left:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got one of shape {tuple(left[0].shape)} on "
            f"{left[0].device} beside one of shape {tuple(on_card[0].shape)} on {on_card[0].device}"
        )
