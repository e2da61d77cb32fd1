// The plan at a glance: layers and sizes per format, and what to read before trusting it.

import { el } from "./dom.mjs?v=4caac9e6";
import { inUnit, unitFor } from "./text.mjs?v=4caac9e6";
import { say, translated } from "./words.mjs?v=4caac9e6";

/** One row per format and a total; all sizes in the unit that fits the total. Without a plan: the empty table. */
export function planTable(plan) {
  const rows = plan?.summary ?? [];
  const unit = unitFor(plan?.bytes_before ?? 0);
  const inName = plan ? `, ${unit.name}` : "";
  const heads = [say("Format"), say("Layers"), say("Before") + inName, say("After") + inName];
  const layers = plan ? String(rows.reduce((sum, row) => sum + (row.layers ?? 0), 0)) : "–";
  const heading = (text) => el("th", { scope: "col" }, text);
  const sizes = (row) => [row?.bytes_before, row?.bytes_after].map((count) => el("td", {}, inUnit(count, unit)));
  const line = (row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", title: row.format }, say(String(row.format))),
      el("td", {}, String(row.layers ?? "–")),
      ...sizes(row),
    );
  return el(
    "table",
    { class: "fewbits-formats" },
    el("caption", {}, say("Layers and size per format")),
    el("thead", {}, el("tr", {}, ...heads.map(heading))),
    el("tbody", {}, ...rows.map(line)),
    el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, say("Total")), el("td", {}, layers), ...sizes(plan))),
  );
}

/** Warnings, and patterns that matched nothing unless a warning already says so; null when there are none. */
export function warningList(plan) {
  const warnings = plan.warnings ?? [];
  const said = (pattern) => warnings.some((warning) => warning.includes(pattern));
  const unmatched = (plan.unmatched ?? []).filter((pattern) => !said(pattern));
  const unused = unmatched.map((pattern) => say("'{pattern}' matched no layer", { pattern }));
  const lines = [...warnings.map(translated), ...unused];
  return lines.length ? noteList(say("Warnings"), lines) : null;
}

/** Coloured notes: yellow, or red with the extra class `fewbits-error`. */
export function noteList(name, lines, extraClass = "") {
  const attributes = { class: `fewbits-notes ${extraClass}`.trim(), "aria-label": name };
  return el("ul", attributes, ...lines.map((line) => el("li", {}, line)));
}
