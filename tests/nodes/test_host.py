"""Paths a user may name, devices, and what a running node tells the page."""

import sys
import types

import pytest
import torch


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "/etc/model", "//server/share/model", "\\\\server\\share\\model", "C:\\model", "C:model", "../model",
        "diffusion_models/../../model", "..\\model", "a/..", "con", "diffusion_models/NUL.safetensors", "lpt1.x",
        "a/b.", "a/b ./c", "a\0b", "a\nb", "a?b", "a:b",
    ],
)  # fmt: skip
def test_names_that_could_lead_out_of_the_output_folder_are_refused(host, tmp_path, name):
    from fewbits.quant_ops.errors import RecipeError

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RecipeError, match=r"is not allowed: write a name inside ComfyUI's output folder"
    ):
        host.output_path(name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, path",
    [
        ("model", "model.safetensors"),
        (" diffusion_models/model.safetensors ", "diffusion_models/model.safetensors"),
        ("new/sub folder/model v1.5", "new/sub folder/model v1.5.safetensors"),
        ("a\\b", "a/b.safetensors"),
        ("./model", "model.safetensors"),
        ("模型/流", "模型/流.safetensors"),
        ("console", "console.safetensors"),
        ("model.SAFETENSORS", "model.SAFETENSORS"),
    ],
)
def test_other_names_land_in_the_output_folder_with_their_subfolders(host, tmp_path, name, path):
    assert host.output_path(name) == tmp_path / "output" / path
    assert (tmp_path / "output" / path).parent.is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege on Windows")
def test_a_link_may_lead_into_a_model_folder_and_nowhere_else(host, tmp_path):
    from fewbits.quant_ops.errors import RecipeError

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "output" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "output" / "models").symlink_to(tmp_path / "models" / "unet")
    with pytest.raises(RecipeError, match="not allowed"):
        host.output_path("out/model")
    assert host.output_path("models/model") == tmp_path / "output" / "models" / "model.safetensors"


