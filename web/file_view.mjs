// What is in a file: layers per format, tensors per type, and problems.

import { el } from "./dom.mjs?v=4caac9e6";
import { noteList } from "./plan_table.mjs?v=4caac9e6";
import { bytes } from "./text.mjs?v=4caac9e6";
import { say, translatedError } from "./words.mjs?v=4caac9e6";

/** One file that was looked into; with several files, under its name. */
export function fileView(file, named) {
  const rows = [
    ...Object.entries(file.formats ?? {}).map(([name, count]) => [name, say("{count} layers", { count }), ""]),
    ...Object.entries(file.dialects ?? {}).map(([name, count]) => [name, say("{count} layers", { count }), ""]),
    ...Object.entries(file.dtypes ?? {}).map(([name, [count, size]]) => [
      name,
      say("{count} tensors", { count }),
      bytes(size),
    ]),
  ];
  const line = ([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row", title: name }, name), ...cells.map((cell) => el("td", {}, cell)));
  const findings = (file.findings ?? []).map(translatedError);
  return el(
    "div",
    {},
    named ? el("p", { class: "fewbits-file" }, file.name) : null,
    el("table", { class: "fewbits-contents" }, el("caption", {}, say("Contents")), el("tbody", {}, ...rows.map(line))),
    findings.length
      ? noteList(say("Problems"), findings)
      : el("p", { class: "fewbits-label" }, say("No problems found in names, shapes, JSON and scales")),
  );
}
