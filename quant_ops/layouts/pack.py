"""One layout per (format, options): a comfy_kitchen QuantizedTensor whose bytes are exactly the
format's own.

The layout's name carries the options (`FewBitsInt8Blockwise128`), because ComfyUI <= 0.26
requantizes by name alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from comfy_kitchen.tensor.base import (
    LAYOUTS,
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
    register_layout_op,
)

from ...kernels.dispatch import Op, is_forced
from ..errors import UnsupportedLayerError
from ..formats import Format, FormatOptions, get_format
from ..sources import DTYPE_NAMES
from ..spec import LayerInput

REMEMBERED = 64  # numbers of rows of x that a product remembers


class Product:
    """x (..., K) @ W.T + bias in x's dtype, ready but for x and the bias: `op(x, *arguments,
    bias)`.

    It lies with a weight's side tensors, which are never replaced by others, and is made anew for
    another `qdata` or `shape`; whatever moves or copies a weight makes new side tensors. What runs
    is remembered by what is left to depend on: rows and dtype of x, and whether there is a bias.
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

    def __reduce__(self) -> tuple:
        return type(None), ()  # a deep copy of a weight makes its own


class PackLayout(QuantizedLayout):
    """Base of our layouts. `qdata` is the stored weight; `Params` holds every stored side tensor,
    all as on disk.

    `SIDE` maps the name on disk to the field (`weight_scale` or `absmax` -> `scale`). `orig_shape`
    is the logical shape, (K, N) once `transposed`; `orig_dtype` what `dequantize` returns.
    """

    FORMAT: Format
    OPTIONS: FormatOptions
    SIDE: dict[str, str]

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: object = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        **kwargs: object,
    ) -> tuple[torch.Tensor, BaseLayoutParams]:
        """Quantize any 2-D float tensor with this layout's geometry; scales always come from the
        tensor.

        Args:
            tensor: (N, K); other ranks are flattened to two. Sizes that the format does not hold
                are zero-padded.
            scale: ignored: ComfyUI passes "recalculate", and a scale of another tensor would clip
                this one.
            stochastic_rounding: seed; 0 or None rounds to nearest even.
            inplace_ops, kwargs: accepted because ComfyUI passes them; the input is never changed.
        """
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor
        padded = _pad(rows, cls._stored_layer(tuple(rows.shape)).shape)
        grid = cls.FORMAT.grid(
            LayerInput(tuple(padded.shape), DTYPE_NAMES[padded.dtype]), cls.OPTIONS
        )
        padded = cls.FORMAT.prepare(padded, cls.OPTIONS)
        stored = cls.FORMAT.quantize(padded, grid, cls.OPTIONS, stochastic_rounding or 0)
        return stored["weight"], cls.params_of(stored, tensor.dtype, tuple(rows.shape))

    @classmethod
    def params_of(
        cls, stored: dict[str, torch.Tensor], orig_dtype: torch.dtype, orig_shape: tuple[int, ...]
    ) -> BaseLayoutParams:
        """Params from stored tensors by their names on disk; nothing is copied or converted."""
        side = {field: stored[suffix] for suffix, field in cls.SIDE.items()}
        return cls.Params(**side, orig_dtype=orig_dtype, orig_shape=orig_shape)

    @classmethod
    def stored(cls, qdata: torch.Tensor, params: BaseLayoutParams) -> dict[str, torch.Tensor]:
        """Name on disk -> tensor; the inverse of `params_of`."""
        return {
            "weight": qdata,
            **{suffix: getattr(params, field) for suffix, field in cls.SIDE.items()},
        }

    @classmethod
    def _stored_layer(cls, shape: tuple[int, ...]) -> LayerInput:
        n, k = shape
        step_n, step_k = cls.FORMAT.steps(cls.OPTIONS)
        return LayerInput((-(-n // step_n) * step_n, -(-k // step_k) * step_k), None)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: BaseLayoutParams) -> torch.Tensor:
        """Contiguous (N, K) in `orig_dtype`: float32 arithmetic, rounded once, padding cut off;
        never transposed.
        """
        n, k = params.orig_shape[::-1] if params.transposed else params.orig_shape
        pieces = list(cls.stored(qdata, params).values())
        if _nobody_looks(qdata):
            return cls.decode(pieces, n, k, params.orig_dtype)
        return torch.ops.fewbits.dequantize(pieces, cls.__name__, n, k, params.orig_dtype)

    @classmethod
    def decode(cls, pieces: list[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """What `fewbits::dequantize` computes; `pieces` are the weight and the side tensors in
        `SIDE` order.
        """
        stored = dict(zip(("weight", *cls.SIDE), pieces, strict=True))
        values = cls.FORMAT.dequantize_to(stored, cls._stored_layer((n, k)), cls.OPTIONS, dtype)
        return values[:n, :k].contiguous()

    @classmethod
    def product(cls, pieces: list[torch.Tensor], n: int, k: int) -> Product:
        """How x is multiplied by a weight; padded ones are decoded and cut."""
        layer, stored = (
            cls._stored_layer((n, k)),
            dict(zip(("weight", *cls.SIDE), pieces, strict=True)),
        )
        found = cls.FORMAT.product(stored, layer, cls.OPTIONS) if layer.shape == (n, k) else None
        return Product(pieces[0], (n, k), *(found or (cls._decoded, (pieces, n, k))))

    @classmethod
    def _decoded(
        cls,
        rows: torch.Tensor,
        pieces: list[torch.Tensor],
        n: int,
        k: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.nn.functional.linear(rows, cls.decode(pieces, n, k, rows.dtype), bias)

    @classmethod
    def rows(
        cls, qdata: torch.Tensor, params: BaseLayoutParams, index: torch.Tensor, dtype: torch.dtype
    ):
        """Decode only the rows that an embedding looks up; for formats whose scales are one, or one
        per row.

        Args:
            index: (M,) int64.

        Returns:
            (M, K) `dtype`, equal to those rows of `dequantize`.
        """
        n, k = params.orig_shape
        picked = {
            suffix: _take(tensor, index) if tensor.dim() and tensor.shape[0] == n else tensor
            for suffix, tensor in cls.stored(qdata, params).items()
        }
        return cls.FORMAT.dequantize_to(
            picked, LayerInput((index.numel(), k), None), cls.OPTIONS, dtype
        )

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return tuple(cls.stored(qtensor._qdata, qtensor._params).values())

    @classmethod
    def state_dict_tensors(
        cls, qdata: torch.Tensor, params: BaseLayoutParams
    ) -> dict[str, torch.Tensor]:
        """Suffix to append to `<layer>.weight`; names that do not start with `weight` get an
        underscore here.
        """
        return {
            name.removeprefix("weight") if name.startswith("weight") else f"_{name}": tensor
            for name, tensor in cls.stored(qdata, params).items()
        }

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        """False: ComfyUI would quantize activations with the weight's layout."""
        return False


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


def _make_layout(name: str, format: Format, options: FormatOptions) -> type[PackLayout]:
    """The layout class of one format with one set of options."""
    suffixes = [suffix for suffix in format.dtypes if suffix != "weight"]
    side = {suffixes[0]: "scale", **{suffix: suffix for suffix in suffixes[1:]}}
    tensors = list(side.values())
    params = dataclasses.make_dataclass(
        "Params",
        [*((field, torch.Tensor) for field in tensors[1:]), ("transposed", bool, False)],
        bases=(BaseLayoutParams,),
        namespace={"_tensor_fields": lambda self: list(tensors)},
        frozen=True,
    )
    return type(
        name, (PackLayout,), {"FORMAT": format, "OPTIONS": options, "SIDE": side, "Params": params}
    )


def _pad(rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    missing = shape[0] - rows.shape[0], shape[1] - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing[1], 0, missing[0])) if any(missing) else rows


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows by number; torch cannot index every 8-bit float type."""
    return (
        tensor.view(torch.uint8)[index].view(tensor.dtype)
        if tensor.itemsize == 1
        else tensor[index]
    )


def layout_name(format: Format, options: FormatOptions) -> str:
    """`int8_blockwise`, block_size 128 -> `FewBitsInt8Blockwise128`; `...Precise` where activations
    are left alone.
    """
    parts = [part[:1].upper() + part[1:] for part in format.name.split("_")]
    extras = [
        str(value).capitalize()
        for name, value in options.stated().items()
        if name in format.layout_options
    ]
    if options.full_precision_matrix_mult and not format.Options().full_precision_matrix_mult:
        extras.append("Precise")
    return "FewBits" + "".join(parts) + "".join(extras)


def register_layout(format_name: str, options: FormatOptions) -> str:
    """Make and register the layout class of a format with these options, once; returns its name."""
    format = get_format(format_name)
    name = layout_name(format, options)
    if name not in LAYOUTS:
        register_layout_class(name, _make_layout(name, format, options))
    return name


def _plain(value: object, dtype: torch.dtype) -> object:
    """A tensor in the input's dtype; a quantized one is dequantized straight to it."""
    if isinstance(value, QuantizedTensor):
        return value.to(dtype).dequantize()
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _nobody_looks(tensor: torch.Tensor) -> bool:
    """Whether nothing traces or counts ops, so that the op's body can be called without its 7 us of
    bookkeeping.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


def _is_own(value: object) -> bool:
    return isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, PackLayout)


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


def own_product(weight: QuantizedTensor) -> Product:
    """The product of a weight in one of our layouts; it lies with the weight's side tensors."""
    qdata, params = weight._qdata, weight._params
    shape = tuple(params.orig_shape)
    product = vars(params).get("product")
    if product is None or product.qdata is not qdata or product.shape != shape:
        pieces = list(weight.layout_cls.stored(qdata, params).values())
        product = vars(params)["product"] = weight.layout_cls.product(pieces, *shape)
    return product


@register_layout_op(torch.ops.aten.linear.default, PackLayout)
def _linear(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    bias = _plain(bias, x.dtype)
    if not _multiplies(x, weight) or weight._params.transposed:
        return torch.nn.functional.linear(_plain(x, x.dtype), _plain(weight, x.dtype), bias)
    return _product(x, weight, weight._params.orig_shape, bias)


def _multiplies(x: torch.Tensor, weight: object) -> bool:
    return not isinstance(x, QuantizedTensor) and _is_own(weight) and x.dtype in FLOATS


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear`, less the 8 us in which torch finds `_linear` where nothing
    records or traces.
    """
    if (
        torch.is_grad_enabled()
        or not _nobody_looks(x)
        or not _multiplies(x, weight)
        or weight._params.transposed
    ):
        return torch.nn.functional.linear(x, weight, bias)
    return _product(x, weight, weight._params.orig_shape, _plain(bias, x.dtype))


def _product(
    x: torch.Tensor, weight: QuantizedTensor, shape: tuple[int, int], bias: torch.Tensor | None
):
    qdata, params = weight._qdata, weight._params
    if not (_nobody_looks(x) and _nobody_looks(qdata)):
        cls = weight.layout_cls
        return torch.ops.fewbits.linear(
            x, list(cls.stored(qdata, params).values()), cls.__name__, *shape, bias
        )
    product = vars(params).get("product")
    if product is None or product.qdata is not qdata or product.shape != shape:
        pieces = list(weight.layout_cls.stored(qdata, params).values())
        product = vars(params)["product"] = weight.layout_cls.product(pieces, *shape)
    return product(x, bias)


@register_layout_op(torch.ops.aten.mm.default, PackLayout)
def _mm(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args
    # what a linear becomes where gradients are recorded
    if _multiplies(x, weight) and weight._params.transposed:
        return _product(x, weight, tuple(weight.shape[::-1]), None)
    return torch.mm(_plain(x, x.dtype), _plain(weight, x.dtype))


@register_layout_op(torch.ops.aten.addmm.default, PackLayout)
def _addmm(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, x, weight = args[:3]
    dtype = x.dtype
    if _multiplies(x, weight) and weight._params.transposed and bias.dim() == 1 and not kwargs:
        return _product(x, weight, tuple(weight.shape[::-1]), _plain(bias, dtype))
    return torch.addmm(*(_plain(value, dtype) for value in args[:3]), **kwargs)


@register_layout_op(torch.ops.aten.t.default, PackLayout)
def _t(qt: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = qt._params
    flipped = dataclasses.replace(
        params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed
    )
    return QuantizedTensor(qt._qdata, qt._layout_cls, flipped)


@register_layout_op(torch.ops.aten.view.default, PackLayout)
def _view(qt: QuantizedTensor, args: tuple, kwargs: dict) -> torch.Tensor:
    """Decoded values; those of a transposed weight lie in columns, which only `reshape` brings into
    rows.
    """
    return args[0].dequantize().reshape(args[1])


def _refuse_in_place(qt: object, args: tuple, kwargs: dict) -> None:
    raise UnsupportedLayerError(
        "a quantized weight cannot be changed in place: the change would be lost. Dequantize it, "
        "change the copy and quantize again (ComfyUI's set_weight does)"
    )


def _in_place_ops() -> Iterator[torch._ops.OpOverload]:
    """Every aten op that writes into its first argument; `copy_` has a handler, `detach_` changes
    no value.
    """
    for name in torch._C._dispatch_get_all_op_names():
        space, _, name = name.partition("::")
        packet, _, overload = name.partition(".")
        if (
            space != "aten"
            or not packet.endswith("_")
            or packet in ("copy_", "detach_", "requires_grad_")
        ):
            continue
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        arguments = op._schema.arguments if op else ()  # torch lists some that Python cannot call
        if arguments and arguments[0].alias_info and arguments[0].alias_info.is_write:
            yield op


# The generic fallback would change a dequantized copy and drop it.
for _op in _in_place_ops():
    register_layout_op(_op, PackLayout)(_refuse_in_place)
