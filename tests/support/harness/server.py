"""ComfyServer: start, drive and stop one headless ComfyUI on CPU."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import websocket

from . import warm

READY_SECONDS = 180  # the first start compiles bytecode; 15 s on two cores when that is done
PORTS_TRIED = 5  # another program may take a free port before ComfyUI does
# The slim environment leaves out the templates; ComfyUI says so in one block at every start.
HARMLESS = ("comfyui-workflow-templates", "comfyui-embedded-docs")
FIRST_WORD = Path(__file__).with_name("first_word.py")  # a node of every server
_http = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # the machine's proxy cannot reach 127.0.0.1


@dataclass
class Run:
    """One finished prompt: history entry, every websocket message, and the server to fetch images from."""

    server: ComfyServer
    history: dict
    messages: list[dict] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.history["status"]["status_str"]

    @property
    def error(self) -> dict | None:
        """The execution_error message (node_id, exception_message, ...), if there was one."""
        return next(
            (
                data
                for name, data in self.history["status"]["messages"]
                if name == "execution_error"
            ),
            None,
        )

    @property
    def interrupted(self) -> bool:
        return any(
            name == "execution_interrupted" for name, _ in self.history["status"]["messages"]
        )

    def events(self, kind: str) -> list[dict]:
        """Data of all websocket messages of one type, e.g. `fewbits.progress`."""
        return [message["data"] for message in self.messages if message["type"] == kind]

    def images(self) -> list:
        """All saved images as PIL images, in node order."""
        from PIL import Image

        outputs = [
            image for node in self.history["outputs"].values() for image in node.get("images", [])
        ]
        return [Image.open(io.BytesIO(self.server.view(image))).convert("RGB") for image in outputs]


class ComfyServer:
    """A ComfyUI process with its own base folder.

    Args:
        base: folder for models, custom nodes, input, output, temp and user files; made if absent.
        custom_nodes: folders to place in custom_nodes; the pack's root becomes `ComfyUI-FewBits`.
        models: model folder name -> files to link (or copy) there.
        tree: ComfyUI folder; default `FEWBITS_COMFYUI`, which dev.py sets.
        arguments: more command-line flags.
        port: the port to prefer; another free one is taken if that is in use.
        threads: of torch; one draws the same pictures on every machine. 0: as many as torch likes.
        forked: start in a fifth of the time where the system can (warm.py).
    """

    def __init__(
        self,
        base: Path,
        *,
        custom_nodes: list[Path] = (),
        models: dict[str, list[Path]] | None = None,
        tree: Path | None = None,
        arguments: list[str] = (),
        port: int = 0,
        threads: int = 1,
        forked: bool = False,
    ):
        self.base = Path(base)
        self.tree = Path(tree or os.environ["FEWBITS_COMFYUI"])
        self.arguments = list(arguments)
        self.port = port
        self.threads = threads
        self.forked = forked
        for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        self.names = [self._place_nodes(Path(folder)) for folder in custom_nodes]
        shutil.copyfile(FIRST_WORD, self.base / "custom_nodes" / FIRST_WORD.name)
        for folder, files in (models or {}).items():
            for file in files:
                self.add_model(folder, Path(file))
        self.log_path = self.base / "server.log"
        self.process: subprocess.Popen | warm.Started | None = None

    def _place_nodes(self, folder: Path) -> str:
        is_pack = (folder / "quant_ops").is_dir()
        name = (
            "ComfyUI-FewBits"
            if is_pack
            else {"comfy_nodes": "emoji_nodes"}.get(folder.name, folder.name)
        )
        ignore = (
            shutil.ignore_patterns(".*", "__pycache__", "demo_output", "tests") if is_pack else None
        )
        target = self.base / "custom_nodes" / name
        if not target.exists():
            shutil.copytree(folder, target, ignore=ignore)
        return name

    def add_model(self, folder: str, file: Path) -> Path:
        """Make a file available to the loaders; hard-linked where possible."""
        target = self.base / "models" / folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
        return target

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_problems(self, since: int = 0) -> list[str]:
        """Log lines that a healthy server does not write, after the first `since` characters."""
        bad = ("IMPORT FAILED", "FewBits", "Traceback")
        lines = [
            line for line in self.log[since:].splitlines() if any(word in line for word in bad)
        ]
        return [line for line in lines if not any(word in line for word in HARMLESS)]

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def command(self) -> list[str]:
        base, main = self.base, self.tree / "main.py"
        return [
            str(main), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(base), "--temp-directory", str(base), "--user-directory", str(base / "user"),
            "--input-directory", str(base / "input"), "--output-directory", str(base / "output"),
            "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes",
            "--disable-metadata", "--dont-print-server", "--verbose", "WARNING",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", FIRST_WORD.name, *self.names, *self.arguments,
        ]  # fmt: skip

    def start(self) -> None:
        """Start and wait until the server answers."""
        for _ in range(PORTS_TRIED):
            self.port = free_port(self.port)
            self._spawn()
            if self._answers():
                return
        raise RuntimeError(f"no port for ComfyUI in {PORTS_TRIED} attempts:\n{self.log[-3000:]}")

    def _spawn(self) -> None:
        self.process = start(
            self.command(),
            folder=self.base,
            log=self.log_path,
            threads=self.threads,
            forked=self.forked,
        )

    def _answers(self) -> bool:
        """Wait for the first answer; False if the port was taken meanwhile."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)  # also when interrupted: nobody else knows of this process yet
            limit = time.monotonic() + READY_SECONDS
            while time.monotonic() < limit:
                if self.process.poll() is not None:
                    if "address already in use" in self.log:
                        return False
                    raise RuntimeError(
                        f"ComfyUI ended with status {self.process.returncode}:\n{self.log[-3000:]}"
                    )
                with contextlib.suppress(OSError):
                    self.stats = self.get("/system_stats")
                    undo.pop_all()
                    return True
                time.sleep(0.1)
            raise RuntimeError(
                f"ComfyUI did not answer within {READY_SECONDS} s:\n{self.log[-3000:]}"
            )

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    # --- HTTP -------------------------------------------------------------------------------------------------------

    def request(self, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with _http.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(
                f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')}"
            ) from None

    def get(self, path: str) -> dict:
        return json.loads(self.request(path))

    def post(self, path: str, body: object) -> dict:
        answer = self.request(path, body)
        return json.loads(answer) if answer.strip() else {}

    def object_info(self, node: str) -> dict:
        return self.get(f"/object_info/{node}")[node]

    def view(self, image: dict) -> bytes:
        return self.request("/view?" + urllib.parse.urlencode(image))

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    # --- prompts ----------------------------------------------------------------------------------------------------

    def connect(self) -> tuple[str, websocket.WebSocket]:
        """A client id and its websocket."""
        client = uuid.uuid4().hex
        connection = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=300
        )
        return client, connection

    def run(self, workflow: dict, *, on_message: object = None, timeout: float = 300) -> Run:
        """Queue a workflow and wait for its end.

        Args:
            on_message: called with each websocket message while the prompt runs, e.g. to interrupt it.

        Raises:
            RuntimeError: the prompt was refused, or ComfyUI ended while it ran.
            TimeoutError: it did not end within `timeout` seconds.
        """
        client, connection = self.connect()
        prompt_id = str(uuid.uuid4())
        messages = []
        limit = time.monotonic() + timeout
        with contextlib.closing(connection):
            self.post("/prompt", {"prompt": workflow, "client_id": client, "prompt_id": prompt_id})
            while True:
                message = self._receive(connection, limit)
                if message is None:  # a preview picture
                    continue
                messages.append(message)
                if on_message:
                    on_message(message)
                ended = message["type"] in (
                    "execution_success",
                    "execution_error",
                    "execution_interrupted",
                )
                if ended and message["data"].get("prompt_id") == prompt_id:
                    return Run(self, self._history(prompt_id), messages)

    def _receive(self, connection: websocket.WebSocket, limit: float) -> dict | None:
        connection.settimeout(max(limit - time.monotonic(), 0.1))
        try:
            text = connection.recv()
        except websocket.WebSocketTimeoutException:
            raise TimeoutError(f"the prompt did not end in time:\n{self.log[-2000:]}") from None
        except (websocket.WebSocketException, OSError) as error:
            raise RuntimeError(
                f"ComfyUI hung up during the prompt ({error}):\n{self.log[-2000:]}"
            ) from None
        return None if isinstance(text, bytes) else json.loads(text)

    def _history(self, prompt_id: str) -> dict:
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.05)
        raise RuntimeError(f"prompt {prompt_id} never entered the history")


