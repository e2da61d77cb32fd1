// Puts the plan, progress and report panel under every Quantize node. Every call into ComfyUI's page is tested for
// first: where a page lacks it, the node simply works without a panel.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { PANEL_HEIGHT, QuantizePanel } from "./quantize_panel.mjs?v=bff82685";

const PANEL_NODES = /^FewBitsQuantize/;
const PANEL_WIDTH = 360; // a new node starts this wide; the user may make it narrower
const MARGIN = 10; // ComfyUI's own distance between a node's border and a DOM widget

const panels = new WeakMap(); // node -> panel
const active = new Set(); // panels that heard from the prompt that runs now
const plans = new Map(); // execution id -> plan of that prompt: undo and tab changes recreate nodes while it runs

/** The node that runs as `"12"`, or as `"5:12"` when it is node 12 inside subgraph node 5. */
function nodeByExecutionId(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const container of path.slice(0, -1)) graph = graph?.getNodeById?.(container)?.subgraph;
  return graph?.getNodeById?.(path.at(-1)) ?? null;
}

/** ComfyUI stores outputs under `"12"`, or under `"<subgraph id>:12"`. */
function locatorOf(node) {
  const root = app.rootGraph ?? app.graph;
  return !node.graph || node.graph === root ? String(node.id) : `${node.graph.id}:${node.id}`;
}

function nodeByLocator(locator) {
  const [id, graphId] = String(locator).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  const graph = graphId === undefined ? root : root?.subgraphs?.get?.(graphId);
  return graph?.getNodeById?.(id) ?? null;
}

const panelOf = (node) => (node ? panels.get(node) : undefined);

function showOutput(panel, output) {
  const report = output?.fewbits_report?.at?.(0);
  if (!panel || !report) return;
  active.delete(panel);
  panel.showReport(report);
}

function addPanel(node) {
  if (typeof node.addDOMWidget !== "function" || panels.has(node)) return;
  const panel = new QuantizePanel();
  const widget = node.addDOMWidget("fewbits_panel", "fewbits_panel", panel.element, {
    serialize: false, // not an input of the prompt
    hideOnZoom: true,
    margin: MARGIN,
    getMinHeight: () => PANEL_HEIGHT + 2 * MARGIN,
  });
  if (widget) widget.serialize = false; // not a value in the workflow
  panels.set(node, panel);
  letCanvasNavigate(panel.element);

  const inherited = node.onExecuted;
  node.onExecuted = function (output) {
    inherited?.apply(this, arguments);
    showOutput(panel, output);
  };

  const size = node.computeSize?.();
  if (size) node.setSize?.([Math.max(node.size?.[0] ?? 0, PANEL_WIDTH), Math.max(node.size?.[1] ?? 0, size[1])]);
}

/** The wheel scrolls the panel while it can and zooms the canvas otherwise, the middle button drags the canvas. */
function letCanvasNavigate(element) {
  const canvas = () => app.canvas;
  element.addEventListener(
    "wheel",
    (event) => {
      const area = event.target.closest?.(".fewbits-scroll");
      const scrolls = area && area.scrollHeight > area.clientHeight && !event.ctrlKey && !event.metaKey;
      if (scrolls || typeof canvas()?.processMouseWheel !== "function") return;
      event.preventDefault();
      event.stopPropagation();
      canvas().processMouseWheel(event);
    },
    { passive: false },
  );
  const forward = (type, handler, wanted) =>
    element.addEventListener(type, (event) => {
      if (wanted(event)) canvas()?.[handler]?.(event);
    });
  forward("pointerdown", "processMouseDown", (event) => event.button === 1);
  forward("pointermove", "processMouseMove", (event) => event.buttons & 4);
  forward("pointerup", "processMouseUp", (event) => event.button === 1);
}

function listen(type, handler) {
  api.addEventListener?.(type, (event) => handler(event?.detail ?? {}));
}

function endPrompt(settle) {
  for (const panel of active) settle(panel);
  active.clear();
  plans.clear();
}

listen("fewbits.plan", ({ node_id, plan }) => {
  if (!plan) return;
  plans.set(String(node_id), plan);
  const panel = panelOf(nodeByExecutionId(node_id));
  if (!panel) return;
  active.add(panel);
  panel.showPlan(plan);
});

listen("fewbits.progress", (progress) => {
  const panel = panelOf(nodeByExecutionId(progress.node_id));
  if (!panel) return;
  if (!active.has(panel)) {
    active.add(panel);
    const plan = plans.get(String(progress.node_id));
    if (plan) panel.showPlan(plan);
    else panel.reset();
  }
  panel.showProgress(progress);
});

listen("execution_start", () => endPrompt((panel) => panel.stop("Stopped")));
listen("execution_cached", ({ nodes }) => {
  for (const id of nodes ?? []) panelOf(nodeByExecutionId(id))?.reuse();
});
listen("execution_success", () => endPrompt((panel) => panel.finish()));
listen("execution_interrupted", () => endPrompt((panel) => panel.stop("Cancelled")));
listen("reconnecting", () => {
  for (const panel of active) panel.stop("Connection lost");
});
listen("execution_error", ({ node_id, exception_message }) => {
  const failed = panelOf(nodeByExecutionId(node_id));
  if (failed && !active.has(failed)) failed.reset(); // it failed before it had a plan: what it shows is an older run
  endPrompt((panel) => panel !== failed && panel.stop("Stopped"));
  failed?.fail(exception_message);
});

function addStyle() {
  const href = new URL("./fewbits.css", import.meta.url).href;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
}

if (typeof app.registerExtension === "function") {
  addStyle();
  app.registerExtension({
    name: "FewBits.QuantizePanel",
    nodeCreated(node) {
      if (PANEL_NODES.test(node.comfyClass ?? "")) addPanel(node);
    },
    loadedGraphNode(node) {
      showOutput(panelOf(node), app.nodeOutputs?.[locatorOf(node)]);
    },
    onNodeOutputsUpdated(outputs) {
      for (const [locator, output] of Object.entries(outputs ?? {})) {
        if (output?.fewbits_report) showOutput(panelOf(nodeByLocator(locator)), output);
      }
    },
  });
}
