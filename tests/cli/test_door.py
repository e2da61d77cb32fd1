"""What both commands do around their work: fast help, signals, readers that go away, text a terminal must not obey."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.cli import door
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.errors import CheckpointError, visible
from support.helpers import random_tensors, tiny_checkpoint

SHAPES = {"a.weight": (64, 64), "b.weight": (64, 32)}
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
# Says on stderr which modules it took.
ASKED = """
import sys
before = set(sys.modules)
from {module} import main
for arguments in {asked}:
    try: main(arguments)
    except SystemExit as left: assert left.code == 0
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""
FEWBITS = "fewbits.quant_ops.cli.__main__"
CLASSIC = "fewbits.quant_ops.compat"
PARSING = {"fewbits", "quant_ops", "cli", "__main__", "arguments", "door", "errors", "version"}
CLASSIC_PARSING = PARSING | {
    "compat", "command", "flags", "options", "planning", "model_family", "spec",
}  # fmt: skip
HEAVY = {
    "asyncio",
    "ctypes",
    "difflib",
    "email",
    "importlib.metadata",
    "json",
    "logging",
    "numpy",
    "socket",
    "torch",
}


def python(script, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, **kwargs
    )


def taken(module, *asked):
    """What a command prints, and the modules it takes for that."""
    result = python(ASKED.format(module=module, asked=asked))
    assert result.returncode == 0, result.stderr
    return result.stdout, set(result.stderr.split())


def ours(modules):
    """The last names of those that are FewBits' own."""
    return {name.rpartition(".")[2] for name in modules if name.split(".")[0] == "fewbits"}


def test_help_and_version_take_few_modules():
    for flag, shown in (["--version"], "fewbits "), (["--help"], "verify"):
        text, modules = taken(FEWBITS, flag)
        assert shown in text
        assert ours(modules) == PARSING
        assert modules & HEAVY == set()


def test_help_of_every_command_takes_no_more():
    from fewbits.quant_ops.cli.__main__ import COMMANDS

    text, modules = taken(FEWBITS, *([name, "--help"] for name in COMMANDS))
    assert "--shapes-from" in text
    assert ours(modules) == PARSING
    assert modules & HEAVY == set()


def test_help_and_version_of_the_classic_command_take_few_modules():
    text, modules = taken(CLASSIC, ["--version"], ["--help"])
    assert "--input" in text
    assert ours(modules) == CLASSIC_PARSING
    assert modules & (HEAVY - {"json", "logging"}) == set()


def test_what_help_names_is_what_there_is():
    from fewbits.kernels.device import CLASSES
    from fewbits.quant_ops.bench import CPU_ROWS, CPU_SHAPE, ROWS, SHAPE
    from fewbits.quant_ops.checkpoint.exporters import TARGETS
    from fewbits.quant_ops.cli import arguments
    from fewbits.quant_ops.cli.__main__ import COMMANDS
    from fewbits.quant_ops.formats import FORMATS, own_methods, short_names
    from fewbits.quant_ops.methods import METHODS

    tables = [
        (arguments.FORMATS, FORMATS), (arguments.METHODS, METHODS), (arguments.TARGETS, TARGETS),
        (arguments.CLASSES, CLASSES), (arguments.ROWS, ROWS), (arguments.SHAPE, SHAPE),
        (arguments.CPU_ROWS, CPU_ROWS), (arguments.CPU_SHAPE, CPU_SHAPE),
        (arguments.SHORT_NAMES, short_names()), (arguments.ARGUMENTS, COMMANDS),
    ]  # fmt: skip
    for named, there in tables:
        assert sorted(map(str, named)) == sorted(map(str, there))
    assert own_methods() == arguments.OWN_METHODS


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("m.safetensors", "m_bnb_nf4.safetensors"),
        ("shards", "shards_bnb_nf4.safetensors"),
        ("m.v1.safetensors.index.json", "m.v1_bnb_nf4.safetensors"),
    ],
)
def test_a_result_without_a_name_lies_beside_its_source(tmp_path, source, target):
    from fewbits.quant_ops.cli.common import output_of

    assert output_of(tmp_path / source, "bnb_nf4") == tmp_path / target


