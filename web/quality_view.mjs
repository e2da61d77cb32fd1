// The pictures of a report are images of the graph; the panel says in words what they show.

import { planTable, warningList } from "./plan_table.mjs?v=4caac9e6";
import { meaningOf, worstLayers } from "./report_view.mjs?v=4caac9e6";
import { bytes, change, familyOf, relL2 } from "./text.mjs?v=4caac9e6";
import { say } from "./words.mjs?v=4caac9e6";

export function qualityResult(report) {
  const { bytes_before: before, bytes_after: after } = report;
  return {
    figures: [
      [`${bytes(before)} → ${bytes(after)}`, change(before, after)],
      [relL2(report.rel_l2), say("Weight error (rel_l2)")],
    ],
    families: [familyOf(report)],
    opens: report,
    parts: [
      meaningOf(report),
      worstLayers(report),
      planTable(report),
      warningList(report),
    ],
    line: say("Drawn: three pictures and a text"),
  };
}
