"""x @ W.T from the stored tensors of a weight: made ready once, and as ops that torch can trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
        k = self.shape[1]
        if x.shape[-1] != k:
            raise _misfit(x, *self.shape)
        key = (x.numel() // k, x.dtype, bias is None)
        body = self.bodies.get(key)
        if body is None or is_forced():
            body = self.body(x, bias)
            if not is_forced():
                if len(self.bodies) >= REMEMBERED:
                    self.bodies.clear()
                self.bodies[key] = body
        return body(x, bias)

    def body(self, x: torch.Tensor, bias: torch.Tensor | None) -> Callable:
        """What multiplies any x of so many rows and this dtype; one that was made ready knows
        addresses alone, and has `keeps`.
        """
        rows = x.reshape(-1, self.shape[1])
        ready = self.op.ready(rows, *self.arguments, bias) if isinstance(self.op, Op) else None
        return ready or self._by_rows

    def _by_rows(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n, k = self.shape
        out = self.op(x.reshape(-1, k), *self.arguments, bias)
        return out.view(*x.shape[:-1], n)


def _misfit(x: torch.Tensor, n: int, k: int) -> RuntimeError:
    """What torch raises, for products that would read memory as rows of any length."""
    return RuntimeError(f"x is {list(x.shape)}, its rows are not those of a weight of {n}x{k}")


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


# layout of comfy-kitchen's -> what makes a product of (layout, pieces, N, K, span)
PRODUCTS: dict[str, Callable[[str, list[torch.Tensor], int, int, int], Product]] = {}
# what multiplies pieces that lie at certain addresses: right as long as a call names them again
_AT: dict[tuple, Callable] = {}
MOST_AT = 16384  # a model has a few hundred layers, each a few numbers of rows


def multiply_at(
    x: torch.Tensor,
    pieces: list[torch.Tensor],
    layout: str,
    n: int,
    k: int,
    span: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x (..., K) @ W.T + bias of a weight whose tensor comes anew at each call, from a compiler or
    from DynamicVRAM: what was made ready is found again by the addresses of its pieces.
    """
    if x.shape[-1] != k:
        raise _misfit(x, n, k)
    key = (layout, n, k, span, x.numel() // k, x.dtype, bias is None)
    key += tuple([(piece.data_ptr(), piece.numel()) for piece in pieces])
    body = _AT.get(key)
    if body is None or is_forced():
        make = PRODUCTS.get(layout, _own_from)
        body = make(layout, pieces, n, k, span).body(x, bias)
        # one that keeps copies of pieces would outlive what they are copies of
        if getattr(body, "keeps", None) == () and not is_forced():
            if len(_AT) >= MOST_AT:
                _AT.clear()
            _AT[key] = body
    return body(x, bias)


def _own_from(layout: str, pieces: list[torch.Tensor], n: int, k: int, span: int) -> Product:
    return LAYOUTS[layout].product(pieces, n, k)


class Traced(NamedTuple):
    """A weight as `fewbits::linear` takes it.

    Attributes:
        pieces: codes and side tensors.
        layout: what they are.
        n, k: logical shape.
        span: columns rotated together; 0 where none are.
    """

    pieces: tuple[torch.Tensor, ...]
    layout: str
    n: int
    k: int
    span: int


def multiply_traced(x: torch.Tensor, weight: Traced, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., K) @ W.T + bias, rounded to x's dtype, as one op, which compilers follow."""
    pieces, layout, n, k, span = weight
    bias = bias if bias is None else bias.to(x.dtype)
    return torch.ops.fewbits.linear(x, list(pieces), layout, n, k, span, bias)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is torch's own, not one that something traces with."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def nobody_looks(tensor: torch.Tensor) -> bool:
    """Whether nothing traces or counts ops, so that the op's body can be called without its 7 us of
    bookkeeping.
    """
    return (
        not torch.compiler.is_compiling()
        and is_plain(tensor)
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

    _LIBRARY = torch.library.Library("fewbits", "FRAGMENT")
    _LIBRARY.define(
        "linear(Tensor x, Tensor[] pieces, str layout, int n, int k, int span, Tensor? bias)"
        " -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    @torch.library.impl(_LIBRARY, "linear", "CompositeExplicitAutograd")
    def _linear_op(
        x: torch.Tensor,
        pieces: list[torch.Tensor],
        layout: str,
        n: int,
        k: int,
        span: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (..., K) @ W.T + bias from the stored pieces of W, in x's dtype."""
        return multiply_at(x, pieces, layout, n, k, span, bias)

    @torch.library.register_fake("fewbits::linear", lib=_LIBRARY)
    def _linear_fake(
        x: torch.Tensor,
        pieces: list[torch.Tensor],
        layout: str,
        n: int,
        k: int,
        span: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], n))

    _LIBRARY.define(
        "multiply(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    @torch.library.impl(_LIBRARY, "multiply", "CompositeExplicitAutograd")
    def _multiply_op(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x (..., K) @ W.T + bias; layouts say what it is for a quantized weight."""
        return torch.nn.functional.linear(x, weight, bias)

    @torch.library.register_fake("fewbits::multiply", lib=_LIBRARY)
    def _multiply_fake(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