def start(
    command: list[str], *, folder: Path, log: Path, threads: int = 1, forked: bool = True
) -> subprocess.Popen | warm.Started:
    """Run a Python file with ComfyUI's libraries, in the environment of every server."""
    run = warm.start if forked and warm.POSSIBLE else start_alone
    return run(command, environment=variables(threads), folder=folder, log=log)


def variables(threads: int) -> dict[str, str]:
    kept = (
        "PATH",
        "HOME",
        "LANG",
        "TMPDIR",
        "SYSTEMROOT",
        "TEMP",
        "USERPROFILE",
        "PYTHONPYCACHEPREFIX",
    )
    chosen = {
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1",
        "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1",
        # Waiting threads sleep: on a busy machine spinning ones took 40 times as long.
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    if threads:
        chosen["OMP_NUM_THREADS"] = str(threads)
    return {name: os.environ[name] for name in kept if name in os.environ} | chosen


def start_alone(
    command: list[str], *, environment: dict[str, str], folder: Path, log: Path
) -> subprocess.Popen:
    windows = os.name == "nt"  # a group of its own: Ctrl-C is for us, and we stop the server
    group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        if windows
        else {"start_new_session": True}
    )
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-s", *command],
            cwd=folder,
            env=environment,
            stdout=output,
            **streams,
            **group,
        )


def free_port(preferred: int = 0) -> int:
    """A port that nobody listens on: the preferred one if possible."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise RuntimeError("no free port on 127.0.0.1")
