// Inputs that the chosen format does not have are switched off, with the reason where the pointer rests.

import { say } from "./words.mjs?v=4caac9e6";

// value that says nothing
const UNSAID = { scaling: "auto", block_size: "auto", convrot: "auto", full_precision_matmul: false };

export const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name);
const tooltips = new WeakMap();

// what a format that is yet to be chosen leaves to the node
const UNCHOSEN = { full_precision_matmul: ["true", "false"] };
const SWITCH = { true: "on", false: "off" }; // what `convrot` was before it had an auto

/** `formats` is what `/fewbits/formats` answers: format -> input -> values. */
export function fitInputs(node, formats) {
  const format = widgetOf(node, "format")?.value;
  if (!formats || !format) return;
  const fitting = formats[format] ?? UNCHOSEN;
  const reason = formats[format] ? say("{format} has no such option", { format }) : say("Chosen with the format");
  const convrot = widgetOf(node, "convrot");
  if (convrot && String(convrot.value) in SWITCH) convrot.value = SWITCH[String(convrot.value)];
  for (const [name, unsaid] of Object.entries(UNSAID)) {
    const widget = widgetOf(node, name);
    if (widget) fit(widget, fitting[name], unsaid, reason);
  }
}

function fit(widget, values, unsaid, reason) {
  if (!tooltips.has(widget)) tooltips.set(widget, widget.tooltip);
  const possible = values?.includes(String(widget.value)) || widget.value === unsaid;
  if (!possible) widget.value = unsaid;
  widget.disabled = !values;
  widget.tooltip = values ? tooltips.get(widget) : reason;
}

/** Call `changed` whenever the widget gets another value. */
export function watchWidget(widget, changed) {
  const inherited = widget.callback;
  widget.callback = function (...values) {
    const answer = inherited?.apply(this, values);
    changed();
    return answer;
  };
}
