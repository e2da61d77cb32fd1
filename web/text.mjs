// Numbers and names for people: sizes in decimal units as file managers show them, fractions for errors, no locale surprises.

import { say } from "./words.mjs?v=4caac9e6";

const UNITS = [
  [1e9, "GB"],
  [1e6, "MB"],
  [1e3, "kB"],
  [1, "B"],
];

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** The unit that fits `count` bytes: `{size: 1e6, name: "MB"}`. */
export function unitFor(count) {
  const [size, name] = UNITS.find(([size]) => count >= size) ?? UNITS.at(-1);
  return { size, name };
}

/** `13611136` -> `"13.61"` in the given unit; `"–"` when there is no number. */
export function inUnit(count, unit) {
  if (!isNumber(count)) return "–";
  return (count / unit.size).toFixed(unit.size === 1 ? 0 : 2);
}

/** `13611136` -> `"13.61 MB"`. */
export function bytes(count) {
  const unit = unitFor(count);
  return isNumber(count) ? `${inUnit(count, unit)} ${unit.name}` : "–";
}

/** `(13611136, 7396468)` -> `"46% smaller"`. */
export function change(before, after) {
  if (!isNumber(before) || !isNumber(after) || before <= 0) return "";
  const percent = Math.round((after / before - 1) * 100);
  if (percent === 0) return say("same size");
  const share = Math.abs(percent);
  return percent < 0 ? say("{share}% smaller", { share }) : say("{share}% larger", { share });
}

/** Whole percent, rounded down so that 100 means finished. */
export function percent(done, total) {
  if (!isNumber(done) || !isNumber(total) || total <= 0) return 0;
  return Math.min(100, Math.max(0, Math.floor((done / total) * 100)));
}

/** `(5e8, 2)` -> `"250 MB/s"`; empty while there is nothing to measure. */
export function rate(done, seconds) {
  if (!isNumber(done) || !isNumber(seconds) || seconds <= 0 || done <= 0) return "";
  const perSecond = done / seconds;
  const unit = unitFor(perSecond);
  const digits = perSecond / unit.size < 10 ? 1 : 0;
  return `${(perSecond / unit.size).toFixed(digits)} ${unit.name}/s`;
}

/** `0.21` -> `"0.2 s"`, `75` -> `"1 min 15 s"`, `7300` -> `"2 h 2 min"`. */
export function duration(seconds) {
  if (!isNumber(seconds) || seconds < 0) return "–";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Time left in whole seconds, so that the text does not flicker. */
export function timeLeft(seconds) {
  if (!isNumber(seconds) || seconds < 0) return "";
  if (seconds < 1) return say("under 1 s left");
  return say("{time} left", { time: duration(Math.ceil(seconds)).replace(".0 s", " s") });
}

/** rel_l2 as a fraction: `0.00768` -> `"0.0077"`; tiny ones keep one digit. */
export function relL2(value) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  return value < 0.00005 ? value.toExponential(0) : value.toFixed(4);
}

/** `null` means that nothing was lost, `undefined` that nobody knows. */
export function decibels(value) {
  if (value === undefined) return "–";
  return isNumber(value) ? `${value.toFixed(1)} dB` : say("exact");
}

/** The family as people write it; a plan without one says so instead of "unknown". */
export function familyOf({ family_title, family }) {
  return family === "unknown" ? say("Unknown family") : (family_title ?? family);
}

/** `"loads in stock ComfyUI"` -> `"Loads in stock ComfyUI"`. */
export function sentence(text) {
  const line = String(text ?? "");
  return line.charAt(0).toUpperCase() + line.slice(1);
}
