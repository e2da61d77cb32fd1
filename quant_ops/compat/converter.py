"""LearnedRoundingConverter: one tensor, one format, method svd; the classic name and result."""

from __future__ import annotations

import torch

from ..errors import UnsupportedLayerError
from ..formats import get_format
from ..methods import Layer, choose, get_method, layer_generator
from ..sources import DTYPE_NAMES
from ..spec import LayerInput
from .job import wish_of

NAME = "tensor"  # seeds the generator, as a layer's name does in a file


class LearnedRoundingConverter:
    """Converts single weights. Options of the `svd` method are further keywords (`num_iter`, `lr`,
    `top_p`, ...).
    """

    def __init__(
        self,
        optimizer: str = "original",
        *,
        target_format: str = "fp8",
        scaling_mode: str | None = None,
        block_size: int | None = None,
        kernel_backend: str | None = None,
        no_learned_rounding: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        **svd_options: object,
    ):
        """Choose format and method.

        Args:
            target_format: fp8, int8, nf4 or fp4; with scaling mode, block size and backend as on
                the command line.
            no_learned_rounding: method nearest; then no option of learned rounding may be given.

        Raises:
            RecipeError: options that do not exist or contradict each other.
        """
        stated = {
            "type": target_format,
            "scaling": scaling_mode,
            "block_size": block_size,
            "backend": kernel_backend,
        }
        if optimizer != "original":
            svd_options = {"optimizer": optimizer, **svd_options}
        self.wish = wish_of(stated, simple=no_learned_rounding, svd=svd_options)
        self.seed, self.device = seed, torch.device(device)

    def convert(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize one weight.

        Args:
            weight: (N, K) finite floating-point tensor.

        Returns:
            quantized: (N, K) codes: float8_e4m3fn, int8, or uint8 from 0 to 15 for the 4-bit
                formats (not packed).
            scale: float32 in the format's stored shape (`weight_scale`, or `absmax`).
            dequantized: (N, K) float32, decoded from the two.

        Raises:
            UnsupportedLayerError: the format does not take this shape.
        """
        format, options = get_format(self.wish.format), self.wish.options
        layer = LayerInput((weight.shape[0], weight.shape[1]), DTYPE_NAMES[weight.dtype])
        obstacle = format.check(layer, options)
        if obstacle:
            raise UnsupportedLayerError(
                f"{format.name} does not take a weight of {list(weight.shape)}: {obstacle}"
            )
        method = get_method(self.wish.method)
        prepared = format.prepare(weight.detach().to(self.device), options)
        generator = layer_generator(self.seed, NAME, self.device)
        chosen = choose(
            method,
            Layer(
                prepared,
                format.grid(layer, options),
                method.configure(dict(self.wish.method_options)),
                generator,
            ),
        )
        tensors = format.pack(chosen.codes, chosen.scale, options)
        codes = tensors["weight"]
        if codes.shape != weight.shape:  # packed
            codes = chosen.codes
        scale = tensors.get("weight_scale", tensors.get("absmax"))
        return codes, scale, format.dequantize(tensors, layer, options)
