// Where a file went, in words that find it again.

import { el } from "./dom.mjs?v=4caac9e6";
import { say } from "./words.mjs?v=4caac9e6";

const COPIED_MS = 1500;

/** A recipe's text with a copy button; null without one. */
export function recipeText(recipe) {
  if (!recipe) return null;
  const text = el("pre", { class: "fewbits-recipe" }, recipe);
  return el("div", { class: "fewbits-saved" }, copyButton(say("Copy recipe"), recipe, text), text);
}

/** The path with a copy button and the loader that lists it; null when nothing was written. */
export function savedFile({ output, saved, text } = {}) {
  if (!saved?.path) return null;
  const path = el("code", { title: output }, saved.path);
  const button = copyButton(say("Copy path"), output ?? saved.path, path);
  return el(
    "div",
    { class: "fewbits-saved", role: "group", "aria-label": say("Saved file") },
    el("div", { class: "fewbits-path" }, path, button),
    el("div", { class: "fewbits-label" }, whereItGoes(saved, text)),
  );
}

function whereItGoes({ loader, name }, text) {
  if (loader) return say("Loads with {loader} as {name}", { loader: say(loader), name });
  if (text === "recipe") return say("For fewbits quantize --recipe, or to paste into Layer Rules");
  return say("No loader looks there: move it into one of ComfyUI's model folders");
}

/** `shown`: the element that has the text. */
function copyButton(name, text, shown) {
  const button = el("button", { type: "button", class: "fewbits-button" }, name);
  button.addEventListener("click", () => copy(text, button, shown));
  return button;
}

/** A page that is not served securely has no clipboard: there the path is selected, ready for Ctrl+C. */
async function copy(text, button, shown) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = say("Copied");
    setTimeout(() => (button.textContent = label), COPIED_MS);
  } catch {
    getSelection()?.selectAllChildren(shown);
  }
}
