"""A real headless ComfyUI to test against, and a client that drives it like a user's browser does.

with ComfyServer(tmp_path, custom_nodes=[PACK, EMOJI_NODES], models={"diffusion_models": [file]}) as server:
    images = server.run(emoji_workflow("emoji_flux.safetensors", "panda")).images()
"""

from .emoji import EMOJI, EMOJI_NODES, PACK, PROMPTS, emoji_models, emoji_workflow
from .server import ComfyServer, Run

__all__ = [
    "EMOJI",
    "EMOJI_NODES",
    "PACK",
    "PROMPTS",
    "ComfyServer",
    "Run",
    "emoji_models",
    "emoji_workflow",
]
