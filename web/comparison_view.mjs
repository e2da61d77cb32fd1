// How far the pictures of other models are from those of the first, and which layers may be to blame.

import { el } from "./dom.mjs?v=4caac9e6";
import { noteList } from "./plan_table.mjs?v=4caac9e6";
import { worstLayers } from "./report_view.mjs?v=4caac9e6";
import { bytes, duration } from "./text.mjs?v=4caac9e6";
import { say, translated } from "./words.mjs?v=4caac9e6";

const WORST = 5;

export function comparisonResult(report) {
  const models = report.models ?? [];
  const first = report.reference ?? {};
  const closest = models.find((model) => model.name === report.ranking?.[0]);
  return {
    figures: closest
      ? [
          [`${closest.name}: ${apart(closest)}`, say("Closest to {name}", { name: first.name })],
          [ssim(closest), "SSIM"],
        ]
      : [],
    parts: [
      el("p", { class: "fewbits-advice fewbits-whole" }, translated(report.sentence)),
      modelTable(first, models),
      report.metrics && report.metrics !== "piq" ? noteList(say("Warnings"), [translated(report.metrics)]) : null,
      ...models.map((model) =>
        worstLayers(
          { worst: (model.worst_layers ?? []).slice(0, WORST), suspects: model.suspects },
          say("Largest errors of {name}", { name: model.name }),
        ),
      ),
    ],
    line: say("Compared"),
  };
}

function modelTable(first, models) {
  const inMemory = [first, ...models].some((model) => model.peak_bytes); // known on a GPU
  const heads = [say("Model"), say("Difference"), "SSIM", say("Per step"), ...(inMemory ? [say("Memory")] : [])];
  const row = (model, ...cells) => {
    const costs = [duration(model.seconds_per_step), ...(inMemory ? [bytes(model.peak_bytes)] : [])];
    const said = [...cells, ...costs].map((cell) => el("td", {}, cell));
    return el("tr", {}, el("th", { scope: "row" }, model.name), ...said);
  };
  return el(
    "table",
    { class: "fewbits-models" },
    el("caption", {}, say("Models beside {name}", { name: first.name })),
    el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, row(first, "–", "–"), ...models.map((model) => row(model, apart(model), ssim(model)))),
  );
}

/** Of the final latents: the more decibels, the closer. */
function apart(model) {
  if (model.identical) return say("none");
  const decibels = model.final?.snr_db?.mean;
  return typeof decibels === "number" ? `${decibels.toFixed(1)} dB` : "NaN";
}

function ssim(model) {
  const value = model.pictures?.ssim?.mean;
  return typeof value === "number" ? value.toFixed(3) : "–";
}
