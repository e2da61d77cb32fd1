"""Seam `layers`: ComfyUI's layers read, run, patch and save our formats.

Wraps: `comfy.ops.mixed_precision_ops`, and subclasses the Linear, Embedding and MoEExperts that it
    returns. Every format that is not ours is `super()`'s, but for products that are faster by us.
Why: the loading of a quantized layer is a chain of ComfyUI's own formats; a registered name alone
    is refused at its end. Embedding tables that an older ComfyUI would read as plain numbers (all
    up to 0.20, INT8 up to 0.28) are read here, and a LoRA on a quantized table takes effect.
Since: ComfyUI 0.8.
Without it: `ValueError: Unsupported quantization format: bnb_nf4` for a file of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from ....quant_ops.checkpoint.metadata import parse_marker
from ....quant_ops.checkpoint.reader import tensor_text
from ....quant_ops.errors import CheckpointError, UnsupportedLayerError
from ....quant_ops.formats import FORMATS, get_format
from ....quant_ops.formats.base import is_precise
from ....quant_ops.layouts import (
    HALVES,
    Product,
    Traced,
    linear,
    linear_native,
    multiplies_layout,
    multiply_traced,
    product_of,
    runs_alone,
    traced,
)
from ....quant_ops.sources import spec_of
from ....quant_ops.spec import LayerInput
from ..compat import embedding_reads, weight_only_path
from .formats import OWNED, layout_of
from .wrap import wrap


def install() -> None:
    wrap(comfy.ops, "mixed_precision_ops", _subclassed)


def _subclassed(original: Callable, *args: object, **kwargs: object) -> type:
    ops = original(*args, **kwargs)
    core = getattr(ops, "Embedding", None)
    for name, mixin in MIXINS.items():
        if hasattr(ops, name):
            setattr(ops, name, type(name, (mixin, getattr(ops, name)), {}))
    ops.Embedding._fewbits_core, ops.Embedding._fewbits_dtype = core, ops._compute_dtype
    return ops


def _marker(state_dict: dict, prefix: str) -> dict | None:
    """The layer's marker if it names a format that we know."""
    data = state_dict.get(f"{prefix}comfy_quant")
    if data is None:
        return None
    try:
        marker = parse_marker(prefix.rstrip("."), tensor_text(data))
    except CheckpointError:
        return None  # ComfyUI reports it in its own way
    if marker.get("format") in FORMATS:
        return marker
    return None


def _own_marker(state_dict: dict, prefix: str) -> dict | None:
    """The layer's marker if it names a format of ours."""
    marker = _marker(state_dict, prefix)
    if marker and marker["format"] in OWNED:
        return marker
    return None


