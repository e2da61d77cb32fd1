"""The panel and its entry script in a browser, without ComfyUI: the host is a page with two stub modules."""

from __future__ import annotations

import json
import mimetypes
import re

import pytest

pytestmark = pytest.mark.browser

ORIGIN = "http://fewbits.test"
PACK = f"{ORIGIN}/extensions/ComfyUI-FewBits"

# A ComfyUI page reduced to what the script may call. Tests take parts away to play other versions.
HOST = """
class Graph {
  nodes = new Map(); subgraphs = new Map();
  constructor(id) { this.id = id; }
  getNodeById(id) { return this.nodes.get(String(id)) ?? null; }
  add(node) { this.nodes.set(String(node.id), node); node.graph = this; return node; }
}
window.Graph = Graph;
window.events = new EventTarget();
window.answers = {}; // route -> JSON
window.requests = [];
window.prompt = {}; // execution id -> class and inputs
window.refreshed = 0;
window.host = {
  app: {
    graphToPrompt: async () => ({ output: structuredClone(window.prompt) }),
    refreshComboInNodes: async () => { refreshed += 1; },
    rootGraph: new Graph("root"), nodeOutputs: {}, extensions: [],
    registerExtension(extension) { this.extensions.push(extension); },
  },
  api: {
    addEventListener: (...args) => window.events.addEventListener(...args),
    fetchApi: async (route, options) => {
      requests.push([route, options?.body && JSON.parse(options.body)]);
      return { ok: route in answers, json: async () => structuredClone(answers[route]) };
    },
  },
};
window.send = (type, detail) => window.events.dispatchEvent(new CustomEvent(type, { detail }));
window.addNode = (id, graph = host.app.rootGraph, comfyClass = "FewBitsQuantizeINT8", widgets = [], inputs = []) => {
  const node = {
    id, comfyClass, pos: [0, 0], size: [210, 100], widgets, inputs,
    computeSize: () => [210, 100 + 364],
    setSize(size) { this.size = size; },
    addDOMWidget(name, type, element, options) {
      element.style.width = "340px";
      document.body.append(element);
      const widget = { name, type, element, options };
      this.widgets.push(widget);
      return widget;
    },
  };
  graph.add(node);
  for (const extension of host.app.extensions) extension.nodeCreated?.(node);
  return node;
};
"""
# A graph in which nodes can be made, connected and moved.
GRAPH = """
{
  const graph = host.app.rootGraph;
  const byId = new Map();
  let links = {};
  Object.assign(graph, {
    nodes: [],
    links,
    getNodeById: (id) => byId.get(String(id)) ?? null,
    add(node) {
      node.id ??= 100 + graph.nodes.filter(({ id }) => id >= 100).length;
      graph.nodes.push(node);
      byId.set(String(node.id), node);
      node.graph = graph;
      return node;
    },
  });
  window.connect = function (slot, target, input) {
    const id = Object.keys(links).length + 1;
    links[id] = { origin_id: this.id, origin_slot: slot, target_id: target.id, target_slot: input };
    target.inputs[input].link = id;
  };
  window.links = (id) => {
    const inputs = graph.getNodeById(id).inputs;
    const found = inputs.map(({ link }, slot) => link && [links[link], slot]).filter(Boolean);
    return found.map(([link, slot]) => `${link.origin_id}:${link.origin_slot} -> ${slot}`);
  };
  window.overlapping = () => {
    const within = (a, b) => [0, 1].every((i) => a.pos[i] < b.pos[i] + b.size[i] && b.pos[i] < a.pos[i] + a.size[i]);
    return graph.nodes.flatMap((a, i) => graph.nodes.slice(i + 1).filter((b) => within(a, b)).map((b) => [a.id, b.id]));
  };
  window.LiteGraph = {
    createNode: (comfyClass) => ({
      comfyClass, connect, pos: [0, 0], size: [360, 400], inputs: [{ name: "recipe" }],
      widgets: [{ name: "pattern", value: "" }, { name: "format", value: "keep" }, { name: "options", value: "" }],
    }),
  };
}
"""
STUBS = {
    "/scripts/app.js": "export const app = window.host.app;",
    "/scripts/api.js": "export const api = window.host.api;",
}

PLAN = {
    "family": "flux",
    "family_title": "Flux.1",
    "min_comfyui": "0.27.0",
    "requires_pack": False,
    "loads_in": "loads in stock ComfyUI >= 0.27.0",
    "bytes_before": 13_611_136,
    "bytes_after": 7_396_468,
    "summary": [
        {
            "format": "int8_tensorwise",
            "layers": 22,
            "bytes_before": 12_582_912,
            "bytes_after": 6_368_244,
        },
        {"format": "keep", "layers": 8, "bytes_before": 1_028_224, "bytes_after": 1_028_224},
    ],
    "layers": [
        {
            "name": f"single_blocks.{i}.linear{1 + i % 2}",
            "action": "quantize" if i else "keep",
            "format": "int8_tensorwise" if i else None,
            "method": "nearest",
            "dtype": "BF16",
            "shape": [256, 1280],
            "bytes_before": 655_360,
            "bytes_after": 328_774 if i else 655_360,
            "reason": "primary" if i else "preset flux: first projection",
        }
        for i in range(30)
    ],
    "unmatched": ["double_stream.*", "img_mlp"],
    "warnings": ["rule 'img_mlp' matched nothing"],
}
REPORT = {
    **PLAN,
    "layers": [{**row, "rel_l2": 0.0077, "sqnr_db": 42.3} for row in PLAN["layers"]],
    "rel_l2": 0.00768,
    "worst": [
        {
            "name": f"single_blocks.{i}.linear2",
            "format": "int8_tensorwise",
            "rel_l2": 0.01 - i / 1000,
            "sqnr_db": 40.0 + i,
        }
        for i in range(5)
    ],
    "seconds": 12.4,
    "device": "cpu",
    "fewbits": "0.1.0",
}


def progress(
    done: int, total: int = 1_000_000_000, seconds: float = 2.0, node_id: str = "12"
) -> dict:
    eta = seconds * (total - done) / done if done else None
    layer = f"single_blocks.{done // 50_000_000}.linear1"
    return {
        "node_id": node_id,
        "layer": layer,
        "done": done,
        "total": total,
        "seconds": seconds,
        "eta_seconds": eta,
    }


