"""The seams into ComfyUI's loaders: our format names, our layouts, and Linear modules that read them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import comfy.ops
import comfy.quant_ops
import comfy.sd
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from ...quant_ops.checkpoint.metadata import parse_marker
from ...quant_ops.errors import CheckpointError, UnsupportedLayerError
from ...quant_ops.formats import FORMATS, get_format
from ...quant_ops.layouts import register_layout
from ...quant_ops.sources import TORCH_DTYPES, spec_of
from ...quant_ops.spec import FormatOptions, LayerInput
from . import detect, foreign
from .compat import weight_only_path

MARK = "_fewbits_wrapped"
# Formats that ComfyUI did not know when we registered; the others stay ComfyUI's own.
OWNED: set[str] = set()
PROBE = LayerInput((256, 256), None)  # a layer that every format fits, to ask which tensors it stores


def install_formats() -> None:
    """Names into QUANT_ALGOS and layout classes into the registry; existing entries are never changed."""
    algos = comfy.quant_ops.QUANT_ALGOS
    OWNED.update(name for name in FORMATS if name not in algos)
    for name in FORMATS:
        if name not in OWNED:
            continue
        format = get_format(name)
        specs = format.tensor_specs(PROBE, format.defaults)
        algos[name] = {
            "storage_t": TORCH_DTYPES[specs["weight"][0]],
            "parameters": set(specs) - {"weight"},
            "comfy_tensor_layout": _layout(name, format.defaults),
            "quantize_input": False,
        }


def _layout(name: str, options: FormatOptions) -> str:
    layout = register_layout(name, options)
    registry = getattr(comfy.quant_ops, "LAYOUTS", None)
    if isinstance(registry, dict):  # ComfyUI <= 0.7 kept its own
        registry.setdefault(layout, get_layout_class(layout))
    return layout


def install_linear() -> None:
    """Subclass what `mixed_precision_ops` returns, so that every stock loader reads our layers."""
    original = comfy.ops.mixed_precision_ops
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def mixed_precision_ops(*args: object, **kwargs: object) -> type:
        ops = original(*args, **kwargs)
        ops.Linear = type("Linear", (OwnFormats, ops.Linear), {})
        for name in ("Embedding", "MoEExperts"):
            if hasattr(ops, name):
                setattr(ops, name, type(name, (RefuseOwnFormats, getattr(ops, name)), {}))
        return ops

    setattr(mixed_precision_ops, MARK, True)
    comfy.ops.mixed_precision_ops = mixed_precision_ops


def install_text_encoders() -> None:
    """Mark text encoders as quantized where ComfyUI does not look (CLIP-L and others): seam 12 of the design."""
    original = comfy.sd.CLIP.__init__
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def __init__(self, *args: object, **kwargs: object) -> None:
        states = kwargs.get("state_dict", [])
        states = states if isinstance(states, list) else [states]
        options = kwargs.get("model_options") or {}
        decided = "quantization_metadata" in options or "custom_operations" in options
        if not decided and any(key.endswith(".comfy_quant") for state in states for key in state):
            kwargs["model_options"] = {**options, "quantization_metadata": {"mixed_ops": True}}
        original(self, *args, **kwargs)

    setattr(__init__, MARK, True)
    comfy.sd.CLIP.__init__ = __init__


SEAMS: dict[str, Callable[[], None]] = {
    "formats": install_formats,
    "linear": install_linear,
    "text_encoders": install_text_encoders,
    "foreign dialects": functools.partial(foreign.install, OWNED),
    "detection": functools.partial(detect.install, OWNED),
}


def _own_marker(state_dict: dict, prefix: str) -> dict | None:
    """The layer's marker if it names a format of ours."""
    data = state_dict.get(f"{prefix}comfy_quant")
    if data is None:
        return None
    try:
        marker = parse_marker(prefix.rstrip("."), bytes(data.cpu().tolist()))
    except CheckpointError:
        return None  # ComfyUI reports it in its own way
    return marker if marker.get("format") in OWNED else None


class OwnFormats:
    """Mixed in before ComfyUI's Linear: loads, saves and requantizes our formats, leaves all others to `super()`."""

    _fewbits_marker: torch.Tensor | None = None

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        marker = _own_marker(state_dict, prefix)
        if marker is None:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        device = self.factory_kwargs["device"]
        self._fewbits_load(marker, state_dict, prefix, device)
        # Not super(): ComfyUI's body would look for a weight. torch's own loads the bias.
        torch.nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}weight" in missing_keys:
            missing_keys.remove(f"{prefix}weight")

    def _fewbits_load(self, marker: dict, state_dict: dict, prefix: str, device: torch.device | None) -> None:
        layer = prefix.rstrip(".")
        format = get_format(marker["format"])
        shape = (self.out_features, self.in_features)
        expected = LayerInput(shape, None)
        wanted = (*format.tensor_specs(PROBE, format.defaults), "comfy_quant")
        stored = {suffix: state_dict.pop(f"{prefix}{suffix}", None) for suffix in wanted}
        stored = {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}
        specs = {suffix: spec_of(suffix, tensor) for suffix, tensor in stored.items()}
        try:
            options = format.options_from(marker, specs)
        except CheckpointError as error:
            raise CheckpointError(f"layer '{layer}': {error}; try `fewbits repair`") from None
        if tuple(specs["weight"].shape) != tuple(format.tensor_specs(expected, options)["weight"][1]):
            raise UnsupportedLayerError(
                f"layer '{layer}': weight is {list(specs['weight'].shape)}, the model needs {list(shape)} "
                f"in {format.name}; "
                "the file belongs to another model, or was packed wrongly"
            )
        self.layout_type = _layout(format.name, options)
        self.quant_format = format.name
        self._full_precision_mm_config = bool(marker.get("full_precision_matrix_mult", False))
        if self._full_precision_mm_config or not weight_only_path():
            self._full_precision_mm = True  # older ComfyUI would quantize activations with our weight layout
        stored = {suffix: tensor.to(device=device) for suffix, tensor in stored.items()}
        params = get_layout_class(self.layout_type).params_of(stored, self.factory_kwargs["dtype"], shape)
        weight = QuantizedTensor(stored["weight"], self.layout_type, params)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self._fewbits_marker = torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)

    def _is_own(self) -> bool:
        return self._fewbits_marker is not None and isinstance(self.weight, QuantizedTensor)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if not self._is_own():
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        destination = {} if destination is None else destination
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias
        weight = self.weight
        stored = get_layout_class(self.layout_type).stored(weight._qdata, weight._params)
        destination.update({f"{prefix}{suffix}": tensor for suffix, tensor in stored.items()})
        destination[f"{prefix}comfy_quant"] = self._fewbits_marker
        return destination

    def convert_weight(self, weight, inplace=False, **kwargs):
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        if not self._is_own():
            return super().set_weight(
                weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight, **kwargs
            )
        # The LoRA's dtype may differ from the layer's; without .to() every later forward would dequantize.
        new = QuantizedTensor.from_float(weight, self.layout_type, stochastic_rounding=seed).to(self.weight.dtype)
        if return_weight:
            return new
        self.weight = torch.nn.Parameter(new, requires_grad=False)
        return None


class RefuseOwnFormats:
    """Mixed in before Embedding and MoEExperts, where our formats would be read as plain numbers without an error."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        marker = _own_marker(state_dict, prefix)
        if marker is not None:
            raise UnsupportedLayerError(
                f"layer '{prefix.rstrip('.')}': {marker['format']} is not supported for {type(self).__name__} layers; "
                "make the file again with this layer kept, or as int8_tensorwise or float8_e4m3fn"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
