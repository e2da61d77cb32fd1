// Building elements without markup strings: text from a model file can never become HTML.

/**
 * `el("th", { scope: "col" }, "Layers")`; attributes with null, undefined or false are left out, children may be
 * elements, text, or null.
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A name in dots whose end matters: when space is short it is cut at its start. */
export function layerName(name) {
  return el("span", { class: "fewbits-name", title: name }, el("bdi", {}, String(name)));
}
