"""A node of every ComfyUI that the tests start. It has no nodes: what it does, it does while it loads.

ComfyUI's log (app/logger.py) fails on a progress bar that nothing was written before: it writes a word. A server whose
tests were killed, so that nobody stops it, ends by itself; Windows keeps the number of a parent that ended. And
`hasten` leaves out work that shows nothing, there and in the tests that run ComfyUI in their own process.
"""

import functools
import os
import threading
import time

import torch
from transformers import PreTrainedTokenizerBase

NODE_CLASS_MAPPINGS = {}
COLUMNS = (
    1024  # |sum| <= 128 * 128 * 1024 = 2**24: every partial sum is a whole number that float32 has
)
_int_mm = torch._int_mm
_from_pretrained = PreTrainedTokenizerBase.from_pretrained.__func__


def hasten() -> None:
    """INT8 products as exactly equal float32 products, and each tokenizer read once.

    Without VNNI torch 2.11 takes 13 to 27 times as long for an INT8 product, which was half of the time of all tests.
    ComfyUI reads the tokenizers of every text encoder anew, 0.4 s for each CLIP, and changes none.
    """
    torch._int_mm = whole_product
    PreTrainedTokenizerBase.from_pretrained = classmethod(tokenizer_of)


def whole_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch._int_mm: (M, K) int8 @ (K, N) int8 -> (M, N) int32, exact."""
    if not a.is_cpu:
        return _int_mm(a, b)
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    for columns, rows in zip(a.split(COLUMNS, 1), b.split(COLUMNS, 0)):
        out += (columns.float() @ rows.float()).int()
    return out


@functools.cache
def tokenizer_of(kind: type, *path: str, **settings: object) -> object:
    """PreTrainedTokenizerBase.from_pretrained."""
    tokenizer = _from_pretrained(kind, *path, **settings)
    tokenizer.get_vocab = functools.cache(tokenizer.get_vocab)
    return tokenizer


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if not __name__.startswith("support."):  # where ComfyUI loads it; its own test does not
    print("starting")
    hasten()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
