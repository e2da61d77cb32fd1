// What was given up: the measured error of the whole model and of its worst layers.

import { el, layerName } from "./dom.mjs?v=4caac9e6";
import { outliersOf } from "./outliers.mjs?v=4caac9e6";
import { decibels, relL2, sentence } from "./text.mjs?v=4caac9e6";
import { say, translated } from "./words.mjs?v=4caac9e6";

/** The layers with the largest error; null when nothing was measured. `suspects`: names of those that may be broken. */
export function worstLayers(report, title = say("Largest errors")) {
  const worst = report.worst ?? [];
  if (!worst.length) return null;
  const unusual = outliersOf(report.layers ?? []);
  const isOutlier = (layer) => unusual(layer) || Boolean(report.suspects?.includes(layer.name));
  const inDecibels = worst.some((layer) => layer.sqnr_db !== undefined);
  const heading = (text) => el("th", { scope: "col" }, text);
  return el(
    "table",
    { class: "fewbits-worst" },
    el("caption", {}, title),
    el("thead", {}, el("tr", {}, heading(title), heading("rel_l2"), inDecibels ? heading("SQNR") : null)),
    el(
      "tbody",
      {},
      ...worst.map((layer) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, layerName(layer.name)),
          el("td", {}, errorOf(layer, isOutlier(layer))),
          inDecibels ? el("td", {}, decibels(layer.sqnr_db)) : null,
        ),
      ),
    ),
  );
}

/** What the error means for pictures, and what is left of a LoRA that was baked in; null where nobody says. */
export function meaningOf({ meaning, patches }) {
  const said = [meaning, patches?.meaning].filter(Boolean);
  if (!said.length) return null;
  return el("p", { class: "fewbits-label fewbits-whole" }, said.map((text) => `${sentence(translated(text))}.`).join(" "));
}

/** A layer's error, in colour where it is unusual; null where nothing was measured. */
export function errorOf(layer, outlier) {
  if (typeof layer.rel_l2 !== "number") return null;
  const attributes = { class: outlier && "fewbits-outlier", title: lossOf(layer, outlier) };
  return el("span", attributes, relL2(layer.rel_l2));
}

/** In decibels where they are known, and whether that is much. */
function lossOf({ format, sqnr_db: ratio }, outlier) {
  if (ratio === undefined) return outlier ? say("Far more than the others") : null;
  const loss = decibels(ratio);
  return outlier ? say("{loss}: unusually much for {format}", { loss, format }) : loss;
}
