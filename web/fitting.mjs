// Inputs that the chosen format does not have are switched off, with the reason where the pointer rests.

import { say } from "./words.mjs?v=08d7cc03";

// value that says nothing
const UNSAID = { scaling: "auto", block_size: "auto", convrot: "auto", full_precision_matmul: false };

export const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name);
const tooltips = new WeakMap();

/** `formats` is what `/fewbits/formats` answers: format -> input -> values. */
export function fitInputs(node, formats) {
  const format = widgetOf(node, "format")?.value;
  const fitting = formats?.[format];
  if (!fitting) return;
  for (const [name, unsaid] of Object.entries(UNSAID)) {
    const widget = widgetOf(node, name);
    if (widget) fit(widget, fitting[name], unsaid, say("{format} has no such option", { format }));
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
