// Which format suits a model and a GPU: the advisor's list, the best first.

import { el } from "./dom.mjs?v=4caac9e6";
import { bytes, familyOf } from "./text.mjs?v=4caac9e6";
import { say, translated } from "./words.mjs?v=4caac9e6";

export function adviceResult(advice) {
  const [best] = advice.formats ?? [];
  return {
    figures: [[`${bytes(advice.bytes_before)} → ${bytes(best?.file_bytes)}`, advice.model]],
    families: [familyOf(advice), advice.gpu?.name ?? say("No GPU here")],
    opens: best ?? {},
    parts: [adviceView(advice)],
    line: say("Looked into the file"),
  };
}

/** What to take and why, and a row for every other way. */
function adviceView(advice) {
  const [best] = advice.formats ?? [];
  const heads = [say("Format"), say("File"), say("Product"), "SSIM"];
  return el(
    "div",
    {},
    best ? el("p", { class: "fewbits-advice" }, say("Take {format}", { format: best.wish })) : null,
    best ? el("p", { class: "fewbits-label fewbits-whole" }, translated(best.reason)) : null,
    el(
      "table",
      { class: "fewbits-ways" },
      el("caption", {}, say("Formats, the best first")),
      el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, ...(advice.formats ?? []).map(row)),
    ),
  );
}

function row(way) {
  const attributes = { title: translated(way.reason), class: way.fits === false && "fewbits-unfit" };
  return el(
    "tr",
    attributes,
    el("th", { scope: "row" }, way.wish),
    el("td", {}, bytes(way.file_bytes)),
    el("td", {}, say(way.product)),
    el("td", {}, typeof way.ssim === "number" ? way.ssim.toFixed(3) : "–"),
  );
}
