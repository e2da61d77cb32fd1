"""What every node promises to the page: names, tooltips, defaults, help and translations."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IDS = [
    "FewBitsLoadModel", "FewBitsLoadTextEncoder", "FewBitsLoadCheckpoint", "FewBitsQuantizeModel", "FewBitsQuantizeFP8", "FewBitsQuantizeINT8",
    "FewBitsQuantizeNF4", "FewBitsQuantizeFP4", "FewBitsQuantizeTextEncoder",
    "FewBitsCalibrate", "FewBitsCalibrateTextEncoder", "FewBitsSaveCalibration", "FewBitsLoadCalibration", "FewBitsQuantizeFile",
    "FewBitsFitToSize", "FewBitsLayerRules", "FewBitsSaveRecipe", "FewBitsSaveComfyQuant", "FewBitsConvertFP8Scaled", "FewBitsInspectFile",
    "FewBitsFormatAdvisor", "FewBitsQualityReport", "FewBitsCompareModels",
]  # fmt: skip


@pytest.fixture
def nodes(comfy):
    """id -> node class, as ComfyUI gets them."""
    from fewbits.nodes.extension import NODES

    return {node.define_schema().node_id: node for node in NODES}


@pytest.fixture(params=IDS)
def schema(request, nodes):
    return nodes[request.param].define_schema()


def test_the_ids_are_these_for_ever(nodes):
    assert list(nodes) == IDS


def test_names_are_plain_english_in_one_category_tree(schema):
    assert re.fullmatch(r"[A-Z][A-Za-z0-9_ ]+", schema.display_name)
    assert re.fullmatch(r"FewBits/(load|quantize|tools)", schema.category)
    assert schema.description.endswith(".")


def test_every_input_and_output_says_what_it_does(schema):
    for item in (*schema.inputs, *schema.outputs):
        assert item.tooltip and len(item.tooltip) > 15, item.id
    assert [item.id for item in schema.outputs][-1] in ("report", "recipe", "calibration", "path")


def test_what_has_a_default_may_be_left_out_of_an_api_prompt(schema, nodes):
    required = {item.id for item in schema.inputs if not item.optional}
    assert required <= {
        "model", "clip", "file", "type", "format", "filename", "report", "calibration", "latent",
        "model_a", "model_b", "positive", "negative", "latent_image", "vae",
    }  # fmt: skip
    assert all(item.optional for item in schema.inputs if getattr(item, "advanced", None))


def test_a_result_is_never_overwritten_unless_asked(schema):
    for item in schema.inputs:
        if item.id == "overwrite":
            assert item.default is False


def test_schema_arguments_that_this_comfyui_lacks_are_left_out(comfy, monkeypatch):
    from fewbits.nodes import common

    made = common.schema(node_id="FewBitsX", from_the_future=True)
    assert made.node_id == "FewBitsX"
    assert {field.name for field in dataclasses.fields(common.io.Schema)} == common.SCHEMA_FIELDS


def test_the_manager_finds_the_nodes(nodes):
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {name: node.define_schema().display_name for name, node in nodes.items()}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"], ids=["en", "zh"])
def test_every_node_has_a_help_page_that_explains_each_input(nodes, name, page):
    text = (ROOT / "web" / "docs" / page.format(name)).read_text(encoding="utf-8")
    schema = nodes[name].define_schema()
    for item in (*schema.inputs, *schema.outputs):
        assert f"`{item.id}`" in text, item.id
    assert not re.search(r"^\|", text, re.M), "a table does not fit the side bar: write a list"


def test_a_chinese_help_page_calls_inputs_by_their_chinese_names(schema):
    names = node_definitions("zh")[schema.node_id]["inputs"]
    text = (ROOT / "web" / "docs" / schema.node_id / "zh.md").read_text(encoding="utf-8")
    assert [item.id for item in schema.inputs if names[item.id]["name"] not in text] == []


def test_the_api_page_names_every_class_with_what_it_needs(schema):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    needed = ", ".join(f"`{item.id}`" for item in schema.inputs if not item.optional)
    assert f"- `{schema.node_id}` ({schema.display_name}): {needed or 'nothing'}\n" in page


SEARCHES = {
    "save quantized": "FewBitsSaveComfyQuant",
    "nvfp4": "FewBitsQuantizeModel",
    "mxfp8": "FewBitsQuantizeModel",
    "convrot": "FewBitsQuantizeModel",
    "low vram": "FewBitsQuantizeModel",
    "vram": "FewBitsQuantizeModel",
    "smaller model": "FewBitsQuantizeModel",
    "model size": "FewBitsInspectFile",
    "gguf": "FewBitsQuantizeFile",
    "int8": "FewBitsQuantizeFile",
    "fp8": "FewBitsQuantizeFile",
    "nf4": "FewBitsQuantizeFile",
}


@pytest.mark.parametrize(("words", "name"), SEARCHES.items())
def test_what_people_search_for_finds_the_node(nodes, words, name):
    schema = nodes[name].define_schema()
    assert words in [alias.lower() for alias in schema.search_aliases]


def test_no_two_nodes_have_one_name(nodes, comfy):
    import nodes as core  # ComfyUI's module

    names = [node.define_schema().display_name for node in nodes.values()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(core.NODE_DISPLAY_NAME_MAPPINGS.values())


def test_quantize_model_has_every_format(nodes):
    from fewbits.quant_ops.formats import FORMATS

    inputs = {item.id: item for item in nodes["FewBitsQuantizeModel"].define_schema().inputs}
    assert set(inputs["format"].options) == {"auto (best for this GPU)", *FORMATS}


def test_every_node_is_in_a_template(nodes):
    used = set()
    for path in (ROOT / "example_workflows").glob("*.json"):
        used |= {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert set(nodes) - used == set()


def test_every_template_has_a_thumbnail(nodes):
    folder = ROOT / "example_workflows"
    templates = sorted(path.stem for path in folder.glob("*.json"))
    assert templates and templates == sorted(path.stem for path in folder.glob("*.jpg"))
    pictures = {path.read_bytes(): path.stem for path in folder.glob("*.jpg")}
    assert sorted(pictures.values()) == templates  # no two are alike


def test_every_template_has_a_value_for_each_widget_of_its_nodes(nodes):
    """The page takes them in the order of the inputs: one too few, and a later one gets the wrong value."""
    for path in (ROOT / "example_workflows").glob("*.json"):
        for item in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if item["type"] in nodes:
                node = nodes[item["type"]].define_schema()
                linked = {slot["name"] for slot in item["inputs"]}
                widgets = [
                    value.id
                    for value in node.inputs
                    if hasattr(value, "default")
                    and not getattr(value, "force_input", None)
                    and value.id not in linked
                ]
                expected = len(widgets) + ("seed" in widgets)  # with what comes after each run
                assert len(item["widgets_values"]) == expected, (path.name, item["type"], widgets)


def test_no_note_of_a_template_has_code_in_it():
    """ComfyUI's dark theme draws it dark blue on blue."""
    for path in (ROOT / "example_workflows").glob("*.json"):
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        notes = [node["widgets_values"] for node in nodes if node["type"] == "MarkdownNote"]
        assert notes and "`" not in str(notes), path.stem