@pytest.fixture
def page(new_page, web):
    """An empty page of the stub host; every request is answered from `web/` or the stubs, none leaves the machine."""
    page = new_page()

    def answer(route):
        path = re.sub(r"^https?://[^/]+|\?.*$", "", route.request.url)
        if path == "/":
            route.fulfill(body="<!doctype html><body></body>", content_type="text/html")
        elif path in STUBS:
            route.fulfill(body=STUBS[path], content_type="text/javascript")
        else:
            file = web / path.removeprefix("/extensions/ComfyUI-FewBits/")
            kind = (
                "text/javascript" if file.suffix == ".mjs" else mimetypes.guess_type(file.name)[0]
            )
            route.fulfill(path=file, content_type=kind)

    page.route("**/*", answer)
    page.goto(ORIGIN)
    page.evaluate(HOST)
    yield page
    assert page.messages == []


@pytest.fixture
def panel(page):
    """The panel of node 12, with the entry script running."""
    load(page)
    page.evaluate("addNode(12)")
    page.wait_for_function(
        "getComputedStyle(document.querySelector('.fewbits-panel')).position === 'relative'"
    )
    return page.locator(".fewbits-panel")


def load(page) -> None:
    page.evaluate(f"import('{PACK}/fewbits.js')")


def send(page, event: str, detail: dict) -> None:
    page.evaluate("([event, detail]) => send(event, detail)", [event, detail])


def finish(page, report: dict, node_id: str = "12") -> None:
    page.evaluate(
        "([id, report]) => host.app.rootGraph.getNodeById(id).onExecuted({ fewbits_report: [report] })",
        [node_id, report],
    )


def phase(panel) -> str:
    return panel.get_attribute("data-phase")


def line(panel) -> str:
    return panel.locator(".fewbits-line").inner_text().replace("\n", " ").strip()


def cells(panel, table: str) -> list[list[str]]:
    rows = panel.locator(f"{table} tr").all()
    return [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows]


# ---- numbers as text ----


TEXTS = {
    "bytes(0)": "0 B",
    "bytes(999)": "999 B",
    "bytes(66606)": "66.61 kB",
    "bytes(13611136)": "13.61 MB",
    "bytes(23.8e9)": "23.80 GB",
    "bytes(undefined)": "–",
    "change(100, 54)": "46% smaller",
    "change(100, 150)": "50% larger",
    "change(1000, 1001)": "same size",
    "change(0, 5)": "",
    "percent(999, 1000)": "99",
    "percent(1000, 1000)": "100",
    "percent(1, 0)": "0",
    "rate(1e9, 2)": "500 MB/s",
    "rate(4.5e6, 1)": "4.5 MB/s",
    "rate(0, 0)": "",
    "duration(0.207)": "0.2 s",
    "duration(9.96)": "10 s",
    "duration(59.6)": "1 min 0 s",
    "duration(75)": "1 min 15 s",
    "duration(7320)": "2 h 2 min",
    "timeLeft(0.3)": "under 1 s left",
    "timeLeft(1.2)": "2 s left",
    "timeLeft(75)": "1 min 15 s left",
    "timeLeft(null)": "",
    "relL2(0.00768)": "0.0077",
    "relL2(0.00001)": "1e-5",
    "relL2(0)": "0",
    "relL2(NaN)": "–",
    "decibels(42.31)": "42.3 dB",
    "decibels(null)": "exact",
    "sentence('loads in stock ComfyUI')": "Loads in stock ComfyUI",
}


def test_numbers_read_as_people_write_them(page):
    calls = ", ".join(f"[{json.dumps(call)}, String({call})]" for call in TEXTS)
    names = ", ".join(sorted({call.split("(")[0] for call in TEXTS}))
    assert (
        dict(page.evaluate(f"import('{PACK}/text.mjs').then(({{ {names} }}) => [{calls}])"))
        == TEXTS
    )


# ---- the panel's phases ----


def test_a_new_node_has_an_empty_panel_with_room_reserved(page, panel):
    assert phase(panel) == "idle"
    assert line(panel) == "Run the workflow to see the plan"
    assert cells(panel, ".fewbits-formats") == [
        ["Format", "Layers", "Before", "After"],
        ["Total", "–", "–", "–"],
    ]
    assert page.evaluate("host.app.rootGraph.getNodeById(12).size") == [360, 464]
    widget = page.evaluate(
        "(({ options, serialize }) => [options.serialize, serialize, options.getMinHeight()])"
        "(host.app.rootGraph.getNodeById(12).widgets[0])"
    )
    assert widget == [False, False, 364]


def test_the_plan_shows_every_format_and_the_total(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    assert phase(panel) == "planned"
    assert cells(panel, ".fewbits-formats") == [
        ["Format", "Layers", "Before, MB", "After, MB"],
        ["int8_tensorwise", "22", "12.58", "6.37"],
        ["keep", "8", "1.03", "1.03"],
        ["Total", "30", "13.61", "7.40"],
    ]
    assert panel.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "–"]
    assert panel.locator(".fewbits-label").first.inner_text() == "46% smaller"
    assert (
        panel.locator(".fewbits-loads").inner_text() == "Flux.1 · Loads in stock ComfyUI >= 0.27.0"
    )
    assert panel.locator(".fewbits-notes li").all_inner_texts() == [
        "rule 'img_mlp' matched nothing",
        "'double_stream.*' matched no layer",
    ]


def test_progress_shows_layer_percent_rate_and_time_left(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    bar = panel.get_by_role("progressbar")
    assert phase(panel) == "running"
    assert line(panel) == "single_blocks.8.linear1 42% · 210 MB/s · 3 s left"
    assert bar.get_attribute("aria-valuenow") == "42"
    assert bar.get_attribute("aria-valuetext") == "42%, single_blocks.8.linear1"
    assert panel.get_attribute("aria-busy") == "true"
    send(page, "fewbits.progress", progress(1_000_000_000))
    assert line(panel) == "Finishing 100% · 500 MB/s"


def test_progress_makes_no_elements(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(1))
    page.evaluate(
        "window.made = 0; new MutationObserver((records) => { for (const { addedNodes } of records) for (const node of"
        " addedNodes) made += node.nodeType === 1; }).observe(document.body, { childList: true, subtree: true })"
    )
    for done in range(50_000_000, 1_000_000_001, 50_000_000):
        send(page, "fewbits.progress", progress(done))
    assert page.evaluate("made") == 0


def test_the_report_shows_the_error_and_the_five_worst_layers(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(1_000_000_000))
    finish(page, REPORT)
    assert phase(panel) == "done"
    assert line(panel) == "Done in 12 s on cpu"
    assert panel.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "0.0077"]
    assert cells(panel, ".fewbits-worst")[:3] == [
        ["Largest errors", "rel_l2", "SQNR"],
        ["single_blocks.0.linear2", "0.0100", "40.0 dB"],
        ["single_blocks.1.linear2", "0.0090", "41.0 dB"],
    ]
    assert len(cells(panel, ".fewbits-worst")) == 6
    assert panel.get_by_role("progressbar").get_attribute("aria-valuenow") == "100"


