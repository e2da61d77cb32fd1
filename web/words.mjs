// Texts in the language of ComfyUI's page. English is the key; a text without a translation stays English.

import { MESSAGES, TEXTS } from "./zh.mjs?v=0b5dfaf4";

let language = () => "en";

/** `useLanguage(() => "zh")`: asked at every text, because the setting arrives after the script. */
export function useLanguage(ask) {
  language = ask;
}

const chinese = () => String(language() ?? "").startsWith("zh");

/** `say("Done in {time}", { time: "12 s" })`. */
export function say(text, values = {}) {
  const shown = (chinese() && TEXTS[text]) || text;
  return shown.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** A text that Python wrote: a warning, a reason, an error. Every part that is known is translated. */
export function translated(text) {
  const lines = String(text ?? "");
  if (!chinese()) return lines;
  return MESSAGES.reduce((shown, [pattern, words]) => shown.replace(pattern, words), lines);
}
