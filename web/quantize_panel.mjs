// The panel under a Quantize node. It draws the JSON it is sent and knows no format by name.

import { el } from "./dom.mjs?v=bff82685";
import { LayerList } from "./layer_list.mjs?v=bff82685";
import { noteList, planTable, warningList } from "./plan_table.mjs?v=bff82685";
import { worstLayers } from "./report_view.mjs?v=bff82685";
import { bytes, change, duration, percent, rate, relL2, sentence, timeLeft } from "./text.mjs?v=bff82685";

/** Room a node reserves from the start, in canvas units: results never move what is around them, the rest scrolls. */
export const PANEL_HEIGHT = 344;

const ERROR_LABEL = "Weight error (rel_l2)";

/**
 * `element` is what the node shows. Its `data-phase` goes idle -> planned -> running -> done; a run that ends early
 * leaves it at "stopped" or "failed" with its plan still readable.
 */
export class QuantizePanel {
  #progress = null;
  #size = metric("Size");
  #error = metric("Error");
  #loads = el("p", { class: "fewbits-loads" });
  #bar = el("div", {
    class: "fewbits-bar",
    role: "progressbar",
    "aria-label": "Quantization progress",
    "aria-valuemin": 0,
    "aria-valuemax": 100,
  });
  #left = el("bdi");
  #right = el("span", { class: "fewbits-right" });
  #spoken = el("span", { class: "fewbits-spoken", role: "status" });
  #overview = el("div");
  #layers = new LayerList();

  constructor() {
    this.element = el(
      "section",
      // data-capture-wheel: in Nodes 2.0 the wheel scrolls an element that has the focus instead of zooming the canvas
      { class: "fewbits-panel", "aria-label": "Quantization", "data-capture-wheel": "true" },
      el(
        "div",
        { class: "fewbits-body" },
        el("div", { class: "fewbits-metrics" }, this.#size.element, this.#error.element, this.#loads),
        el(
          "div",
          { class: "fewbits-status" },
          this.#bar,
          el("p", { class: "fewbits-line" }, el("span", { class: "fewbits-left" }, this.#left), this.#right),
          this.#spoken,
        ),
        el(
          "div",
          { class: "fewbits-scroll", tabindex: 0, role: "region", "aria-label": "Plan and report" },
          this.#overview,
          this.#layers.element,
        ),
      ),
    );
    this.element.style.setProperty("--fewbits-height", `${PANEL_HEIGHT}px`);
    this.reset();
  }

  /** As before the first run. */
  reset() {
    this.#progress = null;
    this.#size.show("–", "Size before and after");
    this.#error.show("–", ERROR_LABEL);
    this.#loads.textContent = "";
    this.#overview.replaceChildren(planTable(null));
    this.#layers.show([]);
    this.#drawBar(0);
    this.#enter("idle", "Run the workflow to see the plan");
  }

  showPlan(plan) {
    this.#progress = null;
    this.#drawPlan(plan);
    this.#error.show("–", ERROR_LABEL);
    this.#drawBar(0);
    this.#enter("planned", "Planned");
  }

  /** Called about ten times a second: changes texts and one style property, makes no elements. */
  showProgress(progress) {
    this.#progress = progress;
    const { layer, done, total, seconds } = progress;
    const share = percent(done, total);
    const finished = done >= total;
    if (this.element.dataset.phase !== "running") this.#enter("running", "Quantizing");
    this.#drawBar(share, layer);
    const facts = [`${share}%`, rate(done, seconds), finished ? "" : timeLeft(progress.eta_seconds)];
    this.#drawLine(finished ? "Finishing" : layer, facts.filter(Boolean).join(" · "));
  }

  showReport(report) {
    this.#drawPlan(report, worstLayers(report));
    this.#error.show(relL2(report.rel_l2), ERROR_LABEL);
    this.#drawBar(100);
    const where = report.device ? ` on ${report.device}` : "";
    this.#enter("done", `Done in ${duration(report.seconds)}${where}`);
  }

  /** ComfyUI reuses an earlier result without running the node; what is shown stays, and an empty panel says why. */
  reuse() {
    if (this.element.dataset.phase === "idle") this.#enter("idle", "Unchanged: ComfyUI reuses its earlier result");
  }

  /** The run succeeded but sent no report. */
  finish() {
    this.#drawBar(100);
    this.#enter("done", "Done");
  }

  /** `stop("Cancelled")`: the plan stays readable, the bar stays where it was. */
  stop(what) {
    this.#enter("stopped", what + this.#position());
  }

  fail(message) {
    const text = String(message ?? "").trim();
    if (text) this.#overview.prepend(noteList("Error", [text], "fewbits-error"));
    this.#enter("failed", `Failed${this.#position()}`);
  }

  #position() {
    return this.#progress ? ` at ${percent(this.#progress.done, this.#progress.total)}%` : "";
  }

  #drawPlan(plan, measured = null) {
    this.#size.show(`${bytes(plan.bytes_before)} → ${bytes(plan.bytes_after)}`, change(plan.bytes_before, plan.bytes_after));
    this.#loads.textContent = [plan.family, sentence(plan.loads_in)].filter(Boolean).join(" · ");
    this.#loads.classList.toggle("fewbits-needs-pack", Boolean(plan.requires_pack));
    this.#overview.replaceChildren(...[planTable(plan), warningList(plan), measured].filter(Boolean));
    this.#layers.show(plan.layers ?? []);
  }

  #drawBar(share, layer) {
    this.#bar.style.setProperty("--share", `${share}%`);
    this.#bar.setAttribute("aria-valuenow", share);
    this.#bar.setAttribute("aria-valuetext", layer ? `${share}%, ${layer}` : `${share}%`);
  }

  #drawLine(left, right = "") {
    this.#left.textContent = left ?? "";
    this.#right.textContent = right;
  }

  #enter(phase, line) {
    this.element.dataset.phase = phase;
    this.element.setAttribute("aria-busy", phase === "running");
    this.#drawLine(line);
    this.#spoken.textContent = phase === "idle" ? "" : line;
  }
}

/** A number that matters, with a line that says what it is. */
function metric(name) {
  const value = el("strong", { class: "fewbits-value" });
  const label = el("span", { class: "fewbits-label" });
  return {
    element: el("div", { class: "fewbits-metric", role: "group", "aria-label": name }, value, label),
    show(text, note) {
      value.textContent = text;
      label.textContent = note;
    },
  };
}