def test_the_layer_list_is_made_when_opened_and_filters_by_every_word(page, panel):
    finish(page, REPORT)
    layers = panel.locator(".fewbits-layers li")
    assert layers.count() == 0
    panel.get_by_text("All 30 layers").click()
    assert layers.count() == 30
    texts = layers.nth(0).inner_text().split("\n")
    assert texts == [
        "single_blocks.0.linear1",
        "0.0077",
        "keep",
        "256 × 1280 BF16",
        "655.36 kB",
        "preset flux: first projection",
    ]
    assert (
        layers.nth(1).locator(".fewbits-facts").inner_text().split("\n")[2]
        == "655.36 kB → 328.77 kB"
    )
    panel.get_by_label("Filter layers").fill("linear2 PRIMARY")
    assert panel.locator(".fewbits-layers li:visible").count() == 15
    assert panel.locator(".fewbits-count").inner_text() == "15 of 30"


def quantize_node(page, keep: str = "") -> object:
    """Node 12 with the inputs that a click on a layer may write to, and the formats of the server."""
    answer(page, "/fewbits/formats", {"int8_tensorwise": {}, "bnb_nf4": {}, "other": {}})
    page.evaluate(GRAPH)
    load(page)
    page.wait_for_function("host.app.extensions.length === 1")
    page.evaluate(
        """(keep) => addNode(12, host.app.rootGraph, "FewBitsQuantizeINT8", [
          { name: "format", value: "int8_tensorwise" },
          { name: "keep", value: keep, options: {} },
        ], [{ name: "model" }, { name: "recipe" }])""",
        keep,
    )
    page.wait_for_function("requests.some(([route]) => route === '/fewbits/formats')")
    return page.locator(".fewbits-panel")


def open_layers(page, panel, **changed: object) -> None:
    layers = [{**row, "rel_l2": i / 1000, **changed} for i, row in enumerate(REPORT["layers"])]
    finish(page, {**REPORT, "layers": layers})
    panel.get_by_text("All 30 layers").click()


def names(panel) -> list[str]:
    return panel.locator(".fewbits-layers li .fewbits-name").all_inner_texts()


def give(panel, layer: str, format: str) -> None:
    menu = panel.get_by_label(f"Format of {layer}")
    menu.focus()
    menu.select_option(format)


def widgets(page, node: int) -> dict:
    return page.evaluate(
        "(id) => Object.fromEntries(host.app.rootGraph.getNodeById(id).widgets"
        ".filter((w) => w.name !== 'fewbits_panel').map((w) => [w.name, w.value]))",
        node,
    )


def test_the_layer_list_sorts_by_error_size_and_depth(page):
    panel = quantize_node(page)
    open_layers(page, panel)
    assert names(panel)[0] == "single_blocks.0.linear1"
    order = panel.get_by_label("Order of the layers")
    order.select_option("Largest error first")
    assert names(panel)[0] == "single_blocks.29.linear2"
    order.select_option("Largest size first")
    assert names(panel)[0] == "single_blocks.0.linear1"
    shuffled = ["img_in", "blocks.10.a", "blocks.2.b", "blocks.2.a", "out.0"]
    rows = [{**REPORT["layers"][1], "name": name} for name in shuffled]
    finish(page, {**REPORT, "layers": rows})
    order.select_option("From the first block to the last")
    assert names(panel) == ["img_in", "blocks.2.b", "blocks.2.a", "blocks.10.a", "out.0"]


def test_a_layer_is_kept_by_its_menu_and_let_go_again(page):
    panel = quantize_node(page, keep="a.*")
    open_layers(page, panel, rule="primary")
    layer = "single_blocks.3.linear2"
    give(panel, layer, "keep")
    give(panel, "single_blocks.1.linear2", "keep")
    assert widgets(page, 12)["keep"] == f"a.*\n{layer}\nsingle_blocks.1.linear2"
    give(panel, layer, "int8_tensorwise")  # nobody said anything else about it
    assert widgets(page, 12)["keep"] == "a.*\nsingle_blocks.1.linear2"
    assert page.evaluate("host.app.rootGraph.nodes.length") == 1


def test_a_layer_gets_another_format_from_rules_that_are_put_before_the_node(page):
    panel = quantize_node(page)
    open_layers(page, panel, rule="primary")
    give(panel, "single_blocks.3.linear2", "bnb_nf4")
    give(panel, "single_blocks.5.linear2", "bnb_nf4")
    assert widgets(page, 100) == {
        "pattern": "single_blocks.3.linear2\nsingle_blocks.5.linear2",
        "format": "bnb_nf4",
        "options": "",
    }
    assert page.evaluate("links(12)") == ["100:0 -> 1"]
    # another format does not fit into those: new rules, which count before them
    give(panel, "single_blocks.3.linear2", "int8_tensorwise")
    give(panel, "single_blocks.9.linear2", "other")
    assert widgets(page, 100)["pattern"] == "single_blocks.5.linear2"
    assert widgets(page, 101) == {
        "pattern": "single_blocks.9.linear2",
        "format": "other",
        "options": "",
    }
    assert page.evaluate("links(12)") == ["101:0 -> 1"]
    assert page.evaluate("links(101)") == ["100:0 -> 0"]
    assert page.evaluate("overlapping()") == []


