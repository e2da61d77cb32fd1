"""Small checkpoints and model shapes that several tests use."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

EMOJI = Path(__file__).parents[1] / "assets" / "emoji" / "emoji_flux.safetensors"


def flux_shapes(hidden: int = 128, double: int = 1, single: int = 1) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Flux model, as ComfyUI's class has them (biases included)."""
    h = hidden
    layers = {"img_in": (h, 64), "txt_in": (h, 768), "time_in.in_layer": (h, 256), "time_in.out_layer": (h, h),
              "vector_in.in_layer": (h, 768), "vector_in.out_layer": (h, h), "guidance_in.in_layer": (h, 256),
              "guidance_in.out_layer": (h, h), "final_layer.linear": (64, h),
              "final_layer.adaLN_modulation.1": (2 * h, h)}  # fmt: skip
    norms: dict[str, tuple[int, ...]] = {}
    for i in range(double):
        for side in ("img", "txt"):
            base = f"double_blocks.{i}.{side}"
            layers[f"{base}_mod.lin"] = (6 * h, h)
            layers[f"{base}_attn.qkv"], layers[f"{base}_attn.proj"] = (3 * h, h), (h, h)
            layers[f"{base}_mlp.0"], layers[f"{base}_mlp.2"] = (4 * h, h), (h, 4 * h)
            norms |= {f"{base}_attn.norm.{qk}_norm.weight": (128,) for qk in ("query", "key")}
    for i in range(single):
        base = f"single_blocks.{i}"
        layers[f"{base}.linear1"], layers[f"{base}.linear2"] = (7 * h, h), (h, 5 * h)
        layers[f"{base}.modulation.lin"] = (3 * h, h)
        norms |= {f"{base}.norm.{qk}_norm.weight": (128,) for qk in ("query", "key")}
    shapes = dict(norms)
    for name, shape in layers.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def sd3_shapes(depth: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small SD3 model (hidden = 64 * depth)."""
    h = 64 * depth
    layers = {"t_embedder.mlp.0": (h, 256), "t_embedder.mlp.2": (h, h), "y_embedder.mlp.0": (h, 768),
              "y_embedder.mlp.2": (h, h), "context_embedder": (h, 768), "final_layer.linear": (64, h),
              "final_layer.adaLN_modulation.1": (2 * h, h), "x_embedder.proj": (h, 16, 2, 2)}  # fmt: skip
    for i in range(depth):
        for block in ("context_block", "x_block"):
            base = f"joint_blocks.{i}.{block}"
            last = block == "context_block" and i == depth - 1
            layers[f"{base}.attn.qkv"] = (3 * h, h)
            layers[f"{base}.adaLN_modulation.1"] = (2 * h if last else 6 * h, h)
            if not last:
                layers[f"{base}.attn.proj"] = (h, h)
                layers[f"{base}.mlp.fc1"], layers[f"{base}.mlp.fc2"] = (4 * h, h), (h, 4 * h)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 64, h)}
    for name, shape in layers.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def clip_shapes(
    layers: int = 12, hidden: int = 768, vocabulary: int = 49408
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP text encoder; the defaults are CLIP-L's."""
    h, text = hidden, "text_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{text}.embeddings.token_embedding.weight": (vocabulary, h),
        f"{text}.embeddings.position_embedding.weight": (77, h),
        "text_projection.weight": (h, h),
    }
    linears = {f"self_attn.{name}_proj": (h, h) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (4 * h, h), "mlp.fc2": (h, 4 * h)}
    norms = [f"{text}.final_layer_norm"]
    for i in range(layers):
        base = f"{text}.encoder.layers.{i}"
        norms += [f"{base}.layer_norm1", f"{base}.layer_norm2"]
        for name, shape in linears.items():
            shapes[f"{base}.{name}.weight"], shapes[f"{base}.{name}.bias"] = shape, shape[:1]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (h,)
    return shapes


def t5_shapes(layers: int = 12, hidden: int = 768, inner: int = 3072) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a T5 encoder; the defaults are T5-base's, the smallest that ComfyUI loads."""
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (32128, hidden),
        "encoder.final_layer_norm.weight": (hidden,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 12),
    }
    for i in range(layers):
        attention, dense = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (hidden, hidden) for name in "qkvo"}
        shapes[f"{dense}.DenseReluDense.wi.weight"] = (inner, hidden)
        shapes[f"{dense}.DenseReluDense.wo.weight"] = (hidden, inner)
        shapes |= {f"{base}.layer_norm.weight": (hidden,) for base in (attention, dense)}
    return shapes


def gated_t5_shapes(
    *, d_model: int, d_ff: int, num_heads: int, num_layers: int, vocab_size: int = 32128
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a T5 v1.1 encoder (T5-XXL is one), by the names of ComfyUI's config; heads are 64 wide."""
    shapes = t5_shapes(num_layers, d_model, d_ff)
    shapes["shared.weight"] = (vocab_size, d_model)
    for name, shape in list(shapes.items()):
        if name.endswith(
            ("SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.v.weight")
        ):
            shapes[name] = (64 * num_heads, d_model)
        elif name.endswith("SelfAttention.o.weight"):
            shapes[name] = (d_model, 64 * num_heads)
        elif name.endswith("relative_attention_bias.weight"):
            shapes[name] = (32, num_heads)
        elif name.endswith("DenseReluDense.wi.weight"):
            del shapes[name]
            shapes |= {name.replace(".wi.", f".wi_{i}."): shape for i in (0, 1)}
    return shapes


def random_tensors(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Seeded weights: matrices randn / sqrt(fan in), norms one, biases zero."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros(shape, dtype=dtype)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            tensors[name] = (torch.randn(shape, generator=generator) / fan_in**0.5).to(dtype)
    return tensors


def tiny_checkpoint(
    path: Path, shapes: dict[str, tuple[int, ...]] | None = None, **metadata: str
) -> Path:
    """Write a small bf16 Flux model (or the given shapes) and return its path."""
    save_file(random_tensors(shapes or flux_shapes()), path, metadata=metadata or None)
    return path


def raw_file(path: Path, entries: dict, data: bytes = b"", pad: bool = True) -> Path:
    """A safetensors file with exactly this header object, valid or not."""
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8) if pad else b""
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def interpreted(script: Path, *arguments: str) -> list[str]:
    """What a script says that runs kernels in Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton", minversion="3.6", reason="older interpreters lack what they need")
    run = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def fewbits(*arguments: object) -> subprocess.CompletedProcess:
    """Run the `fewbits` command here: a process of its own would import torch for four seconds first."""
    from fewbits.quant_ops.cli.__main__ import main

    words, out, errors = [*map(str, arguments)], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main(words)
        except SystemExit as end:  # argparse, after --help and --version
            status = end.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())
