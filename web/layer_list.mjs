// Every layer with its decision, the reason and the measured error, behind a disclosure with a filter.

import { el, layerName } from "./dom.mjs?v=4b00d3ff";
import { bytes, decibels, relL2 } from "./text.mjs?v=4b00d3ff";
import { say, translated } from "./words.mjs?v=4b00d3ff";

// how layers may be ordered: by name of the choice, what is compared; the first is the order of the file
const ORDERS = {
  "In the file's order": null,
  "Largest error first": (layer) => -(layer.rel_l2 ?? -1),
  "Largest size first": (layer) => -(layer.bytes_after ?? 0),
};

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
  #keep = null;
  #count = el("span", { class: "fewbits-count", role: "status" });
  #list = el("ul", { class: "fewbits-layers" });

  /** `keep`: called with the name of a layer that shall stay as it is; without it there is no button. */
  constructor(keep = null) {
    this.#keep = keep;
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
    this.#entries = this.#sorted().map((layer) => ({
      element: entry(layer, this.#keep),
      text: [layer.name, layer.format, layer.action, layer.reason].join(" ").toLowerCase(),
    }));
    this.#list.replaceChildren(...this.#entries.map(({ element }) => element));
    this.#applyFilter();
  }

  #sorted() {
    const value = ORDERS[this.#order.value];
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

function entry(layer, keep) {
  const shape = (layer.shape ?? []).join(" × ");
  const before = bytes(layer.bytes_before);
  const after = bytes(layer.bytes_after);
  const facts = [
    layer.format ?? say(String(layer.action)),
    [shape, layer.dtype].filter(Boolean).join(" "),
    before === after ? before : `${before} → ${after}`,
  ].filter(Boolean);
  const measured = typeof layer.rel_l2 === "number";
  return el(
    "li",
    {},
    el(
      "div",
      { class: "fewbits-layer" },
      layerName(layer.name),
      measured ? el("span", { title: decibels(layer.sqnr_db) }, relL2(layer.rel_l2)) : null,
    ),
    el("div", { class: "fewbits-facts" }, ...facts.map((fact) => el("span", {}, fact))),
    keep && layer.format ? keepButton(layer.name, keep) : null,
    layer.reason ? el("div", { class: "fewbits-reason" }, translated(layer.reason)) : null,
  );
}

function keepButton(name, keep) {
  const button = el("button", { type: "button", class: "fewbits-button" }, say("Keep this layer"));
  button.addEventListener("click", () => {
    keep(name);
    button.textContent = say("Will be kept");
    button.disabled = true;
  });
  return button;
}