def test_rules_that_a_person_wrote_options_for_are_not_added_to(page):
    panel = quantize_node(page)
    page.evaluate(
        """() => {
          const rules = LiteGraph.createNode("FewBitsLayerRules");
          host.app.rootGraph.add(rules);
          rules.widgets.find((w) => w.name === "pattern").value = "blocks.*";
          rules.widgets.find((w) => w.name === "format").value = "bnb_nf4";
          rules.widgets.find((w) => w.name === "options").value = "method=svd";
          rules.connect(0, host.app.rootGraph.getNodeById(12), 1);
        }"""
    )
    open_layers(page, panel, rule="primary")
    give(panel, "single_blocks.3.linear2", "bnb_nf4")
    assert widgets(page, 100)["pattern"] == "blocks.*"
    assert widgets(page, 101)["pattern"] == "single_blocks.3.linear2"
    assert page.evaluate("links(101)") == ["100:0 -> 0"]


def test_the_filter_stays_readable_above_a_scrolled_list(page):
    panel = quantize_node(page)
    open_layers(page, panel, rule="primary")
    panel.locator(".fewbits-layers li").last.scroll_into_view_if_needed()
    seen = "(field) => { const box = field.getBoundingClientRect();" \
           " return document.elementFromPoint(box.x + 9, box.y + box.height / 2) === field; }"  # fmt: skip
    assert panel.get_by_label("Filter layers").evaluate(seen)


def test_what_can_not_be_quantized_has_no_menu(page):
    panel = quantize_node(page)
    open_layers(page, panel, rule="", reason="not a linear layer")
    assert panel.locator(".fewbits-choice").count() == 0
    assert panel.locator(".fewbits-reason").first.inner_text() == "not a linear layer"


def test_that_a_layer_is_like_all_is_not_said(page):
    panel = quantize_node(page)
    open_layers(page, panel, reason="primary")
    assert panel.locator(".fewbits-reason").count() == 0
    open_again = [{**row, "reason": "primary; narrow"} for row in REPORT["layers"]]
    finish(page, {**REPORT, "layers": open_again})
    assert panel.locator(".fewbits-reason").first.inner_text() == "narrow"


def test_unusual_errors_have_a_colour(page, panel):
    errors = [0.02 if i == 7 else 0.01 + i / 100_000 for i in range(30)]
    layers = [
        {**row, "format": "int8_tensorwise", "rel_l2": error}
        for row, error in zip(REPORT["layers"], errors, strict=True)
    ]
    worst = sorted(layers, key=lambda row: -row["rel_l2"])[:5]
    finish(page, {**REPORT, "layers": layers, "worst": worst})
    panel.get_by_text("All 30 layers").click()
    unusual = panel.locator(".fewbits-outlier")
    assert unusual.all_inner_texts() == ["0.0200", "0.0200"]  # among the worst, and in the list
    assert "unusually much for int8_tensorwise" in unusual.first.get_attribute("title")


def test_what_is_typed_into_rules_is_planned_at_once(page, panel):
    answer(page, "/fewbits/plan", {"plan": PLAN, "sizes": {}})
    page.evaluate(
        "addNode(13, host.app.rootGraph, 'FewBitsLayerRules', [{ name: 'pattern', value: '' }])"
    )
    set_prompt(page, PROMPT)
    page.evaluate("host.app.rootGraph.getNodeById(13).widgets[0].callback('blocks.*')")
    wait_for(page, "dataset.phase === 'preview'")


def test_an_open_list_keeps_filter_and_focus_when_the_report_arrives(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    panel.get_by_text("All 30 layers").click()
    panel.get_by_label("Filter layers").press_sequentially("linear2")
    finish(page, REPORT)
    assert page.evaluate("document.activeElement.value") == "linear2"
    assert panel.locator(".fewbits-layers li:visible").count() == 15
    assert "0.0077" in panel.locator(".fewbits-layers li:visible").first.inner_text()


def test_nothing_a_run_sends_changes_the_size_of_the_panel(page, panel):
    long = {
        **REPORT,
        "family": "f" * 300,
        "warnings": ["w" * 500] * 9,
        "worst": [{"name": "n." * 200, "rel_l2": 1.0}],
    }
    long["summary"] = [
        {"format": "format_" * 40, "layers": 1, "bytes_before": 10**15, "bytes_after": 1}
    ] * 30
    steps = (
        lambda: None,
        lambda: send(page, "fewbits.plan", {"node_id": "12", "plan": long}),
        lambda: send(page, "fewbits.progress", {**progress(1), "layer": "layer." * 100}),
        lambda: finish(page, long),
        lambda: panel.locator("summary").click(),
    )
    for width in (180, 240, 340, 900):
        page.evaluate(f"document.querySelector('.fewbits-panel').style.width = '{width}px'")
        for step in steps:
            step()
            box = panel.bounding_box()
            assert (box["width"], box["height"]) == (width, 344)
            sideways = "(e) => [e, ...e.querySelectorAll('.fewbits-scroll')].map((e) => e.scrollWidth - e.clientWidth)"
            assert panel.evaluate(sideways) == [0, 0]


def test_text_from_a_file_is_never_markup(page, panel):
    bad = "<img src=x onerror=send('hit')>"
    finish(
        page,
        json.loads(
            json.dumps(REPORT).replace("single_blocks", bad).replace("int8_tensorwise", bad)
        ),
    )
    panel.locator("summary").click()
    assert panel.locator("img").count() == 0
    assert bad in panel.inner_text()


def test_an_almost_empty_report_still_draws(page, panel):
    finish(page, {})
    assert phase(panel) == "done"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "0", "–", "–"]


# ---- how runs end ----


def test_a_cancelled_run_keeps_its_plan_and_says_where_it_stopped(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    send(page, "execution_interrupted", {"node_id": "12"})
    assert (phase(panel), line(panel)) == ("stopped", "Cancelled at 42%")
    assert panel.get_by_role("progressbar").get_attribute("aria-valuenow") == "42"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]


def test_a_failed_run_shows_the_whole_message(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    message = "model.safetensors: layer 'a': weight has non-finite values\nsecond line\n"
    send(page, "execution_error", {"node_id": "12", "exception_message": message})
    assert (phase(panel), line(panel)) == ("failed", "Failed at 42%")
    assert panel.locator(".fewbits-error li").inner_text() == message.strip()


def test_a_failure_before_the_plan_does_not_show_the_run_before(page, panel):
    finish(page, REPORT)
    send(page, "execution_start", {})
    send(page, "execution_error", {"node_id": "12", "exception_message": "no such file"})
    assert (phase(panel), line(panel)) == ("failed", "Failed")
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "–", "–", "–"]


