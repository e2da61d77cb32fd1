// Puts a panel under the nodes of FewBits: plan, progress, report, and where the file went. Every call into ComfyUI's
// page is tested for first: where a page lacks it, the node simply works without.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { adviceResult } from "./advice_view.mjs?v=4caac9e6";
import { comparisonResult } from "./comparison_view.mjs?v=4caac9e6";
import { fitResult } from "./fit_view.mjs?v=4caac9e6";
import { fitInputs, watchWidget, widgetOf } from "./fitting.mjs?v=4caac9e6";
import { growAlone } from "./growth.mjs?v=4caac9e6";
import { isPrimary } from "./layer_list.mjs?v=4caac9e6";
import { Panel } from "./panel.mjs?v=4caac9e6";
import { qualityResult } from "./quality_view.mjs?v=4caac9e6";
import { earlierOutput, settingsOf } from "./results.mjs?v=4caac9e6";
import { choicesOf, giveWish, takesWishes } from "./wishes.mjs?v=4caac9e6";
import { say, useLanguage } from "./words.mjs?v=4caac9e6";

// what the panel of a node says before and during a run, and how high it is
const WORK = { height: 344, idle: "Run the workflow to see the plan" };
const FILE = { height: 236, idle: "Run the workflow to write the file" };
const LOOK = { height: 236, idle: "Run the workflow to see what is inside", plans: false };
const NOTE = { height: 120, idle: "Run the workflow to write the file", plans: false };
const PANELS = {
  FewBitsCompareModels: {
    height: 300,
    idle: "Run the workflow to compare the models",
    work: "Sampling",
    plans: false,
    inBytes: false,
  },
  FewBitsConvertFP8Scaled: FILE,
  FewBitsFitToSize: { ...WORK, idle: "Run the workflow to choose the formats", work: "Measuring" },
  FewBitsFormatAdvisor: { ...WORK, idle: "Run the workflow to see what suits the GPU", plans: false },
  FewBitsInspectFile: { ...LOOK, height: WORK.height },
  FewBitsLoadCheckpoint: LOOK,
  FewBitsLoadModel: LOOK,
  FewBitsLoadTextEncoder: LOOK,
  FewBitsQualityReport: { height: 300, idle: "Run the workflow to draw the report", plans: false },
  FewBitsSaveCalibration: NOTE,
  FewBitsSaveComfyQuant: FILE,
  FewBitsSaveRecipe: { ...NOTE, idle: "Run the workflow to see the recipe" },
};
const OURS = /^FewBits/;
const QUANTIZE_NODES = /^FewBitsQuantize/;
const PANEL_WIDTH = 360; // a new node starts this wide; the user may make it narrower
const MARGIN = 10; // ComfyUI's own distance between a node's border and a DOM widget
// the fields show four patterns, and eight formats; the report takes the rest of a tall node
const HIGHEST = { keep: 72, allow: 128 };
const HISTORY = 64; // runs that are searched for an earlier result
const PAUSE_MS = 200; // a burst of changes is looked at once

const panels = new WeakMap(); // node -> panel
const active = new Set(); // panels that heard from the prompt that runs now
const plans = new Map(); // execution id -> plan of that prompt: undo and tab changes recreate nodes while it runs
const cached = new Set(); // execution ids that ComfyUI answers from its cache in the prompt that runs now
const results = new Map(); // panel -> { prompt, settings } of the result it shows
const previewed = new WeakMap(); // panel -> settings of what it shows before a run
const shown = new WeakMap(); // panel -> output that it drew last
const troubled = new Set(); // panels of runs that ended early: the next run begins without their red and yellow
let formats = null; // format -> inputs that it has

