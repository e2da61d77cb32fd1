// Which layers lost unusually much: more than others of their format in the same model.

const ENOUGH = 8; // fewer layers of a format have no usual error
const VISIBLE = 1.25; // below that, times the median, a difference is noise
const WHISKER = 1.5; // Tukey's: beyond the third quartile by so many distances between the quartiles

/** `isOutlier(layer)` for the layers of one report. */
export function outliersOf(layers) {
  const errors = new Map();
  for (const { format, rel_l2: error } of layers) {
    if (typeof error === "number") errors.set(format, [...(errors.get(format) ?? []), error]);
  }
  const limits = new Map([...errors].map(([format, values]) => [format, limit(values)]));
  return ({ format, rel_l2: error }) => typeof error === "number" && error > limits.get(format);
}

function limit(values) {
  if (values.length < ENOUGH) return Infinity;
  const sorted = values.sort((a, b) => a - b);
  const [low, median, high] = [0.25, 0.5, 0.75].map((part) => sorted[Math.floor(part * (sorted.length - 1))]);
  return Math.max(high + WHISKER * (high - low), VISIBLE * median);
}
