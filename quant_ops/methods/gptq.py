"""gptq: codes that lie for each other. Columns are rounded one after the other, and each error is
made good by the columns still to come, as far as the layer's inputs have them in common. Needs a
calibration; `felt` says what is minimised.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323; the same feedback from a factor
of the gram, not its inverse: Chee, Cai, Kuleshov, De Sa 2023, arXiv:2307.13304. The passes after
it are coordinate descent on the same objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.grids import Scale
from ..options import Options
from .base import Layer, Method, Objective, register_method
from .felt import Felt
from .rounding import Rounding


@dataclass(frozen=True)
class GptqOptions(Options):
    """`passes` of coordinate descent after the feedback (emoji model, output error on other
    prompts, x nearest's: fp8 .719 without, .693 with three; nf4 .663 and .646). `damping` x the
    mean second moment; 0 chooses it by the two halves of the calibration.
    """

    passes: int = 3
    damping: float = 0.0

    ranges: ClassVar = {"passes": (0, 100), "damping": (0.0, 1000.0)}


class Gptq(Method):
    name = "gptq"
    Options = GptqOptions
    needs_inputs = True

    def quantize(self, layer: Layer) -> tuple[torch.Tensor, Scale, Objective]:
        felt = Felt(layer, layer.options.damping)
        work = Rounding(layer, felt)
        work.feed_back()
        work.descend(layer.options.passes)
        return work.codes(), felt.scale, felt.objective


register_method(Gptq())