def test_an_error_in_another_node_leaves_a_finished_report_alone(page, panel):
    finish(page, REPORT)
    send(page, "execution_error", {"node_id": "99", "exception_message": "boom"})
    assert phase(panel) == "done"


def test_a_run_that_starts_again_clears_the_old_error(page, panel):
    finish(page, REPORT)
    send(page, "execution_start", {})
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    assert panel.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "–"]
    assert panel.locator(".fewbits-worst").count() == 0


def test_a_lost_connection_is_said_and_progress_resumes(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(100_000_000))
    send(page, "reconnecting", {})
    assert line(panel) == "Connection lost at 10%"
    send(page, "fewbits.progress", progress(200_000_000))
    assert phase(panel) == "running"


def test_an_empty_panel_says_when_comfyui_reuses_an_earlier_result(page, panel):
    send(page, "execution_cached", {"nodes": ["3", "12"]})
    assert line(panel) == "Unchanged: ComfyUI reuses its earlier result"
    finish(page, REPORT)
    send(page, "execution_cached", {"nodes": ["12"]})
    assert phase(panel) == "done"


def test_a_success_without_a_report_is_done(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "execution_success", {})
    assert (phase(panel), line(panel)) == ("done", "Done")


# ---- finding the node ----


def test_a_node_inside_subgraphs_is_found_by_its_path(page, panel):
    page.evaluate(
        "const sub = new Graph('uuid-1'); host.app.rootGraph.subgraphs.set(sub.id, sub);"
        "host.app.rootGraph.add({ id: 5, subgraph: sub }); addNode(7, sub)"
    )
    panel, inner = panel.nth(0), panel.nth(1)
    send(page, "fewbits.plan", {"node_id": "5:7", "plan": PLAN})
    assert (phase(panel), phase(inner)) == ("idle", "planned")
    page.evaluate(
        "(report) => host.app.extensions[0].onNodeOutputsUpdated({ 'uuid-1:7': { fewbits_report: [report] } })",
        REPORT,
    )
    assert (phase(panel), phase(inner)) == ("idle", "done")


def test_a_node_recreated_while_it_runs_gets_its_plan_back(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    page.evaluate("document.body.replaceChildren(); addNode(12)")  # what undo does
    send(page, "fewbits.progress", progress(420_000_000))
    assert phase(panel) == "running"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]


def test_progress_without_a_plan_shows_progress(page, panel):
    send(page, "fewbits.progress", progress(420_000_000))  # the page was reloaded during the run
    assert phase(panel) == "running"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "–", "–", "–"]


@pytest.mark.parametrize(
    "hook",
    [
        "loadedGraphNode(host.app.rootGraph.getNodeById(12))",
        "onNodeOutputsUpdated(host.app.nodeOutputs)",
    ],
)
def test_stored_outputs_come_back(page, panel, hook):
    page.evaluate(
        "(report) => { host.app.nodeOutputs = { 12: { fewbits_report: [report] } }; }", REPORT
    )
    page.evaluate(f"host.app.extensions[0].{hook}")
    assert phase(panel) == "done"


def test_other_nodes_get_no_panel(page, panel):
    page.evaluate(
        "addNode(13, host.app.rootGraph, 'KSampler'); addNode(14, host.app.rootGraph, 'FewBitsLayerRules')"
    )
    assert panel.count() == 1


def test_messages_about_unknown_nodes_and_broken_ones_change_nothing(page, panel):
    for event in (
        "fewbits.plan",
        "fewbits.progress",
        "execution_error",
        "execution_interrupted",
        "execution_cached",
    ):
        for detail in ({}, {"node_id": None}, {"node_id": "999"}, {"node_id": "5:6:7"}):
            send(page, event, detail)
    send(page, "fewbits.plan", {"node_id": "12", "plan": None})
    page.evaluate("host.app.rootGraph.getNodeById(12).onExecuted(null)")
    page.evaluate("host.app.extensions[0].onNodeOutputsUpdated(undefined)")
    assert phase(panel) == "idle"


# ---- hosts that lack something: the page fixture asserts that nothing was logged or thrown ----


@pytest.mark.parametrize(
    "missing",
    [
        "delete host.app.registerExtension",
        "delete host.api.addEventListener",
        "delete host.app.rootGraph",
        "host.app.rootGraph = {}",
        "delete host.app.nodeOutputs",
    ],
)
def test_the_script_is_silent_where_the_host_lacks_something(page, missing):
    page.evaluate(f"window.kept = host.app.rootGraph; {missing}")
    load(page)
    page.evaluate("addNode(12, kept)")
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(1))
    send(page, "execution_error", {"node_id": "12", "exception_message": "x"})
    page.evaluate("for (const e of host.app.extensions) e.loadedGraphNode(kept.getNodeById(12))")
    page.evaluate("for (const e of host.app.extensions) e.onNodeOutputsUpdated({ 12: {} })")


@pytest.mark.parametrize("missing", ["addDOMWidget", "computeSize", "setSize"])
def test_the_script_is_silent_where_a_node_lacks_something(page, missing):
    load(page)
    page.evaluate(
        "(missing) => { const add = host.app.extensions[0].nodeCreated; host.app.extensions[0].nodeCreated ="
        " (node) => { delete node[missing]; add(node); }; addNode(12); }",
        missing,
    )
    assert page.locator(".fewbits-panel").count() == (missing != "addDOMWidget")


# ---- the room of a tall node ----


def test_a_tall_node_gives_its_room_to_the_panel_alone(page, panel):
    page.evaluate(
        """() => {
          const grid = document.createElement("div");
          grid.className = "lg-node-widgets";
          grid.style.cssText = "display: grid; height: 900px; width: 340px";
          window.show = (rows) => { grid.style.gridTemplateRows = rows; };
          const text = document.createElement("textarea");
          text.style.cssText = "min-height: 64px; height: 64px; box-sizing: border-box";
          const row = document.createElement("div");
          row.append(document.querySelector(".fewbits-panel"));
          row.style.cssText = "display: grid";
          grid.append(document.createElement("p"), text, row);
          document.body.append(grid);
          show("min-content auto auto");
        }"""
    )
    page.wait_for_function("document.querySelector('.fewbits-panel').offsetHeight > 750")
    page.evaluate("show('min-content  auto auto')")  # the page writes them again
    page.wait_for_function(
        "document.querySelector('.lg-node-widgets').style.gridTemplateRows ==="
        " 'min-content min-content auto'"
    )