def node_definitions(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_the_english_texts_are_those_of_the_schemas(nodes):
    wanted = {}
    for name, node in nodes.items():
        schema = node.define_schema()
        wanted[name] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs
            },
            "outputs": {
                str(i): {"name": item.display_name, "tooltip": item.tooltip}
                for i, item in enumerate(schema.outputs)
            },
        }
    assert node_definitions("en") == wanted


def test_the_chinese_texts_cover_the_same_keys_and_are_chinese():
    def compare(english, chinese, path):
        assert type(english) is type(chinese), path
        if isinstance(english, dict):
            assert list(english) == list(chinese), path
            for key in english:
                compare(english[key], chinese[key], f"{path}/{key}")
        elif path.endswith(("tooltip", "description")):
            assert re.search(r"[\u4e00-\u9fff]", chinese), path

    compare(node_definitions("en"), node_definitions("zh"), "")


@pytest.mark.parametrize("value", ["a model", 5, True, [], {"a": 1}, None])
@pytest.mark.parametrize(
    ("node", "name"), [("Calibrate", "model"), ("CalibrateTextEncoder", "clip")]
)
def test_what_is_written_in_place_of_a_connection_is_refused_by_name(comfy, node, name, value):
    from fewbits.nodes import calibrate
    from fewbits.nodes.common import connected
    from fewbits.quant_ops.errors import RecipeError

    cls = connected(type("Asked", (getattr(calibrate, f"FewBits{node}"),), {}))
    with pytest.raises(RecipeError, match=f"{name} is .* a connection to an output of type"):
        cls.execute(**{name: value})


def test_nodes_that_need_no_connection_are_asked_as_before(comfy):
    from fewbits.nodes.common import connected
    from fewbits.nodes.layer_rules import FewBitsLayerRules

    rules = connected(type("Asked", (FewBitsLayerRules,), {}))
    assert rules.execute(text="", recipe=None).args


def test_an_error_of_a_node_shows_marks_that_turn_text_around_as_escapes(comfy):
    from fewbits.nodes.common import connected
    from fewbits.nodes.layer_rules import FewBitsLayerRules
    from fewbits.quant_ops.errors import RecipeError

    rules = connected(type("Asked", (FewBitsLayerRules,), {}))
    with pytest.raises(RecipeError) as refused:
        rules.execute(pattern="a", format="bnb_fp4", options="\u202egpj.exe")
    assert "\\u202egpj.exe" in str(refused.value) and "\u202e" not in str(refused.value)
