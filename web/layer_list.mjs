// Every layer with its decision, the reason and the measured error, behind a disclosure with a filter.

import { el, layerName } from "./dom.mjs?v=4caac9e6";
import { errorOf } from "./report_view.mjs?v=4caac9e6";
import { outliersOf } from "./outliers.mjs?v=4caac9e6";
import { bytes } from "./text.mjs?v=4caac9e6";
import { say, translated } from "./words.mjs?v=4caac9e6";

// how layers may be ordered: by name of the choice, what is compared; the first is the order of the file
const ORDERS = {
  "In the file's order": null,
  "From the first block to the last": byDepth,
  "Largest error first": () => (layer) => -(layer.rel_l2 ?? -1),
  "Largest size first": () => (layer) => -(layer.bytes_after ?? 0),
};
const NUMBER = /(?:^|\.)(\d+)(?=\.|$)/;
const BLOCKS = 1e6; // more than any model has of a kind
const PRIMARY = /^primary(?:; |$)/;

/** Nobody said anything about the layer: it becomes what all become. */
export const isPrimary = (layer) => PRIMARY.test(layer.reason ?? "");

/** Lives as long as its panel, so that filter text, focus and scroll position survive when the report arrives. */
export class LayerList {
  #layers = [];
  #entries = null; // made when the list is opened first: a large model has hundreds of layers
  #summary = el("summary");
  // type=search would let ComfyUI take Ctrl+V for pasting nodes; it leaves only text fields alone
  #filter = el("input", {
    type: "text",
    class: "fewbits-filter",
    placeholder: say("Filter by name, format or reason"),
    "aria-label": say("Filter layers"),
    spellcheck: "false",
    autocomplete: "off",
  });
  #order = el("select", { class: "fewbits-order", "aria-label": say("Order of the layers") });
  #wishes = null;
  #wanted = new Map(); // name of a layer -> what was chosen for it here
  #count = el("span", { class: "fewbits-count", role: "status" });
  #list = el("ul", { class: "fewbits-layers" });

  /** `wishes`: `choices()` that a layer has and `give(layer, choice)`; without it formats are only told. */
  constructor(wishes = null) {
    this.#wishes = wishes && { choices: wishes.choices, give: (layer, format) => this.#give(wishes, layer, format) };
    this.#order.append(...Object.keys(ORDERS).map((name) => el("option", { value: name }, say(name))));
    this.#order.addEventListener("change", () => this.show(this.#layers));
    this.element = el(
      "details",
      { class: "fewbits-details" },
      this.#summary,
      el("div", { class: "fewbits-filter-row" }, this.#filter, this.#order, this.#count),
      this.#list,
    );
    this.element.addEventListener("toggle", () => this.#fill());
    this.#filter.addEventListener("input", () => this.#applyFilter());
    this.#summary.addEventListener("click", () => {
      if (!this.element.open) requestAnimationFrame(() => this.#bringToTop());
    });
  }

  show(layers) {
    this.#layers = layers;
    this.#entries = null;
    this.#summary.textContent = layers.length === 1 ? say("1 layer") : say("All {count} layers", { count: layers.length });
    this.element.hidden = layers.length === 0;
    this.#fill();
  }

  #fill() {
    if (!this.element.open || this.#entries) return;
    const isOutlier = outliersOf(this.#layers);
    this.#entries = this.#sorted().map((layer) => ({
      element: entry(layer, this.#wishes, isOutlier(layer), this.#wanted.get(layer.name)),
      text: [layer.name, layer.format, layer.action, layer.reason].join(" ").toLowerCase(),
    }));
    this.#list.replaceChildren(...this.#entries.map(({ element }) => element));
    this.#applyFilter();
  }

  #give(wishes, layer, format) {
    this.#wanted.set(layer.name, format);
    wishes.give(layer, format);
  }

  #sorted() {
    const value = ORDERS[this.#order.value]?.(this.#layers);
    return value ? [...this.#layers].sort((a, b) => value(a) - value(b)) : this.#layers;
  }

  /** An entry stays when it contains every word. */
  #applyFilter() {
    const words = this.#filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { element, text } of this.#entries ?? []) {
      element.hidden = !words.every((word) => text.includes(word));
      if (!element.hidden) shown += 1;
    }
    this.#count.textContent = words.length ? say("{shown} of {all}", { shown, all: this.#layers.length }) : "";
  }

  #bringToTop() {
    const area = this.element.parentElement;
    if (area) area.scrollTop += this.element.getBoundingClientRect().top - area.getBoundingClientRect().top;
  }
}

/** `blocks.10.mlp` after `blocks.2.mlp`; kinds of blocks, and what is in none, in the order of the file. */
function byDepth(layers) {
  const kinds = new Map();
  const places = new Map();
  for (const { name } of layers) {
    const number = NUMBER.exec(name);
    const kind = number ? name.slice(0, number.index) : name;
    if (!kinds.has(kind)) kinds.set(kind, kinds.size);
    places.set(name, kinds.get(kind) * BLOCKS + Number(number?.[1] ?? 0));
  }
  return (layer) => places.get(layer.name);
}

/** `wanted`: what was chosen for the layer; another rule may count before that. */
function entry(layer, wishes, outlier, wanted) {
  const shape = (layer.shape ?? []).join(" × ");
  const before = bytes(layer.bytes_before);
  const after = bytes(layer.bytes_after);
  const now = layer.format ?? layer.action;
  const facts = [
    wishes && layer.rule ? chooser(layer, now, wishes) : say(String(now)),
    [shape, layer.dtype].filter(Boolean).join(" "),
    before === after ? before : `${before} → ${after}`,
  ].filter(Boolean);
  const reason = String(layer.reason ?? "").replace(PRIMARY, "");
  return el(
    "li",
    {},
    el("div", { class: "fewbits-layer" }, layerName(layer.name), errorOf(layer, outlier)),
    el("div", { class: "fewbits-facts" }, ...facts.map((fact) => el("span", {}, fact))),
    reason ? el("div", { class: "fewbits-reason" }, translated(reason)) : null,
    isBeaten(layer, wanted ?? now, now) ? el("div", { class: "fewbits-beaten" }, beaten(layer, wanted)) : null,
  );
}

/** Whether a rule that counts first makes something else of a layer than what was chosen for it. */
function isBeaten(layer, wanted, now) {
  return wanted !== now && Boolean(layer.rule) && ![layer.name, "primary"].includes(layer.rule);
}

function beaten({ rule }, format) {
  return say("{format} was chosen here, but rule '{rule}' counts first: change that rule", { format: say(format), rule });
}

/** A menu of what the layer may become. Its choices are made when it is opened: a large model has hundreds of layers. */
function chooser(layer, now, wishes) {
  const option = (value) => el("option", { value }, say(value));
  const menu = el("select", { class: "fewbits-choice", "aria-label": say("Format of {layer}", { layer: layer.name }) }, option(now));
  const fill = () => {
    if (menu.options.length > 1) return;
    menu.append(...wishes.choices().filter((value) => value !== now).map(option));
  };
  for (const type of ["pointerdown", "focus"]) menu.addEventListener(type, fill);
  menu.addEventListener("change", () => {
    menu.toggleAttribute("data-changed", menu.value !== now);
    wishes.give(layer, menu.value);
  });
  return menu;
}