# ---- results of earlier runs ----

PROMPT = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a.safetensors"}},
    "12": {"class_type": "FewBitsQuantizeINT8", "inputs": {"model": ["1", 0], "keep": ""}},
}


def history(prompt: dict, report: dict = REPORT, key: str = "fewbits_report") -> dict:
    return {"p1": {"prompt": [1, "p1", prompt, {}, ["12"]], "outputs": {"12": {key: [report]}}}}


def answer(page, route: str, data: object) -> None:
    page.evaluate("([route, data]) => { answers[route] = data; }", [route, data])


def set_prompt(page, prompt: dict) -> None:
    page.evaluate("(value) => { window.prompt = value; }", prompt)


def wait_for(page, condition: str) -> None:
    page.wait_for_function(f"document.querySelector('.fewbits-panel').{condition}", timeout=20_000)


def changed(prompt: dict, node: str, **inputs: object) -> dict:
    return {
        **prompt,
        node: {**prompt[node], "inputs": {**prompt[node]["inputs"], **inputs}},
    }


def reload(page) -> None:
    """What the page does with a stored workflow after a reload: outputs are gone."""
    page.evaluate("host.app.extensions[0].loadedGraphNode(host.app.rootGraph.getNodeById(12))")


def test_a_reload_brings_back_the_report_of_the_same_settings(page, panel):
    answer(page, "/history?max_items=64", history(PROMPT))
    set_prompt(page, PROMPT)
    reload(page)
    wait_for(page, "dataset.phase === 'done'")
    assert line(panel) == "Done in 12 s on cpu"
    assert panel.get_by_text("All 30 layers").is_visible()


@pytest.mark.parametrize("node, inputs", [("12", {"keep": "x"}), ("1", {"unet_name": "b"})])
def test_a_report_of_other_settings_does_not_come_back(page, panel, node, inputs):
    answer(page, "/history?max_items=64", history(changed(PROMPT, node, **inputs)))
    set_prompt(page, PROMPT)
    reload(page)
    page.wait_for_timeout(600)
    assert phase(panel) == "idle"


def test_a_run_answered_from_the_cache_shows_its_earlier_report(page, panel):
    send(page, "execution_start", {})
    send(page, "execution_cached", {"nodes": ["1", "12"]})
    send(page, "executed", {"node": "12", "output": {"fewbits_report": [REPORT]}, "prompt_id": "p"})
    assert line(panel) == "Unchanged · Done in 12 s on cpu"
    finish(page, REPORT)
    assert phase(panel) == "done"
    assert page.evaluate("refreshed") == 0


def test_an_older_comfyui_that_sends_nothing_for_the_cache_is_asked_for_its_history(page, panel):
    answer(page, "/history?max_items=64", history(PROMPT))
    set_prompt(page, PROMPT)
    send(page, "execution_start", {})
    send(page, "execution_cached", {"nodes": ["1", "12"]})
    send(page, "execution_success", {})
    wait_for(page, "dataset.phase === 'done'")
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]


def test_a_page_reloaded_during_a_run_gets_the_plan(page, panel):
    answer(page, "/fewbits/running", {"12": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    page.wait_for_function(
        "document.querySelector('.fewbits-formats tfoot').textContent.includes('13.61')"
    )
    send(page, "fewbits.progress", progress(430_000_000))
    assert phase(panel) == "running"


def test_a_failure_is_gone_when_the_next_run_starts(page, panel):
    answer(page, "/history?max_items=64", history(PROMPT))
    set_prompt(page, changed(PROMPT, "12", keep="re:("))
    send(page, "execution_error", {"node_id": "12", "exception_message": "boom"})
    assert phase(panel) == "failed"
    set_prompt(page, PROMPT)
    send(page, "execution_start", {})
    assert phase(panel) == "idle" and panel.locator(".fewbits-error").count() == 0
    send(page, "execution_cached", {"nodes": ["1", "12"]})
    wait_for(page, "dataset.phase === 'done'")


def test_a_failure_is_gone_when_the_loader_before_it_fails(page, panel):
    send(page, "execution_error", {"node_id": "12", "exception_message": "boom"})
    send(page, "execution_start", {})
    send(page, "execution_error", {"node_id": "1", "exception_message": "no such file"})
    assert phase(panel) == "idle" and panel.locator(".fewbits-error").count() == 0


def test_a_result_is_greyed_when_a_setting_changes_and_back_when_it_returns(page, panel):
    answer(page, "/history/p1", history(PROMPT))
    set_prompt(page, PROMPT)
    send(
        page, "executed", {"node": "12", "output": {"fewbits_report": [REPORT]}, "prompt_id": "p1"}
    )
    for prompt in (changed(PROMPT, "12", keep="x"), changed(PROMPT, "1", unet_name="b")):
        set_prompt(page, prompt)
        send(page, "graphChanged", {})
        wait_for(page, "hasAttribute('data-stale')")
        assert line(panel) == "Settings changed: run again for their result"
        set_prompt(page, PROMPT)
        send(page, "graphChanged", {})
        wait_for(page, "hasAttribute('data-stale') === false")
        assert line(panel) == "Done in 12 s on cpu"


# ---- before a run ----


def test_the_plan_is_shown_before_a_run_and_again_when_a_setting_changes(page, panel):
    target = {"path": "output/diffusion_models/a_int8.safetensors", "exists": True}
    sizes = {"int8_tensorwise": 7_396_468, "nvfp4": 4_000_000}
    answer(page, "/fewbits/plan", {"plan": PLAN, "sizes": sizes, "target": target})
    set_prompt(page, {**PROMPT, "99": {"class_type": "KSampler", "inputs": {"model": ["12", 0]}}})
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'preview'")
    assert line(panel) == "Before running, from the file's header"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]
    assert "This file exists" in panel.inner_text()
    panel.get_by_text("Size in every format").first.click()
    assert cells(panel, ".fewbits-sizes") == [
        ["nvfp4", "4.00 MB"],
        ["int8_tensorwise", "7.40 MB"],
    ]
    asked = page.evaluate("requests.filter(([route]) => route === '/fewbits/plan')")
    assert asked == [["/fewbits/plan", {"prompt": PROMPT, "id": "12"}]]  # and nothing after it
    send(page, "graphChanged", {})
    page.wait_for_timeout(500)
    assert page.evaluate("requests.filter(([route]) => route === '/fewbits/plan').length") == 1
    set_prompt(page, changed(PROMPT, "12", keep="x"))
    answer(page, "/fewbits/plan", {"error": "pattern 're:(' is not a regular expression"})
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'idle'")
    assert "is not a regular expression" in panel.locator(".fewbits-notes").inner_text()


def test_a_preview_gives_way_to_the_run(page, panel):
    answer(page, "/fewbits/plan", {"plan": PLAN, "sizes": {}})
    set_prompt(page, PROMPT)
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'preview'")
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    assert phase(panel) == "planned"


# ---- files ----

SAVED = {
    "output": "/comfy/output/diffusion_models/flux_int8.safetensors",
    "saved": {
        "path": "output/diffusion_models/flux_int8.safetensors",
        "loader": "Load Diffusion Model",
        "name": "flux_int8.safetensors",
    },
}


def test_a_written_file_is_named_with_its_loader_and_can_be_copied(page, panel):
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard',"
        " { value: { writeText: async (text) => { window.copied = text; } } })"
    )
    output = {"fewbits_report": [{**REPORT, **SAVED}]}
    send(page, "executed", {"node": "12", "output": output, "prompt_id": "p1"})
    assert panel.locator(".fewbits-saved code").inner_text() == SAVED["saved"]["path"]
    assert (
        "Loads with Load Diffusion Model as flux_int8.safetensors"
        in panel.locator(".fewbits-saved").inner_text()
    )
    panel.get_by_role("button", name="Copy path").click()
    assert page.evaluate("copied") == SAVED["output"]
    assert page.evaluate("refreshed") == 1  # the loaders list the new file


