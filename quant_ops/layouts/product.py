"""x @ W.T from the stored tensors of a weight: made ready once, and as ops that torch can trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy_kitchen.tensor.base import LAYOUTS, QuantizedTensor

from ...kernels.dispatch import Op, is_forced

REMEMBERED = 64  # numbers of rows of x that a product remembers
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


class Product:
    """x (..., K) @ W.T + bias in x's dtype, ready but for x and the bias: `op(x, *arguments,
    bias)`.

    What runs is remembered by what is left to depend on: rows and dtype of x, and whether there is
    a bias.
    """

    __slots__ = ("arguments", "bodies", "op", "qdata", "shape")

    def __init__(self, qdata: torch.Tensor, shape: tuple[int, int], op: Callable, arguments: tuple):
        self.qdata, self.shape, self.op, self.arguments = qdata, shape, op, arguments
        self.bodies: dict[tuple, Callable] = {}

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n, k = self.shape
        rows = x if x.dim() == 2 else x.reshape(-1, k)
        key = (len(rows), rows.dtype, bias is None)
        body = self.bodies.get(key)
        if body is None or is_forced():
            body = self._body(key, rows, bias)
        out = body(rows, bias)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], n)

    def _body(self, key: tuple, rows: torch.Tensor, bias: torch.Tensor | None) -> Callable:
        if not isinstance(self.op, Op):
            return lambda rows, bias: self.op(rows, *self.arguments, bias)
        body = self.op.ready(rows, *self.arguments, bias)
        if not is_forced():
            if len(self.bodies) >= REMEMBERED:
                self.bodies.clear()
            self.bodies[key] = body
        return body


class Prepared:
    """Where a weight's product is kept. It lies with the weight's side tensors, which are never
    replaced by others; whatever moves or copies a weight makes new side tensors.
    """

    __slots__ = ("product",)

    def __init__(self):
        self.product: Product | None = None

    def __reduce__(self) -> tuple:
        return Prepared, ()  # a deep copy of a weight makes its own


def own_product(weight: QuantizedTensor, shape: tuple[int, int]) -> Product:
    """The product of a weight in one of our layouts, logically (N, K); made anew for other codes or
    another shape.
    """
    qdata, params = weight._qdata, weight._params
    kept = params.prepared
    product = kept.product
    if product is None or product.qdata is not qdata or product.shape != shape:
        pieces = list(weight.layout_cls.stored(qdata, params).values())
        product = kept.product = weight.layout_cls.product(pieces, *shape)
    return product


def nobody_looks(tensor: torch.Tensor) -> bool:
    """Whether nothing traces or counts ops, so that the op's body can be called without its 7 us of
    bookkeeping.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


def runs_alone(x: torch.Tensor, product: Product, bias: torch.Tensor | None) -> bool:
    """Whether a product can be called as it is: all on one GPU, in a float of 16 bits, and nothing
    records, traces or counts.
    """
    return (
        type(x) is torch.Tensor
        and x.dtype in HALVES
        and x.device == product.qdata.device
        and (bias is None or (bias.dtype == x.dtype and bias.device == x.device))
        and x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


# a second copy of the pack in this process finds it defined
if not hasattr(torch.ops.fewbits, "dequantize"):

    @torch.library.custom_op("fewbits::dequantize", mutates_args=())
    def _dequantize(
        pieces: list[torch.Tensor], layout: str, n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Stored pieces of a layer -> contiguous (N, K) `dtype`. One op, so that torch.compile
        looks no further.
        """
        return LAYOUTS[layout].decode(pieces, n, k, dtype)

    @_dequantize.register_fake
    def _dequantize_fake(
        pieces: list[torch.Tensor], layout: str, n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return pieces[0].new_empty((n, k), dtype=dtype)

    @torch.library.custom_op("fewbits::linear", mutates_args=())
    def _linear_op(
        x: torch.Tensor,
        pieces: list[torch.Tensor],
        layout: str,
        n: int,
        k: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (..., K) @ W.T + bias from the stored pieces of W, in x's dtype."""
        return LAYOUTS[layout].product(pieces, n, k)(x, bias)

    @_linear_op.register_fake
    def _linear_fake(
        x: torch.Tensor,
        pieces: list[torch.Tensor],
        layout: str,
        n: int,
        k: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], n))