def test_quantize_names_its_file_by_the_format_and_says_it(tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    assert main(["quantize", str(model), "--format", "nf4", "--quiet"]) == 0
    assert (tmp_path / "m_bnb_nf4.safetensors").is_file()
    mixed = ["--format", "nf4", "--rule", "a=int8_tensorwise"]
    assert main(["quantize", str(model), *mixed]) == 0
    assert capsys.readouterr().out.endswith("m_bnb_nf4_mixed.safetensors\n")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_bar_keeps_its_room_beside_a_long_name(width):
    from fewbits.quant_ops.cli import progress

    name = "model.diffusion_model.double_blocks.18.img_attn.proj.weight"
    shown = progress.end_of(name, width - progress.FACTS)
    assert len(shown) <= max(0, width - progress.FACTS)
    assert name.endswith(shown.removeprefix("…"))


def test_every_command_has_its_module_and_arguments(capsys):
    from fewbits.quant_ops.cli.__main__ import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0 and f"fewbits {name}" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_work_and_removes_the_part(
    tmp_path, number, capsys, monkeypatch, request
):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    from fewbits.quant_ops import pipeline

    def end(*arguments):
        assert any(path.suffix == ".part" for path in tmp_path.iterdir())
        os.kill(os.getpid(), getattr(signal, number))
        while True:  # a layer that takes long; its last argument says when to stop
            time.sleep(0.01)
            arguments[-1]()

    monkeypatch.setattr(pipeline, "_convert", end)
    before = signal.SIG_DFL  # whoever started the tests may have it ignored
    inherited = signal.signal(getattr(signal, number), before)
    request.addfinalizer(lambda: signal.signal(getattr(signal, number), inherited))
    arguments = ["quantize", model, "-o", tmp_path / "q.safetensors", "--format", "int8_tensorwise"]
    assert main(list(map(str, arguments))) == 128 + getattr(signal, number)
    assert capsys.readouterr().err.endswith(f"\nfewbits: ended by {number}; nothing was written\n")
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert signal.getsignal(getattr(signal, number)) == before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert door.run_command("x", lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    script = (
        "import sys, fewbits.quant_ops.cli.__main__ as cli\n"
        f"sys.argv = ['fewbits', 'plan', {str(model)!r}, '--format', 'int8_tensorwise', '--json']\n"
        "cli.run()\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-c", script],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert process.stderr.startswith("warning: ") and process.stderr.count("\n") == 1
    assert process.returncode == 128 + signal.SIGPIPE


def test_ctrl_c_while_torch_is_imported_is_an_interrupt(tmp_path):
    script = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from fewbits.quant_ops.cli.__main__ import main as fewbits\n"
        "from fewbits.quant_ops.compat import main as classic\n"
        "assert fewbits(['quantize', 'a', '-o', 'b.safetensors', '--format', 'mxfp8']) == 130\n"
        "assert classic(['-i', 'a.safetensors', '--int8']) == 130\n"
    )
    result = python(script)
    assert result.returncode == 0, result.stderr
    assert (
        result.stderr
        == "fewbits: interrupted; nothing was written\nconvert_to_quant: interrupted; nothing was written\n"
    )


NO_MEMORY = {
    "python": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}  # fmt: skip


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_no_memory_is_one_line_and_status_2(error, capsys):
    def work():
        raise error

    assert door.run_command("fewbits", work) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fewbits: out of memory: ") and shown.count("\n") == 1


def test_other_errors_keep_their_traceback():
    def work():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        door.run_command("fewbits", work)


@pytest.mark.parametrize("device", ["meta", "vulkan", "nonsense", "cuda:99"])
def test_a_device_that_computes_nothing_is_refused(tmp_path, device, capsys):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    arguments = [
        "quantize",
        model,
        "-o",
        tmp_path / "q.safetensors",
        "--format",
        "mxfp8",
        "--device",
        device,
    ]
    assert main(list(map(str, arguments))) == 2
    assert f"--device {device}" in capsys.readouterr().err


def test_what_a_terminal_obeys_is_spelled_out():
    assert visible("plain, 中文 and\ttabs") == "plain, 中文 and\ttabs"
    assert (
        visible("\x1b[2J\r\n\x07\x9b1m\u202e\ud800\x7f") == r"\x1b[2J\r\n\x07\x9b1m\u202e\ud800\x7f"
    )


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["plan", "--format", "int8_tensorwise", "--preset", "none"], ["convert", "-o", "OUT"], ["repair", "-o", "OUT"], ["quantize", "--format", "int8_tensorwise", "--preset", "none", "-o", "OUT"]], ids=lambda command: command[0])  # fmt: skip
def test_names_and_metadata_are_printed_without_obeying_them(tmp_path, command, capsys, caplog):
    name = f"a{ESCAPE}\nforged line"
    tensors = random_tensors({f"{name}.weight": (64, 64), f"{name}.odd{ESCAPE}": (3,)})
    tensors[f"{name}.b.absmax"] = torch.ones(3)  # belongs to no weight: a warning names it
    save_file(
        tensors,
        tmp_path / "m.safetensors",
        metadata={f"key{ESCAPE}": f"value{ESCAPE}\nforged line"},
    )
    arguments = [
        str(tmp_path / "out.safetensors") if word == "OUT" else word for word in command[1:]
    ]
    main([command[0], str(tmp_path / "m.safetensors"), *arguments])
    shown = capsys.readouterr()
    printed = shown.out + shown.err
    assert "\x1b" not in printed and "\x07" not in printed and "\nforged line" not in printed
    assert printed.replace("\n", "").isprintable()


def test_an_error_that_names_a_tensor_is_one_line_without_escapes(tmp_path, capsys):
    tensors = {f"a{ESCAPE}\n.weight": torch.full((32, 32), float("nan"))}
    save_file(tensors, tmp_path / "m.safetensors")
    arguments = ["quantize", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "q.safetensors"), "--format", "int8_tensorwise"]  # fmt: skip
    assert main([*arguments, "--preset", "none"]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 + error.count("warning: ")
        and "\x1b" not in error
        and r"\x1b[2J" in error
    )


def test_quantized_already_names_the_file(tmp_path):
    from fewbits.quant_ops.doors import quantize_file
    from fewbits.quant_ops.errors import RecipeError
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    model, first = (
        tiny_checkpoint(tmp_path / "m.safetensors", SHAPES),
        tmp_path / "first.safetensors",
    )
    quantize_file(model, first, Recipe(parse_wish("int8_tensorwise"), preset="none"))
    with pytest.raises(RecipeError, match="^first.safetensors: layer 'a' is quantized already"):
        quantize_file(first, tmp_path / "q.safetensors", Recipe(parse_wish("mxfp8"), preset="none"))


def test_a_refusal_of_the_work_is_one_line_and_status_2(capsys):
    def work():
        raise CheckpointError("two\nlines")

    assert door.run_command("fewbits", work) == 2
    assert capsys.readouterr().err == "fewbits: two\\nlines\n"