def test_a_recipe_is_no_model_and_has_no_sizes(page, panel):
    page.evaluate("addNode(13, host.app.rootGraph, 'FewBitsSaveRecipe')")
    other = panel.nth(1)
    assert other.inner_text().strip() == "Run the workflow to write the file"
    saved = {"path": "output/recipes/a.toml", "loader": None, "name": None}
    page.evaluate(
        "(saved) => host.app.rootGraph.getNodeById(13).onExecuted({ fewbits_saved: [saved] })",
        {"output": "/comfy/output/recipes/a.toml", "saved": saved, "text": "recipe"},
    )
    shown = other.inner_text()
    assert "paste into Layer Rules" in shown and "model folders" not in shown
    assert "–" not in shown


def test_a_page_without_a_clipboard_selects_the_path(page, panel):
    finish(page, {**REPORT, **SAVED})
    panel.get_by_role("button", name="Copy path").click()
    page.wait_for_function(
        "getSelection().toString() === 'output/diffusion_models/flux_int8.safetensors'"
    )


INSPECTION = {
    "name": "flux_nf4.safetensors",
    "bytes": 7_000_000,
    "tensors": 99,
    "family": "Flux.1",
    "formats": {"bnb_nf4": 22},
    "dialects": {},
    "dtypes": {"U8": [22, 6_000_000], "BF16": [77, 1_000_000]},
    "loads_in": "needs FewBits in ComfyUI >= 0.18.0",
    "findings": ["layer 'a': odd"],
}


@pytest.mark.parametrize("kind", ["FewBitsLoadModel", "FewBitsInspectFile"])
def test_a_node_that_looks_into_a_file_shows_what_is_inside(page, panel, kind):
    page.evaluate("(kind) => addNode(13, host.app.rootGraph, kind)", kind)
    other = panel.nth(1)
    assert line(other) == "Run the workflow to see what is inside"
    page.evaluate(
        "(found) => host.app.rootGraph.getNodeById(13).onExecuted({ fewbits_inspection: [found] })",
        INSPECTION,
    )
    assert phase(other) == "done"
    assert other.locator(".fewbits-loads").inner_text() == (
        "Flux.1 · Needs FewBits in ComfyUI >= 0.18.0"
    )
    assert cells(other, ".fewbits-contents") == [
        ["bnb_nf4", "22 layers", ""],
        ["U8", "22 tensors", "6.00 MB"],
        ["BF16", "77 tensors", "1.00 MB"],
    ]
    assert other.locator(".fewbits-notes li").all_inner_texts() == ["layer 'a': odd"]


# ---- the node around the panel ----


def test_inputs_that_the_format_lacks_are_switched_off_with_the_reason(page):
    load(page)
    answer(
        page,
        "/fewbits/formats",
        {
            "int8_tensorwise": {"scaling": ["row", "tensor"]},
            "int8_blockwise": {"block_size": ["64", "128"]},
        },
    )
    page.wait_for_function("host.app.extensions.length === 1")
    page.evaluate(
        """() => addNode(12, host.app.rootGraph, "FewBitsQuantizeINT8", [
          { name: "format", value: "int8_tensorwise" },
          { name: "scaling", value: "tensor", tooltip: "rows" },
          { name: "block_size", value: "64", tooltip: "blocks" },
        ])"""
    )
    state = "() => addedWidgets().map((w) => [w.value, Boolean(w.disabled), w.tooltip ?? ''])"
    page.evaluate(
        "window.addedWidgets = () => host.app.rootGraph.getNodeById(12).widgets.slice(1, 3)"
    )
    page.wait_for_function("addedWidgets()[1].disabled === true")
    assert page.evaluate(state) == [
        ["tensor", False, "rows"],
        ["auto", True, "int8_tensorwise has no such option"],
    ]
    page.evaluate(
        "const format = host.app.rootGraph.getNodeById(12).widgets[0];"
        "format.value = 'int8_blockwise'; format.callback()"
    )
    assert page.evaluate(state) == [
        ["auto", True, "int8_blockwise has no such option"],
        ["auto", False, "blocks"],
    ]


CONVROT = {"convrot": ["off", "on", "auto"], "full_precision_matmul": ["false", "true"]}


