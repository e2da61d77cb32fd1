// What was given up: the measured error of the whole model and of its worst layers.

import { el, layerName } from "./dom.mjs?v=4b00d3ff";
import { decibels, relL2 } from "./text.mjs?v=4b00d3ff";
import { say } from "./words.mjs?v=4b00d3ff";

/** The layers with the largest error; null when nothing was measured. */
export function worstLayers(report) {
  const worst = report.worst ?? [];
  if (!worst.length) return null;
  const heading = (text) => el("th", { scope: "col" }, text);
  return el(
    "table",
    { class: "fewbits-worst" },
    el("caption", {}, say("Largest errors")),
    el("thead", {}, el("tr", {}, heading(say("Largest errors")), heading("rel_l2"), heading("SQNR"))),
    el(
      "tbody",
      {},
      ...worst.map((layer) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, layerName(layer.name)),
          el("td", {}, relL2(layer.rel_l2)),
          el("td", {}, decibels(layer.sqnr_db)),
        ),
      ),
    ),
  );
}