useLanguage(() => app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en");

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
// what a node sends -> how its panel shows that
const RESULTS = {
  fewbits_report: (panel, [report], reused) => panel.showReport(report, reused),
  fewbits_saved: (panel, [saved]) => panel.showSaved(saved),
  fewbits_advice: (panel, [advice]) => panel.showResult(adviceResult(advice)),
  fewbits_fit: (panel, [found]) => panel.showResult(fitResult(found)),
  fewbits_comparison: (panel, [report]) => panel.showResult(comparisonResult(report)),
  fewbits_quality: (panel, [report]) => panel.showResult(qualityResult(report)),
  fewbits_inspection: (panel, files) => panel.showInspection(files),
};
const resultIn = (output) => Object.keys(RESULTS).find((name) => output?.[name]?.length);
const hasResult = (output) => Boolean(resultIn(output));

function showOutput(panel, output, reused = false) {
  const name = resultIn(output);
  if (!panel || !name) return false;
  active.delete(panel);
  shown.set(panel, output);
  RESULTS[name](panel, output[name], reused);
  return true;
}

/** JSON of a route; null where the page or the server has none. */
async function fetched(route, asked) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) };
  try {
    const answer = await api.fetchApi(route, asked && post);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** What the page would send now: execution id -> class and inputs; null where that cannot be said. */
async function currentPrompt() {
  try {
    return (await app.graphToPrompt())?.output ?? null;
  } catch {
    return null;
  }
}

function addPanel(node, options) {
  if (typeof node.addDOMWidget !== "function" || panels.has(node)) return;
  const words = { idle: say(options.idle), work: say(options.work ?? "Quantizing") };
  const panel = new Panel({ ...options, ...words, wishes: takesWishes(node) ? wishesFor(node) : null });
  const widget = node.addDOMWidget("fewbits_panel", "fewbits_panel", panel.element, {
    serialize: false, // not an input of the prompt
    hideInPanel: true, // not a parameter for the page's side panel
    hideOnZoom: true,
    margin: MARGIN,
    getMinHeight: () => options.height + 2 * MARGIN,
  });
  if (widget) {
    widget.serialize = false; // not a value in the workflow
    // the page's side panel sets it to its own width, and the node would keep that
    Object.defineProperty(widget, "width", { get: () => undefined, set: () => {}, configurable: true });
  }
  panels.set(node, panel);
  letCanvasNavigate(panel.element);
  growAlone(panel.element);

  const inherited = node.onExecuted;
  node.onExecuted = function (output) {
    inherited?.apply(this, arguments);
    if (shown.get(panel) !== output) showOutput(panel, output);
  };
  const removed = node.onRemoved;
  node.onRemoved = function () {
    removed?.apply(this, arguments);
    for (const kept of [active, results, troubled]) kept.delete(panel);
  };
  for (const [name, height] of Object.entries(HIGHEST)) {
    const field = widgetOf(node, name);
    if (field?.options) field.options.getMaxHeight = () => height;
  }

  const size = node.computeSize?.();
  if (size) node.setSize?.([Math.max(node.size?.[0] ?? 0, PANEL_WIDTH), Math.max(node.size?.[1] ?? 0, size[1])]);
}

/** What the layers in a node's list can be given. */
function wishesFor(node) {
  const unsaid = new Set(); // layers about which nobody had said anything
  return {
    choices: () => choicesOf(node, formats),
    give(layer, format) {
      if (isPrimary(layer)) unsaid.add(layer.name);
      giveWish(node, layer.name, format, unsaid.has(layer.name));
      compareSettings();
      previewPlans();
    },
  };
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

/** Every change of a setting is looked at; the page itself reports what is typed only when the field is left. */
function watchSettings(node) {
  for (const widget of node.widgets ?? []) {
    watchWidget(widget, compareSettings);
    watchWidget(widget, previewPlans);
  }
}

/** What stands in an empty field, in the language of the page. */
function speakFields(node) {
  for (const widget of node.widgets ?? []) {
    const field = widget.inputEl ?? widget.element;
    if (field?.placeholder) field.placeholder = say(field.placeholder);
  }
}

/** Switch off the inputs that the node's format does not have, now and whenever the format changes. */
async function keepFitting(node) {
  const format = widgetOf(node, "format");
  if (format) watchWidget(format, () => fitInputs(node, formats));
  formats ??= await fetched("/fewbits/formats");
  fitInputs(node, formats);
}

// ---- results of earlier runs ----

/** Once after a burst of calls. */
function debounced(work) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, PAUSE_MS);
  };
}

/** [execution id, panel] of every node of the prompt that has a panel of which `wanted` is true. */
function panelsOf(prompt, wanted) {
  const found = Object.keys(prompt ?? {}).map((id) => [id, panelOf(nodeByExecutionId(id))]);
  return found.filter(([, panel]) => panel && wanted(panel));
}

/** Empty panels get the newest result in ComfyUI's history that belongs to the settings they have now. */
const refill = debounced(async () => {
  const prompt = await currentPrompt();
  const empty = panelsOf(prompt, (panel) => panel.waiting);
  if (!empty.length) return;
  const history = await fetched(`/history?max_items=${HISTORY}`);
  for (const [id, panel] of empty) {
    if (!panel.waiting) continue; // a run began meanwhile
    const settings = settingsOf(prompt, id);
    const output = earlierOutput(history, id, settings, hasResult);
    if (showOutput(panel, output)) results.set(panel, { settings });
  }
  previewPlans();
});

/** The nodes that decide about one: itself and all before it. */
function ancestors(prompt, id, found = {}) {
  if (id in found || !prompt[id]) return found;
  found[id] = prompt[id];
  for (const value of Object.values(prompt[id].inputs ?? {})) {
    if (Array.isArray(value) && value.length === 2) ancestors(prompt, String(value[0]), found);
  }
  return found;
}

/** Panels without a run show what one would do; ComfyUI's server reads headers for it while no prompt runs. */
const previewPlans = debounced(async () => {
  const prompt = await currentPrompt();
  for (const [id, panel] of panelsOf(prompt, (candidate) => candidate.waiting)) {
    const settings = settingsOf(prompt, id);
    if (previewed.get(panel) === settings) continue;
    const answer = await fetched("/fewbits/plan", { prompt: ancestors(prompt, id), id });
    if (!answer || answer.busy || !panel.waiting) continue;
    previewed.set(panel, settings);
    panel.showPreview(answer);
  }
});

