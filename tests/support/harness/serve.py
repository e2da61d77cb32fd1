"""`dev.py comfy`: the real UI with the pack and the emoji model, until Ctrl-C."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from support.harness import EMOJI_NODES, PACK, ComfyServer, emoji_models


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fewbits-comfy-") as folder:
        nodes, port = [PACK, EMOJI_NODES], int(sys.argv[1])
        try:
            with ComfyServer(
                Path(folder), custom_nodes=nodes, models=emoji_models(), port=port, threads=0
            ) as server:
                print(
                    f"ComfyUI with FewBits: http://127.0.0.1:{server.port}   (Ctrl-C ends it; log: {server.log_path})"
                )
                server.process.wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
