// Texts in the language of ComfyUI's page. English is the key; a text without a translation stays English.

import { MESSAGES, TEXTS } from "./zh.mjs?v=4caac9e6";
import { ERRORS } from "./zh_errors.mjs?v=4caac9e6";

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

/** A text that Python wrote: a warning, a reason. Every part that is known is translated. */
export function translated(text) {
  return chinese() ? replaced(String(text ?? ""), MESSAGES) : String(text ?? "");
}

/** An error, or a problem that was found in a file. */
export function translatedError(text) {
  if (!chinese()) return String(text ?? "");
  errors ??= Object.entries(ERRORS).map(([english, words]) => [patternOf(english), words]);
  return replaced(replaced(String(text ?? ""), MESSAGES), errors);
}

let errors = null; // pattern and Chinese of every error, made when the first one is shown

const replaced = (text, table) => table.reduce((shown, [pattern, words]) => shown.replace(pattern, words), text);

/** A hole reaches no further than its part of the sentence. */
function patternOf(english) {
  const parts = english.split("{}").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const last = english.endsWith("{}") ? parts.length - 2 : -1;
  const holes = parts.slice(1).map((part, at) => (at === last ? "([^;\\n]+)" : "([^;\\n]+?)") + part);
  return new RegExp(parts[0] + holes.join(""));
}
