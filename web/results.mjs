// Which result belongs to which settings: ComfyUI's history keeps prompts with what their nodes sent.

const isLink = (value) => Array.isArray(value) && value.length === 2 && typeof value[1] === "number";

/** Everything that decides a node's result, as text: its inputs and those of all nodes before it. */
export function settingsOf(prompt, id, known = new Map()) {
  const key = String(id);
  if (!known.has(key)) {
    known.set(key, "…"); // a loop, which no prompt has, ends here
    const node = prompt?.[key];
    const inputs = Object.entries(node?.inputs ?? {}).sort(([a], [b]) => (a < b ? -1 : 1));
    const values = inputs.map(([name, value]) =>
      isLink(value) ? [name, settingsOf(prompt, value[0], known), value[1]] : [name, value],
    );
    known.set(key, JSON.stringify([node?.class_type, values]));
  }
  return known.get(key);
}

/** The newest output in a history that a node with these settings has sent; null when there is none. */
export function earlierOutput(history, id, settings, has) {
  const runs = Object.values(history ?? {}).reverse();
  for (const { prompt, outputs } of runs) {
    const output = outputs?.[id];
    if (output && has(output) && settingsOf(prompt?.[2], id) === settings) return output;
  }
  return null;
}
