// The panel under a node of FewBits. It draws the JSON it is sent and knows no format by name.

import { adviceResult } from "./advice_view.mjs?v=4caac9e6";
import { el } from "./dom.mjs?v=4caac9e6";
import { fileView } from "./file_view.mjs?v=4caac9e6";
import { LayerList } from "./layer_list.mjs?v=4caac9e6";
import { noteList, planTable, warningList } from "./plan_table.mjs?v=4caac9e6";
import { meaningOf, worstLayers } from "./report_view.mjs?v=4caac9e6";
import { sizesView, targetView } from "./preview_view.mjs?v=4caac9e6";
import { recipeText, savedFile } from "./saved_file.mjs?v=4caac9e6";
import { bytes, change, duration, familyOf, percent, rate, relL2, sentence, timeLeft } from "./text.mjs?v=4caac9e6";
import { say, translated, translatedError } from "./words.mjs?v=4caac9e6";

/**
 * `element` is what the node shows. Its `data-phase` goes idle -> planned -> running -> done; a run that ends early
 * leaves it at "stopped" or "failed" with its plan still readable. `data-stale` marks a result of other settings.
 *
 * `height` is the room a node reserves from the start, in canvas units: results never move what is around them, the
 * rest scrolls.
 */
export class Panel {
  #progress = null;
  #line = "";
  #size = metric();
  #error = metric();
  #loads = el("p", { class: "fewbits-loads" });
  #bar = el("div", {
    class: "fewbits-bar",
    role: "progressbar",
    "aria-label": say("Quantization progress"),
    "aria-valuemin": 0,
    "aria-valuemax": 100,
  });
  #left = el("bdi");
  #right = el("span", { class: "fewbits-right" });
  #spoken = el("span", { class: "fewbits-spoken", role: "status" });
  #overview = el("div");
  #layers;
  #idle;
  #work;
  #plans;
  #inBytes;

  /**
   * `idle`, `work`: what it says before and during a run; `wishes`: what a layer of the list can be given, see LayerList;
   * `plans`: whether its first figures are those of a plan; `inBytes`: whether progress counts them.
   */
  constructor({ height, idle, work = say("Quantizing"), wishes = null, plans = true, inBytes = true }) {
    this.#layers = new LayerList(wishes);
    this.#idle = idle;
    this.#work = work;
    this.#plans = plans;
    this.#inBytes = inBytes;
    this.height = height;
    this.element = el(
      "section",
      // data-capture-wheel: in Nodes 2.0 the wheel scrolls an element that has the focus instead of zooming the canvas
      { class: "fewbits-panel", "aria-label": say("Quantization"), "data-capture-wheel": "true" },
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
          { class: "fewbits-scroll", tabindex: 0, role: "region", "aria-label": say("Plan and report") },
          this.#overview,
          this.#layers.element,
        ),
      ),
    );
    this.element.style.setProperty("--fewbits-height", `${height}px`);
    this.reset();
  }

  /** Whether it shows no run: nothing, or what one would do. */
  get waiting() {
    return this.phase === "idle" || this.phase === "preview";
  }

  get phase() {
    return this.element.dataset.phase;
  }

  /** As before the first run. */
  reset() {
    this.#progress = null;
    this.element.toggleAttribute("data-bare", !this.#plans);
    this.#size.show("–", say("Size before and after"));
    this.#error.show("–", say("Weight error (rel_l2)"));
    this.#loads.textContent = "";
    this.#overview.replaceChildren(...(this.#plans ? [planTable(null)] : []));
    this.#layers.show([]);
    this.#drawBar(0);
    this.#enter("idle", this.#idle);
  }

  /**
   * What a run would do, from headers: `{plan, sizes, target}`, `{inspection}`, of one file or more, with what is `asked`
   * of it, `{advice}`, `{target}` alone, or `{error}`.
   */
  showPreview({ plan, sizes, target, inspection, asked, advice, error }) {
    if (advice) {
      this.showResult(adviceResult(advice));
      this.#drawBar(0);
      this.#enter("preview", say("From the file's header"));
    } else if (inspection) {
      this.showInspection([inspection].flat());
      if (target) this.#overview.prepend(targetView(target));
      this.#drawBar(0);
      this.#enter("preview", asked ? askedFor(asked) : say("From the file's header"));
    } else if (plan) {
      this.#drawPlan(plan, sizesView(sizes), targetView(target));
      this.#error.show("–", say("Weight error (rel_l2)"));
      this.#drawBar(0);
      this.#enter("preview", say("Before running, from the file's header"));
    } else if (target) {
      this.reset();
      this.#overview.replaceChildren(targetView(target));
      this.#enter("preview", this.#idle);
    } else {
      this.reset();
      if (error) this.#overview.prepend(noteList(say("Warnings"), [translatedError(error)]));
    }
  }

  showPlan(plan) {
    this.#progress = null;
    this.#drawPlan(plan);
    this.#error.show("–", say("Weight error (rel_l2)"));
    this.#drawBar(0);
    this.#enter("planned", say("Planned"));
  }

  /** Called about ten times a second: changes texts and one style property, makes no elements. */
  showProgress(progress) {
    this.#progress = progress;
    const { done, total, seconds } = progress;
    const layer = this.#inBytes ? progress.layer : `${this.#work} ${progress.layer}`;
    const share = percent(done, total);
    const finished = done >= total;
    if (this.phase !== "running") this.#enter("running", this.#work);
    this.#drawBar(share, layer);
    const speed = this.#inBytes ? rate(done, seconds) : "";
    const facts = [`${share}%`, speed, finished ? "" : timeLeft(progress.eta_seconds)];
    this.#drawLine(finished ? say("Finishing") : layer, facts.filter(Boolean).join(" · "));
  }

  /** `reused`: ComfyUI answered from an earlier run of the same settings. */
  showReport(report, reused = false) {
    const handedOn = onlyHandsOn(report);
    const { meaning, patches, ...told } = report;
    this.#drawPlan(handedOn ? told : report, worstLayers(report), savedFile(report));
    if (handedOn) this.#error.show("–", say("Nothing is rounded here"));
    else this.#error.show(relL2(report.rel_l2), say("Weight error (rel_l2)"));
    this.#drawBar(100);
    const values = { time: duration(report.seconds), device: report.device };
    const text = report.device ? say("Done in {time} on {device}", values) : say("Done in {time}", values);
    this.#enter("done", reused ? `${say("Unchanged")} · ${text}` : text);
  }

  /** Files that a node looked into, and the plan of a conversion where one was previewed. */
  showInspection(files) {
    const plan = files.find((file) => file.plan)?.plan;
    if (plan) this.showPlan(plan);
    const total = files.reduce((sum, file) => sum + (file.bytes ?? 0), 0);
    if (!plan) {
      this.element.removeAttribute("data-bare");
      this.#size.show(bytes(total), files.map((file) => file.name).join(", "));
      this.#error.show("", "");
      this.#sayWhere(files.map(familyOf), files[0]);
      this.#layers.show([]);
      this.#overview.replaceChildren();
    }
    this.#overview.append(...files.map((file) => fileView(file, plan || files.length > 1)));
    this.#drawBar(100);
    this.#enter("done", plan ? say("Previewed, nothing was written") : say("Looked into the file"));
  }

  /**
   * What is neither a plan nor a file, as a view of its own gives it: two `figures` with what they are, which model it is
   * and what `opens` it, the `parts` below, the layers, and the line under the bar.
   */
  showResult({ figures = [], families = [], opens = {}, parts, layers = [], line }) {
    const [first = ["", ""], second = ["", ""]] = figures;
    this.element.removeAttribute("data-bare");
    this.#size.show(...first);
    this.#error.show(...second);
    this.#sayWhere(families, opens);
    this.#overview.replaceChildren(...parts.filter(Boolean));
    this.#layers.show(layers);
    this.#drawBar(100);
    this.#enter("done", line);
  }

  /** A file without a report: a calibration, or a recipe, which may also be only shown. */
  showSaved(saved) {
    this.#overview.replaceChildren(...[savedFile(saved), recipeText(saved.recipe)].filter(Boolean));
    this.#drawBar(100);
    this.#enter("done", saved.output ? say("Saved") : say("Done"));
  }

  /** ComfyUI reuses an earlier result without running the node; an empty panel says why it is empty. */
  reuse() {
    if (this.waiting) this.#enter("idle", say("Unchanged: ComfyUI reuses its earlier result"));
  }

  /** The run succeeded but sent no report. */
  finish() {
    this.#drawBar(100);
    this.#enter("done", say("Done"));
  }

  /** `stop("Cancelled")`: the plan stays readable, the bar stays where it was. */
  stop(what) {
    this.#enter("stopped", what + this.#position());
  }

  fail(message) {
    const text = translatedError(String(message ?? "").trim());
    if (text) this.#overview.prepend(noteList(say("Error"), [text], "fewbits-error"));
    this.#enter("failed", say("Failed") + this.#position());
  }

  /** A result of settings that are no longer those of the node is greyed and says so. */
  setStale(stale) {
    if (this.phase !== "done" || stale === "stale" in this.element.dataset) return;
    this.element.toggleAttribute("data-stale", stale);
    this.#drawLine(stale ? say("Settings changed: run again for their result") : this.#line);
  }

  #position() {
    if (!this.#progress) return "";
    return say(" at {share}%", { share: percent(this.#progress.done, this.#progress.total) });
  }

  #drawPlan(plan, measured = null, saved = null) {
    const { bytes_before: before, bytes_after: after } = plan;
    this.element.removeAttribute("data-bare");
    this.#size.show(`${bytes(before)} → ${bytes(after)}`, change(before, after));
    this.#sayWhere([familyOf(plan)], plan);
    const parts = [saved, meaningOf(plan), planTable(plan), warningList(plan), measured];
    this.#overview.replaceChildren(...parts.filter(Boolean));
    this.#layers.show(plan.layers ?? []);
  }

  #sayWhere(families, { loads_in, requires_pack }) {
    const parts = [...families, sentence(translated(loads_in))];
    this.#loads.textContent = parts.filter(Boolean).join(" · ");
    this.#loads.classList.toggle("fewbits-needs-pack", Boolean(requires_pack));
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
    this.element.removeAttribute("data-stale");
    this.element.setAttribute("aria-busy", phase === "running");
    this.#line = line;
    this.#drawLine(line);
    this.#spoken.textContent = phase === "idle" ? "" : line;
  }
}

/** A node that saves what others quantized gives nothing up, and says nothing of what they did. */
function onlyHandsOn({ layers = [] }) {
  return layers.length > 0 && layers.every((layer) => layer.action !== "quantize");
}

/** `"Asked for: a file of at most 50% (6.80 MB)"`. */
function askedFor({ said, bytes: size }) {
  const goal = translated(said);
  return say("Asked for: {goal}", { goal: size ? `${goal} (${bytes(size)})` : goal });
}

/** A number that matters, with a line that says what it is. */
function metric() {
  const value = el("strong", { class: "fewbits-value" });
  const label = el("span", { class: "fewbits-label" });
  return {
    element: el("div", { class: "fewbits-metric", role: "group" }, value, label),
    show(text, note) {
      value.textContent = text;
      label.textContent = note;
    },
  };
}
