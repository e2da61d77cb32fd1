// Before a run: where the file would go, and how large it would be in every format.

import { el } from "./dom.mjs?v=4caac9e6";
import { noteList } from "./plan_table.mjs?v=4caac9e6";
import { bytes } from "./text.mjs?v=4caac9e6";
import { say } from "./words.mjs?v=4caac9e6";

/** The path that the file would get, and a warning where one lies there already; null without a target. */
export function targetView(target) {
  if (!target) return null;
  const path = el("div", { class: "fewbits-path" }, el("code", {}, target.path));
  const replaces = target.exists && target.overwrite;
  const taken = target.exists && !target.overwrite;
  const what = replaces ? say("Will replace") : say("Will be written to");
  return el(
    "div",
    { class: "fewbits-saved" },
    el("div", { class: "fewbits-label" }, what),
    path,
    taken ? noteList(say("Warnings"), [say("This file exists: change the name or allow overwriting")]) : null,
  );
}

/** Sizes of all formats, the smallest first, behind a disclosure; null when there are none. */
export function sizesView(sizes) {
  const rows = Object.entries(sizes ?? {}).sort(([, a], [, b]) => a - b);
  if (!rows.length) return null;
  const line = ([format, size]) => el("tr", {}, el("th", { scope: "row", title: format }, format), el("td", {}, bytes(size)));
  return el(
    "details",
    { class: "fewbits-sizes" },
    el("summary", {}, say("Size in every format")),
    el("table", {}, el("caption", {}, say("Size in every format")), el("tbody", {}, ...rows.map(line))),
  );
}
