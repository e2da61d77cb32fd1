"""The panel without ComfyUI: a page with two stub modules as its host, and what tests of it send and read."""

from __future__ import annotations

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


PROMPT = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a.safetensors"}},
    "12": {"class_type": "FewBitsQuantizeINT8", "inputs": {"model": ["1", 0], "keep": ""}},
}


SAVED = {
    "output": "/comfy/output/diffusion_models/flux_int8.safetensors",
    "saved": {
        "path": "output/diffusion_models/flux_int8.safetensors",
        "loader": "Load Diffusion Model",
        "name": "flux_int8.safetensors",
    },
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
