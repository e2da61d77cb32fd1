// What shall become of one layer, written where the graph keeps it: the node's own `keep`, or Layer Rules before it.

import { widgetOf } from "./fitting.mjs?v=4caac9e6";

export const KEEP = "keep";
const RULES = "FewBitsLayerRules";
const GAP = 40;

const slotOf = (node) => node.inputs?.findIndex((input) => input.name === "recipe") ?? -1;
const valueOf = (node, name) => String(widgetOf(node, name)?.value ?? "");
const linesOf = (node, name) => valueOf(node, name).split("\n").filter((line) => line.trim());

/** Whether a wish for a single layer has a place at this node. */
export const takesWishes = (node) => slotOf(node) >= 0 || Boolean(widgetOf(node, KEEP));

/** What a layer may become here: keeping it, and formats where Layer Rules can be connected. */
export function choicesOf(node, formats) {
  const connectable = slotOf(node) >= 0 && globalThis.LiteGraph?.createNode && !fromOutside(node);
  return [KEEP, ...(connectable ? Object.keys(formats ?? {}) : [])];
}

/**
 * Write down that a layer is kept, or becomes `format`; what an earlier click wrote about it goes. `unsaid`: nobody had
 * said anything about the layer, so that the node's own format needs no words.
 */
export function giveWish(node, layer, format, unsaid) {
  node.graph?.beforeChange?.();
  const keep = widgetOf(node, KEEP);
  forget(keep, layer);
  forget(widgetOf(rulesBefore(node), "pattern"), layer);
  if (format === KEEP && keep) setLines(keep, [...linesOf(node, KEEP), layer]);
  else if (!unsaid || format !== valueOf(node, "format")) addRule(node, layer, format);
  node.graph?.afterChange?.();
}

/** A pattern that is exactly this layer is taken away. */
function forget(widget, layer) {
  const lines = String(widget?.value ?? "").split("\n");
  const others = lines.filter((line) => line.trim() !== layer);
  if (others.length < lines.length) setLines(widget, others);
}

/** The nearest rules decide first: into them where they say the same, else into new ones between them and the node. */
function addRule(node, layer, format) {
  const nearest = rulesBefore(node);
  const patterns = nearest ? linesOf(nearest, "pattern") : [];
  const plain = nearest && !valueOf(nearest, "options");
  const fits = plain && (!patterns.length || valueOf(nearest, "format") === format);
  const rules = fits ? nearest : insertRules(node);
  if (!rules) return;
  set(widgetOf(rules, "format"), format);
  setLines(widgetOf(rules, "pattern"), [...linesOf(rules, "pattern"), layer]);
}

function linkOf(node) {
  const id = node.inputs?.[slotOf(node)]?.link;
  const graph = node.graph;
  return id == null ? null : (graph?.getLink?.(id) ?? graph?.links?.[id] ?? graph?.links?.get?.(id) ?? null);
}

function before(node) {
  const link = linkOf(node);
  return link ? (node.graph?.getNodeById?.(link.origin_id) ?? null) : null;
}

/** The recipe enters the subgraph that the node is in: its rules are not here. */
const fromOutside = (node) => Boolean(linkOf(node)) && !before(node);

function rulesBefore(node) {
  const found = before(node);
  return found?.comfyClass === RULES ? found : null;
}

/** Layer Rules in front of the node, at a free place to its left; what was connected comes before them. */
function insertRules(node) {
  const rules = globalThis.LiteGraph?.createNode?.(RULES);
  if (!rules) return null;
  const link = linkOf(node);
  const earlier = before(node);
  node.graph.add(rules);
  rules.pos = freePlace(node, rules);
  earlier?.connect(link.origin_slot, rules, slotOf(rules));
  rules.connect(0, node, slotOf(node));
  return rules;
}

function freePlace(node, rules) {
  const [width, height] = rules.size;
  const others = (node.graph.nodes ?? node.graph._nodes ?? []).filter((other) => other !== rules);
  const left = node.pos[0] - width - GAP;
  const meets = (top) => (other) =>
    left < other.pos[0] + other.size[0] + GAP &&
    other.pos[0] < left + width + GAP &&
    top < other.pos[1] + other.size[1] + GAP &&
    other.pos[1] < top + height + GAP;
  let top = node.pos[1];
  for (let other; (other = others.find(meets(top))); ) top = other.pos[1] + other.size[1] + GAP;
  return [left, top];
}

function setLines(widget, lines) {
  set(widget, lines.filter((line) => line.trim()).join("\n"));
}

function set(widget, value) {
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}
