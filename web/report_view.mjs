// What was given up: the measured error of the whole model and of its worst layers.

import { el, layerName } from "./dom.mjs?v=cd4731b9";
import { outliersOf } from "./outliers.mjs?v=cd4731b9";
import { decibels, relL2 } from "./text.mjs?v=cd4731b9";
import { say } from "./words.mjs?v=cd4731b9";

/** The layers with the largest error; null when nothing was measured. */
export function worstLayers(report) {
  const worst = report.worst ?? [];
  if (!worst.length) return null;
  const isOutlier = outliersOf(report.layers ?? []);
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
          el("td", {}, errorOf(layer, isOutlier(layer))),
          el("td", {}, decibels(layer.sqnr_db)),
        ),
      ),
    ),
  );
}

/** A layer's error, in colour where it is unusual; null where nothing was measured. */
export function errorOf(layer, outlier) {
  if (typeof layer.rel_l2 !== "number") return null;
  const loss = decibels(layer.sqnr_db);
  const unusual = say("{loss}: unusually much for {format}", { loss, format: layer.format });
  const attributes = { class: outlier && "fewbits-outlier", title: outlier ? unusual : loss };
  return el("span", attributes, relL2(layer.rel_l2));
}