/** Grey results whose settings are no longer those of the graph. */
const compareSettings = debounced(async () => {
  if (!results.size) return;
  const prompt = await currentPrompt();
  for (const [id, panel] of panelsOf(prompt, (candidate) => results.has(candidate))) {
    const result = results.get(panel);
    if (result.prompt && !result.settings) {
      const run = (await fetched(`/history/${result.prompt}`))?.[result.prompt];
      if (run) result.settings = settingsOf(run.prompt?.[2], id);
    }
    if (result.settings) panel.setStale(result.settings !== settingsOf(prompt, id));
  }
});

/** ComfyUI's loaders list a new file only after their lists were asked for again. */
function refreshLists(output) {
  const wrote = [...(output.fewbits_report ?? []), ...(output.fewbits_saved ?? [])].some((data) => data.saved);
  if (wrote) app.refreshComboInNodes?.()?.catch?.(() => {});
}

// ---- a run ----

function listen(type, handler) {
  api.addEventListener?.(type, (event) => handler(event?.detail ?? {}));
}

function endPrompt(settle) {
  for (const panel of active) settle(panel);
  for (const panel of active) if (panel.phase === "stopped") troubled.add(panel);
  active.clear();
  plans.clear();
}

function showPlan(id, plan) {
  const panel = panelOf(nodeByExecutionId(id));
  if (!plan || !panel) return;
  active.add(panel);
  results.delete(panel);
  panel.showPlan(plan);
}

/** The page was reloaded while a node was at work: its plan was sent to the page before. */
async function askForPlan(id) {
  const plan = (await fetched("/fewbits/running"))?.[String(id)];
  if (plan && !plans.has(String(id))) {
    plans.set(String(id), plan);
    showPlan(id, plan);
  }
}

listen("fewbits.plan", ({ node_id, plan }) => {
  if (!plan) return;
  plans.set(String(node_id), plan);
  showPlan(node_id, plan);
});

listen("fewbits.progress", (progress) => {
  const panel = panelOf(nodeByExecutionId(progress.node_id));
  if (!panel) return;
  if (!active.has(panel)) {
    active.add(panel);
    results.delete(panel);
    const plan = plans.get(String(progress.node_id));
    if (plan) panel.showPlan(plan);
    else {
      panel.reset();
      askForPlan(progress.node_id);
    }
  }
  panel.showProgress(progress);
});

listen("executed", ({ node, display_node, output, prompt_id }) => {
  const panel = panelOf(nodeByExecutionId(display_node ?? node));
  if (!panel || !hasResult(output)) return;
  results.set(panel, { prompt: prompt_id });
  const reused = cached.has(String(node));
  showOutput(panel, output, reused);
  if (!reused) refreshLists(output);
});

listen("execution_start", () => {
  endPrompt((panel) => panel.stop(say("Stopped")));
  for (const panel of troubled) panel.reset();
  troubled.clear();
  cached.clear();
});
listen("execution_cached", ({ nodes }) => {
  for (const id of nodes ?? []) {
    cached.add(String(id));
    const panel = panelOf(nodeByExecutionId(id));
    panel?.reuse();
  }
  refill();
});
listen("execution_success", () => {
  endPrompt((panel) => panel.finish());
  refill();
});
listen("execution_interrupted", () => endPrompt((panel) => panel.stop(say("Cancelled"))));
listen("reconnecting", () => {
  for (const panel of active) panel.stop(say("Connection lost"));
});
listen("execution_error", ({ node_id, exception_message }) => {
  const failed = panelOf(nodeByExecutionId(node_id));
  if (failed && !active.has(failed)) failed.reset(); // it failed before it had a plan: what it shows is an older run
  endPrompt((panel) => panel !== failed && panel.stop(say("Stopped")));
  failed?.fail(exception_message);
  if (failed) troubled.add(failed);
});
listen("graphChanged", compareSettings);
listen("graphChanged", previewPlans);

function addStyle() {
  const href = new URL("./fewbits.css", import.meta.url).href;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
}

if (typeof app.registerExtension === "function") {
  addStyle();
  app.registerExtension({
    name: "FewBits.Panel",
    nodeCreated(node) {
      const name = node.comfyClass ?? "";
      if (!OURS.test(name)) return;
      watchSettings(node);
      speakFields(node);
      const options = PANELS[name] ?? (QUANTIZE_NODES.test(name) ? WORK : null);
      if (!options) return;
      addPanel(node, options);
      if (QUANTIZE_NODES.test(name) || takesWishes(node)) keepFitting(node);
      previewPlans();
    },
    loadedGraphNode(node) {
      if (!panelOf(node)) return;
      fitInputs(node, formats);
      if (!showOutput(panelOf(node), app.nodeOutputs?.[locatorOf(node)])) refill();
    },
    onNodeOutputsUpdated(outputs) {
      for (const [locator, output] of Object.entries(outputs ?? {})) {
        const panel = panelOf(nodeByLocator(locator));
        if (panel?.phase !== "done") showOutput(panel, output);
      }
    },
  });
}
