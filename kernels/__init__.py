"""Tensors in, tensors out: rounding, scaling and packing. No files, no layer names, no ComfyUI."""
