// What Fit to Size chose: how that meets what was asked for, and the layers that it cost most.

import { el } from "./dom.mjs?v=4caac9e6";
import { planTable, warningList } from "./plan_table.mjs?v=4caac9e6";
import { worstLayers } from "./report_view.mjs?v=4caac9e6";
import { bytes, change, familyOf, relL2, sentence } from "./text.mjs?v=4caac9e6";
import { say, translated } from "./words.mjs?v=4caac9e6";

const WORST = 5;

export function fitResult(found) {
  const { goal = {}, error, basis, layers = [] } = found.fit ?? {};
  const size = bytes(found.file_bytes);
  const rounded = layers.filter((layer) => layer.error > 0);
  const errors = new Map(rounded.map((layer) => [layer.name, layer.error]));
  const measured = rounded.map(({ name, chosen, error: lost }) => ({ name, format: chosen, rel_l2: lost }));
  const worst = measured.sort((a, b) => b.rel_l2 - a.rel_l2).slice(0, WORST);
  return {
    figures: [
      [`${bytes(found.bytes_before)} → ${size}`, change(found.bytes_before, found.file_bytes)],
      [relL2(error), say("Error of the layers")],
    ],
    families: [familyOf(found)],
    opens: found,
    parts: [
      el("p", { class: "fewbits-advice" }, [sentence(translated(goal.said)), size + room(goal, found)].join(": ")),
      el("p", { class: "fewbits-label fewbits-whole" }, say("To write it, connect recipe to Quantize File")),
      planTable(found),
      warningList(found),
      worstLayers({ worst }),
      basis ? el("p", { class: "fewbits-label fewbits-whole" }, say("Error {basis}", { basis: translated(basis) })) : null,
    ],
    layers: (found.layers ?? []).map((layer) => ({ ...layer, rel_l2: errors.get(layer.name) })),
    line: say("Chosen, nothing was written"),
  };
}

/** How much of what was asked for is left over; empty where no size was asked for. */
function room(goal, found) {
  if (!goal.bytes) return "";
  const share = (100 * (1 - found.file_bytes / goal.bytes)).toFixed(1);
  return `, ${say("{share}% below the limit", { share })}`;
}
