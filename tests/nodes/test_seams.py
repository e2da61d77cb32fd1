"""Every seam: installed once, under its file's name, and telling a reader what it is for."""

import importlib
import inspect
import types

import pytest

WRAPPED = {
    "layers": "comfy.ops:mixed_precision_ops",
    "text_encoders": "comfy.sd:CLIP.__init__",
    "foreign": "comfy.utils:convert_old_quants",
    "detection": "comfy.model_detection:detect_unet_config",
    "merging": "comfy.model_patcher:ModelPatcher.get_key_patches",
    "controlnet": "comfy.controlnet:load_controlnet_state_dict",
    "control_lora": "comfy.controlnet:ControlLora.pre_run",
    "low_rank": "comfy.model_patcher:ModelPatcher.load",
    "encoder_names": "comfy.diffusers_convert:convert_text_enc_state_dict_v20",
}


def function(where):
    module, _, names = where.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.fixture
def seams(comfy):
    from fewbits.nodes.bridge import seams

    return seams.SEAMS


def test_each_seam_is_named_after_its_file_and_has_a_state(seams):
    from fewbits.nodes import bridge

    assert set(seams) == {"formats", *WRAPPED}
    assert bridge.status() == dict.fromkeys(seams)
    assert [install.__module__.rpartition(".")[2] for install in seams.values()] == list(seams)


@pytest.mark.parametrize("words", ["Wraps:", "Why:", "Since: ", "Without it:"])
def test_each_seam_says_what_it_wraps_and_what_breaks_without_it(seams, words):
    for name, install in seams.items():
        text = inspect.getdoc(inspect.getmodule(install))
        assert text.startswith(f"Seam `{name}`: ") and f"\n{words}" in text, name


@pytest.mark.parametrize("seam", WRAPPED)
def test_installing_again_changes_nothing(seams, seam):
    before = function(WRAPPED[seam])
    seams[seam]()
    assert function(WRAPPED[seam]) is before
    assert not hasattr(before.__wrapped__, "__wrapped__")


@pytest.fixture
def host():
    """A module of ComfyUI, as a seam sees it."""

    def original(a, b=2):
        """Says so."""
        return a, b

    return types.SimpleNamespace(original=original)


@pytest.fixture
def wrap(comfy):
    from fewbits.nodes.bridge.seams.wrap import wrap

    return wrap


def doubled(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


def test_a_wrapped_function_looks_like_the_original_and_runs_around_it(wrap, host):
    original = host.original
    wrap(host, "original", doubled)
    assert host.original(1) == (1, 2, 1, 2) and host.original(1, b=3) == (1, 3, 1, 3)
    assert host.original.__doc__ == "Says so." and host.original.__wrapped__ is original
    assert inspect.signature(host.original) == inspect.signature(original)


def test_another_packs_wrapper_over_ours_is_not_wrapped_again(wrap, host):
    import functools

    wrap(host, "original", doubled)

    @functools.wraps(host.original)
    def theirs(*args, _ours=host.original, **kwargs):
        return _ours(*args, **kwargs)

    host.original = theirs
    wrap(host, "original", doubled)
    assert host.original is theirs


def test_a_method_gets_its_instance_after_the_original(wrap):
    class Patcher:
        def keys(self):
            return [self]

    wrap(Patcher, "keys", doubled)
    patcher = Patcher()
    assert patcher.keys() == [patcher, patcher]


def test_a_function_that_this_comfyui_lacks_is_an_error_for_the_status(wrap, host):
    with pytest.raises(AttributeError, match="gone"):
        wrap(host, "gone", doubled)