@pytest.mark.parametrize(
    ("format", "stated", "wanted"),
    [
        ("int8_tensorwise", ["off", True], [["off", False], [True, False]]),
        ("int8_tensorwise", ["on", False], [["on", False], [False, False]]),
        ("int8_tensorwise", [False, False], [["off", False], [False, False]]),
        ("auto (best for this GPU)", ["off", True], [["auto", True], [True, False]]),
    ],
    ids=["off", "on", "a switch of old", "chosen by the advisor"],
)
def test_what_a_person_set_stays_where_it_fits(page, format, stated, wanted):
    answer(page, "/fewbits/formats", {"int8_tensorwise": CONVROT})
    load(page)
    page.wait_for_function("host.app.extensions.length === 1")
    page.evaluate(
        """([format, [convrot, precise]]) => addNode(12, host.app.rootGraph, "FewBitsQuantizeModel", [
          { name: "format", value: format },
          { name: "convrot", value: convrot },
          { name: "full_precision_matmul", value: precise },
        ])""",
        [format, stated],
    )
    page.wait_for_function("'disabled' in host.app.rootGraph.getNodeById(12).widgets[1]")
    assert wanted == page.evaluate(
        "host.app.rootGraph.getNodeById(12).widgets.slice(1, 3).map((w) => [w.value, w.disabled])"
    )


ADVICE = {
    "model": "flux.safetensors",
    "family": "Flux.1",
    "bytes_before": 13_611_136,
    "gpu": {"name": "RTX 4090 24GB"},
    "formats": [
        {"wish": "int8_tensorwise:convrot=auto", "file_bytes": 7_412_318, "fits": True, "product": "native",
         "ssim": 0.998, "loads_in": "loads in stock ComfyUI >= 0.27.0", "reason": "fits; native"},
        {"wish": "bnb_nf4", "file_bytes": 4_590_000, "fits": False, "product": "emulated", "ssim": None,
         "loads_in": "needs FewBits in ComfyUI >= 0.8.0", "reason": "does not fit"},
    ],
}  # fmt: skip


def test_the_advisor_lists_the_formats_before_and_after_a_run(page, panel):
    page.evaluate("addNode(13, host.app.rootGraph, 'FewBitsFormatAdvisor')")
    other = panel.nth(1)
    answer(page, "/fewbits/plan", {"advice": ADVICE})
    set_prompt(page, {"13": {"class_type": "FewBitsFormatAdvisor", "inputs": {"file": "x"}}})
    send(page, "graphChanged", {})
    page.wait_for_function(
        "document.querySelectorAll('.fewbits-panel')[1].dataset.phase === 'preview'"
    )
    listed = cells(other, ".fewbits-ways")
    assert listed[1:] == [
        ["int8_tensorwise:convrot=auto", "7.41 MB", "native", "0.998"],
        ["bnb_nf4", "4.59 MB", "emulated", "–"],
    ]
    page.evaluate(
        "(advice) => host.app.rootGraph.getNodeById(13).onExecuted({ fewbits_advice: [advice] })",
        ADVICE,
    )
    assert phase(other) == "done" and cells(other, ".fewbits-ways") == listed
    assert "Take int8_tensorwise:convrot=auto" in other.inner_text()
    assert other.locator(".fewbits-loads").inner_text() == (
        "Flux.1 · RTX 4090 24GB · Loads in stock ComfyUI >= 0.27.0"
    )


def test_the_side_panel_of_the_page_neither_lists_nor_narrows_the_panel(page, panel):
    found = page.evaluate(
        "(() => { const widget = host.app.rootGraph.getNodeById(12).widgets[0]; widget.width = 120;"
        " return [widget.width ?? null, widget.options.hideInPanel]; })()"
    )
    assert found == [None, True]


def test_a_chinese_page_has_a_chinese_panel(page):
    page.evaluate("host.app.extensionManager = { setting: { get: () => 'zh' } }")
    load(page)
    page.evaluate("addNode(12)")
    panel = page.locator(".fewbits-panel")
    assert line(panel) == "运行工作流即可看到计划"
    finish(page, {**REPORT, **SAVED})
    shown = panel.inner_text()
    for text in (
        "完成，用时 12 s（cpu）",
        "原版 ComfyUI 0.27.0 或更新可打开",
        "没有匹配任何层",
        "复制路径",
    ):
        assert text in shown
    send(
        page,
        "execution_error",
        {
            "node_id": "12",
            "exception_message": "x exists already in the output folder; choose another filename or turn overwrite on",
        },
    )
    assert "已存在于输出文件夹" in panel.inner_text()


PYTHON = (
    "rule 'img_mlp' matched nothing",
    "rule 'a.*' matches only tensors that cannot be quantized",
    "rule 'a.*' never decides: rules before it match the same layers",
    "model family not recognised: the generic rule keeps embeddings, norms, modulation, first and last projections; "
    "name a preset or keep layers with a rule if that is not enough",
    "layer 'x' becomes nvfp4, but ComfyUI reads its width to recognise the model; keep it with a rule",
    "layer 'x' does not become nvfp4: ComfyUI reads its width to recognise the model",
    "kept, as they could be lookup tables: 'a', 'b'; a rule that names a layer quantizes it",
    "12 layers were quantized already and are rounded a second time: they keep the error",
    "not 2-D (4-D)",
    "smaller than 32x32 (8x64)",
    "padded 17x129 -> 32x256; runs dequantized in ComfyUI",
    "fits: 7.40 MB of 19.20 GB for weights; native: multiplied by INT8 units, by comfy-kitchen; "
    "pictures that are hard to tell from the original's side by side",
    "format auto chooses scaling too: leave it alone, or name a format",
    "a.safetensors exists already in the output folder; choose another filename or turn overwrite on",
    "diffusion_models/a: no such file in ComfyUI's model folders; choose one from the list",
)  # fmt: skip
KEPT = r"comfyui|fewbits|comfy-kitchen|safetensors|diffusion_models|nvfp4|int8|scaling|auto|mb|gb|img_mlp|x\d*|a|b"


@pytest.mark.parametrize("text", PYTHON)
def test_what_python_says_is_chinese_on_a_chinese_page(page, text):
    shown = page.evaluate(
        f"(text) => import('{PACK}/words.mjs').then((words) => {{ words.useLanguage(() => 'zh');"
        " return words.translated(text); })",
        text,
    )
    words = re.findall(r"[A-Za-z_][\w-]*", shown)
    assert [word for word in words if not re.fullmatch(KEPT, word.lower())] == []