def test_only_safetensors_of_all_model_folders_are_offered(host, tmp_path):
    names = [
        "unet/a.safetensors",
        "unet/b.pt",
        "clip/sub/c.safetensors",
        "checkpoints/d.safetensors",
    ]
    for name in (f"{'output' if 'clip' in name else 'models'}/{name}" for name in names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert host.model_files("diffusion_models") == ["a.safetensors"]
    offered = host.all_model_files()
    assert offered == [
        "diffusion_models/a.safetensors",
        "text_encoders/sub/c.safetensors",
        "checkpoints/d.safetensors",
    ]
    for choice in offered:
        assert host.model_path(*host.split_choice(choice)).is_file()


@pytest.mark.parametrize(
    "choice", ["", "a.safetensors", "diffusion_models/", "diffusion_models/none.safetensors", "vae/a.safetensors",
               "diffusion_models/../secret.safetensors", "/secret.safetensors"],
)  # fmt: skip
def test_a_file_outside_the_model_folders_does_not_exist(host, tmp_path, choice):
    from fewbits.quant_ops.errors import CheckpointError

    (tmp_path / "models" / "secret.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="no such file in ComfyUI's model folders; choose one from the list"
    ):
        host.model_path(*host.split_choice(choice))


def test_an_existing_file_is_named_without_its_folder_and_kept(host, tmp_path):
    from fewbits.quant_ops.errors import RecipeError

    (tmp_path / "output" / "sub").mkdir()
    (tmp_path / "output" / "sub" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(RecipeError) as raised:
        host.output_path("sub/model")
    assert str(raised.value).startswith(
        "sub/model.safetensors exists already in the output folder; "
    )
    assert "turn overwrite on" in str(raised.value) and str(tmp_path) not in str(raised.value)
    assert host.output_path("sub/model", overwrite=True).read_bytes() == b"mine"


def test_text_encoder_types_are_comfyuis_own(host, comfy, monkeypatch):
    known = [kind.name.lower() for kind in comfy.sd.CLIPType]
    monkeypatch.delitem(sys.modules, "nodes", raising=False)
    assert host.text_encoder_types() == known
    old = types.SimpleNamespace(INPUT_TYPES=lambda: {"required": {"type": (["one", "both"],)}})
    new = types.SimpleNamespace(
        INPUT_TYPES=lambda: {"required": {"type": ("COMBO", {"options": ["both", "two"]})}}
    )
    mappings = {"CLIPLoader": old, "DualCLIPLoader": new}
    monkeypatch.setitem(sys.modules, "nodes", types.SimpleNamespace(NODE_CLASS_MAPPINGS=mappings))
    assert host.text_encoder_types() == ["one", "both", "two"]


def test_files_are_put_where_the_loaders_of_their_kind_look(host, tmp_path):
    assert (
        host.automatic_name("diffusion_models/sub/flux.safetensors", "nf4")
        == "diffusion_models/flux_nf4"
    )
    assert host.automatic_name("text_encoders/a\\t5.safetensors", "nf4") == "clip/t5_nf4"


def test_auto_is_the_cpu_where_comfyui_has_no_cuda_and_cuda_is_refused_there(host):
    from fewbits.quant_ops.errors import RecipeError

    assert host.pick_device("auto") == host.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match="ComfyUI runs on cpu; choose auto or cpu"):
        host.pick_device("cuda")


@pytest.fixture
def server(monkeypatch):
    """Stands in for ComfyUI's server and keeps what is sent."""
    sent = []
    instance = types.SimpleNamespace(
        client_id="the prompt's",
        send_sync=lambda event, data, sid: (
            sent.append((event, data)) if sid == "the prompt's" else None
        ),
    )
    module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", module)
    return types.SimpleNamespace(sent=sent, instance=instance)


def test_progress_is_sent_at_most_ten_times_a_second_and_always_at_the_end(
    host, server, monkeypatch
):
    clock = iter([i * 0.01 for i in range(1000)])
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    run = host.Run("7")
    for done in range(100):
        run.on_progress(done, 100, f"layer{done}")
    run.on_progress(100, 100, "")
    assert {event for event, _ in server.sent} == {"fewbits.progress"}
    progress = [data for _, data in server.sent]
    assert 2 <= len(progress) <= 12
    assert progress[0]["layer"] == "layer0" and progress[0]["eta_seconds"] is None
    assert progress[-1]["done"] == progress[-1]["total"] == 100 and progress[-1]["eta_seconds"] == 0
    assert all(
        set(data) == {"node_id", "layer", "done", "total", "seconds", "eta_seconds"}
        for data in progress
    )
    assert all(data["node_id"] == "7" for data in progress)


def test_the_time_left_is_said_when_it_can_be_known(host, server, monkeypatch):
    """The first layer of a run that took long to start says nothing about the others."""
    clock = iter([0.0, 60.0, 61.0, 62.5, 65.0, 70.0])
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    run = host.Run("7")
    for done in (1, 11, 26, 51, 101):
        run.on_progress(done, 101, "layer")
    found = [data["eta_seconds"] for _, data in server.sent]
    assert found == [None, None, pytest.approx(7.5), pytest.approx(5.0), 0.0]


def test_the_plan_is_sent_before_any_work(host, server):
    run = host.Run("7")
    run.on_plan(types.SimpleNamespace(to_json=lambda: {"layers": []}))
    assert server.sent == [("fewbits.plan", {"node_id": "7", "plan": {"layers": []}})]
    assert host.PLANS == {"7": {"layers": []}}  # for a page that is reloaded while it runs


def test_a_written_file_is_told_with_the_loader_that_lists_it(host, tmp_path):
    for folder in ("diffusion_models/new", "elsewhere"):
        (tmp_path / "output" / folder).mkdir(parents=True, exist_ok=True)
    listed = tmp_path / "output" / "diffusion_models" / "new" / "m.safetensors"
    assert host.whereabouts(listed) == {
        "output": str(listed),
        "saved": {
            "path": "output/diffusion_models/new/m.safetensors",
            "loader": "Load Diffusion Model",
            "name": "new/m.safetensors",
        },
    }
    apart = host.whereabouts(tmp_path / "output" / "elsewhere" / "m.safetensors")["saved"]
    assert apart == {"path": "output/elsewhere/m.safetensors", "loader": None, "name": None}


def test_a_prompt_that_nobody_watches_tells_nobody(host, server):
    server.instance.client_id = None
    run = host.Run("7")
    run.on_plan(types.SimpleNamespace(to_json=dict))
    run.on_progress(1, 1, "layer")
    assert server.sent == []


def test_without_a_server_nothing_is_sent(host, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    run = host.Run(None)
    run.on_plan(types.SimpleNamespace(to_json=dict))
    run.on_progress(0, 0, "layer")
    monkeypatch.setitem(
        sys.modules, "server", types.SimpleNamespace(PromptServer=type("PromptServer", (), {}))
    )
    run.on_progress(1, 1, "")


def test_progress_raises_comfyuis_own_exception_when_the_user_cancels(host, comfy):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host.Run(None).on_progress(1, 2, "layer")
    host.Run(None).on_progress(1, 2, "layer")  # once: the next prompt runs


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "x" * 300 + "/model", "a/" * 5_000 + "b"])
def test_a_name_that_no_disk_takes_is_refused_in_a_sentence(host, name):
    from fewbits.quant_ops.errors import RecipeError

    for ask in (host.output_path, host.planned):
        with pytest.raises(RecipeError) as refused:
            ask(name)
        message = str(refused.value)
        assert message.isprintable() and len(message) < 500