class OwnFormats:
    """Mixed in before ComfyUI's layers: loads, saves and requantizes our formats; all others are
    `super()`'s.
    """

    _fewbits_marker: torch.Tensor | None = None

    def _fewbits_load(
        self,
        marker: dict,
        state_dict: dict,
        prefix: str,
        shape: tuple[int, int],
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        """Take weight, side tensors and marker out of the state dict and make them the weight."""
        layer = prefix.rstrip(".")
        format = get_format(marker["format"])
        expected = LayerInput(shape, None)
        wanted = (*format.dtypes, "comfy_quant")
        stored = {suffix: state_dict.pop(f"{prefix}{suffix}", None) for suffix in wanted}
        stored = {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}
        specs = {suffix: spec_of(suffix, tensor) for suffix, tensor in stored.items()}
        try:
            options = format.options_from(marker, specs)
        except CheckpointError as error:
            raise CheckpointError(f"layer '{layer}': {error}; try `fewbits repair`") from None
        if tuple(specs["weight"].shape) != tuple(
            format.tensor_specs(expected, options)["weight"][1]
        ):
            raise UnsupportedLayerError(
                f"layer '{layer}': weight is {list(specs['weight'].shape)}, the model needs "
                f"{list(shape)} in {format.name}; "
                "the file belongs to another model, or was packed wrongly"
            )
        self.layout_type = layout_of(format.name, options)
        self.quant_format = format.name
        self._full_precision_mm_config = is_precise(marker)
        stored = {suffix: tensor.to(device=device) for suffix, tensor in stored.items()}
        params = get_layout_class(self.layout_type).params_of(stored, dtype, shape)
        self.weight = _parameter(QuantizedTensor(stored["weight"], self.layout_type, params))
        self._fewbits_marker = torch.frombuffer(
            bytearray(json.dumps(marker).encode()), dtype=torch.uint8
        )

    def _fewbits_load_rest(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *others
    ) -> None:
        """The bias. Not by super(): ComfyUI's body would look for a weight."""
        torch.nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, *others
        )
        if f"{prefix}weight" in missing_keys:
            missing_keys.remove(f"{prefix}weight")

    def _is_own(self) -> bool:
        return self._fewbits_marker is not None and isinstance(self.weight, QuantizedTensor)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if not self._is_own():
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        destination = {} if destination is None else destination
        bias = getattr(self, "bias", None)
        if bias is not None:
            destination[f"{prefix}bias"] = bias
        weight = self.weight
        stored = get_layout_class(self.layout_type).stored(weight._qdata, weight._params)
        destination.update({f"{prefix}{suffix}": tensor for suffix, tensor in stored.items()})
        destination[f"{prefix}comfy_quant"] = self._fewbits_marker
        return destination

    def _fewbits_convert(self, weight, inplace=False, **kwargs):
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize()
        return weight

    def _fewbits_set(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        # The LoRA's dtype may differ from the layer's; without .to() every later forward would
        # dequantize.
        new = QuantizedTensor.from_float(weight, self.layout_type, stochastic_rounding=seed).to(
            self.weight.dtype
        )
        if return_weight:
            return new
        self.weight = _parameter(new)
        return None


_every_op = getattr(comfy.ops, "run_every_op", lambda: None)  # ends a run that was interrupted


class OwnLinear(OwnFormats):
    """Mixed in before Linear: our formats, and products of ComfyUI's own where ours are faster."""

    # activations are rounded though `_full_precision_mm` is set: not by ComfyUI's wish or the
    # file's, but by us, or because this GPU has no units for ComfyUI's product
    _fewbits_rounds = False
    comfy_force_cast_weights = False  # ComfyUI sets it where a layer must be cast at each call
    # what a LoRA adds to the output: seam `low_rank`
    _fewbits_low_rank = None
    # what multiplies, as far as it is known: (weight, codes, product or None)
    _fewbits_ready: tuple = (None, None, None)
    # the weight as plain tensors: a compiled model asks a quantized one three times what it is made
    # of, 40 us of Python at each call
    _fewbits_traced: Traced | None = None

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._fewbits_trace()

    def _apply(self, *args, **kwargs):  # what .to() does
        moved = super()._apply(*args, **kwargs)
        self._fewbits_trace()
        return moved

    def _fewbits_trace(self) -> None:
        weight = self._parameters.get("weight")
        found = traced(weight) if isinstance(weight, QuantizedTensor) else None
        self.__dict__["_fewbits_traced"] = found

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        marker = _own_marker(state_dict, prefix)
        if marker is None:
            asked = getattr(self, "_full_precision_mm", False)
            super()._load_from_state_dict(state_dict, prefix, *others)
            asked = asked or getattr(self, "_full_precision_mm_config", False)
            self._fewbits_rounds = not asked
            return
        shape = (self.out_features, self.in_features)
        self._fewbits_load(marker, state_dict, prefix, shape, **self.factory_kwargs)
        self._fewbits_rounds = not self._full_precision_mm and not weight_only_path()
        if self._full_precision_mm_config or not weight_only_path():
            # older ComfyUI would quantize activations with our weight layout
            self._full_precision_mm = True
        self._fewbits_load_rest(state_dict, prefix, *others)

    def forward(self, input, *args, **kwargs):
        low_rank, compiling = self._fewbits_low_rank, torch.compiler.is_compiling()
        product = None if compiling else self._fewbits_product(input)
        if compiling and self._fewbits_follows(input):
            out = multiply_traced(input, self._fewbits_traced, self.bias)
        elif product is not None:
            _every_op()
            out = product(input, self._parameters.get("bias"))
        elif self._fewbits_is_ours(input):
            out = self._fewbits_cast(input)
        else:
            out = super().forward(input, *args, **kwargs)
        if low_rank is None:
            return out
        return low_rank(input, out)

    def _fewbits_product(self, x: torch.Tensor) -> Product | None:
        """What multiplies x where nothing is to be cast, patched, traced or recorded; else None.

        ComfyUI takes 20 us of Python to find that out. `_v` is DynamicVRAM's: the weight may not be
        there yet.
        """
        state, parts = self.__dict__, self._parameters
        weight, bias = parts.get("weight"), parts.get("bias")
        if not isinstance(weight, QuantizedTensor):
            return None
        known, codes, product = self._fewbits_ready
        if known is not weight or weight._qdata is not codes:
            product = product_of(weight)
            state["_fewbits_ready"] = (weight, weight._qdata, product)
        if product is None or "_v" in state or not runs_alone(x, product, bias):
            return None
        if self._fewbits_as_it_is():
            return product
        return None

    def _fewbits_as_it_is(self) -> bool:
        """Whether nothing changes weight, bias or input, and activations may be rounded."""
        if self.weight_function or self.bias_function or self.comfy_force_cast_weights:
            return False
        if self._full_precision_mm and not self._fewbits_rounds:
            return False
        if torch.compiler.is_compiling():  # to follow `_parameters` is to take all that lie there
            before = getattr(self, "input_scale", None)
            smoothing = getattr(self, "pre_quant_scale", None)
        else:
            parts = self._parameters
            before, smoothing = parts.get("input_scale"), parts.get("pre_quant_scale")
        return before is None and smoothing is None

    def _fewbits_is_ours(self, x: torch.Tensor) -> bool:
        """Whether we multiply a weight in a layout of comfy-kitchen's that ComfyUI has still to
        bring, or that a compiler follows.
        """
        layout = getattr(self, "layout_type", None)
        return (
            layout is not None
            and self._fewbits_marker is None
            and x.dtype in HALVES
            and x.is_cuda
            and not torch.is_grad_enabled()
            and multiplies_layout(layout, x.device.index)
            and self._fewbits_as_it_is()
        )

    def _fewbits_follows(self, x: torch.Tensor) -> bool:
        """Whether a compiler can take the weight's plain tensors: they lie where x does, nothing
        casts, patches or records.
        """
        if self._fewbits_traced is None or hasattr(self, "_v") or torch.is_grad_enabled():
            return False
        codes, bias = self._fewbits_traced.pieces[0], self.bias
        return (
            codes.device == x.device
            and (bias is None or bias.device == x.device)
            and (self._fewbits_marker is not None or self._fewbits_is_ours(x))
            and self._fewbits_as_it_is()
        )

    def _fewbits_cast(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplied by ComfyUI's way of bringing a weight, less its quantizing of the input."""
        _every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, x, offloadable=True, compute_dtype=x.dtype, want_requant=True
        )
        out = linear_native(x, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return out

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        # ComfyUI's casts take 14 us to find that weight and bias are where the input is and nothing
        # changes them. `_v` is DynamicVRAM's: the weight may not be there yet.
        if kwargs.get("weight_only_quant") and not (
            "_v" in vars(self) or self.weight_function or self.bias_function
        ):
            weight, bias, device = self.weight, self.bias, input.device
            if (
                self._is_own()
                and weight.device == device
                and (bias is None or bias.device == device)
            ):
                return linear(input, weight, bias)
        return super().forward_comfy_cast_weights(input, *args, **kwargs)

    def _forward(self, input, weight, bias):
        if self._full_precision_mm and not self._fewbits_rounds:
            # our product would round the input too, and ComfyUI's of INT8 and W4A4 does, up to 0.33
            weight = self._fewbits_convert(weight.to(input.dtype))
        if self._fewbits_marker is None:
            return super()._forward(input, weight, bias)
        return linear(input, weight, bias)

    def convert_weight(self, weight, inplace=False, **kwargs):
        return self._fewbits_convert(weight)

    def set_weight(self, *args, **kwargs):
        if self._is_own():
            return self._fewbits_set(*args, **kwargs)
        return super().set_weight(*args, **kwargs)


class OwnEmbedding(OwnFormats):
    """Mixed in before Embedding: formats whose rows can be looked up, where ComfyUI's own does not
    read them (<= 0.20, 0.28).

    Every other format is refused by name: ComfyUI would take its codes for weights without a word.
    """

    _fewbits_core: type  # ComfyUI's Embedding, to ask what it reads
    _fewbits_dtype: torch.dtype  # ComfyUI computes in it

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        marker = _marker(state_dict, prefix)
        if marker is None or embedding_reads(marker["format"], self._fewbits_core):
            super()._load_from_state_dict(state_dict, prefix, *others)
            return
        if get_format(marker["format"]).embedding_min_comfyui is None:
            looked_up = (name for name in FORMATS if FORMATS[name].embedding_min_comfyui)
            raise _unsupported(
                self,
                prefix,
                marker,
                f"make the file again with this layer kept, or as {' or '.join(looked_up)}",
            )
        shape = (self.num_embeddings, self.embedding_dim)
        self._fewbits_load(marker, state_dict, prefix, shape, None, self._fewbits_dtype)
        self._fewbits_load_rest(state_dict, prefix, *others)

    def forward_comfy_cast_weights(self, input, out_dtype=None):
        if not self._is_own() or self.weight_function:
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        weight, _, stream = comfy.ops.cast_bias_weight(
            self, device=input.device, dtype=self.weight.dtype, offloadable=True
        )
        layout = get_layout_class(self.layout_type)
        rows = layout.rows(
            weight._qdata, weight._params, input.reshape(-1), out_dtype or weight.dtype
        )
        comfy.ops.uncast_bias_weight(self, weight, None, stream)
        return rows.view(*input.shape, self.embedding_dim)

    # ComfyUI looks for these two; for a plain weight it must not find them, as it rounds that one
    # itself. For a quantized one that it reads itself it has none, and a patch would be added to a
    # decoded copy and lost.
    @property
    def convert_weight(self):
        if isinstance(self.weight, QuantizedTensor):
            return self._fewbits_convert
        return _absent("convert_weight")

    @property
    def set_weight(self):
        if self._is_own():
            return self._fewbits_set
        if isinstance(self.weight, QuantizedTensor):
            return self._fewbits_set_core
        return _absent("set_weight")

    def _fewbits_set_core(
        self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs
    ):
        """As ComfyUI's Linear does it: same layout and options, new scales."""
        options = {"scale": "recalculate", "stochastic_rounding": seed}
        if hasattr(self.weight, "requantize_from_float"):
            new = self.weight.requantize_from_float(weight, **options)
        else:
            new = QuantizedTensor.from_float(weight, self.layout_type, **options)
        new = new.to(self.weight.dtype)
        if return_weight:
            return new
        self.weight = _parameter(new)
        return None


class RefuseOwnFormats:
    """Mixed in before MoEExperts, where our formats would be read as plain numbers without an
    error.
    """

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        marker = _own_marker(state_dict, prefix)
        if marker is not None:
            raise _unsupported(
                self,
                prefix,
                marker,
                "keep it in bf16: only ComfyUI's own formats have banks of experts",
            )
        super()._load_from_state_dict(state_dict, prefix, *others)


MIXINS = {"Linear": OwnLinear, "Embedding": OwnEmbedding, "MoEExperts": RefuseOwnFormats}


def _parameter(weight: QuantizedTensor) -> torch.nn.Parameter:
    """What `torch.nn.Parameter` makes of it, less a `detach`: comfy-kitchen copies every scale
    there.

    The scales of an NF4 layer are a ninth of it, and ComfyUI maps them from the file: they would be
    in memory twice.
    """
    weight.requires_grad_(False)
    weight._is_param = True  # what isinstance(weight, Parameter) asks
    return weight


def _absent(name: str) -> None:
    raise AttributeError(name)


def _unsupported(
    module: torch.nn.Module, prefix: str, marker: dict, advice: str
) -> UnsupportedLayerError:
    layer, kind = prefix.rstrip("."), type(module).__name__
    return UnsupportedLayerError(
        f"layer '{layer}': {marker['format']} is not supported for {kind} layers; {advice}"
    )
