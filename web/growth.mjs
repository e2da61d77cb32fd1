// In Nodes 2.0 the room of a tall node is the panel's: ComfyUI gives as much to every text field.

/** Of the rows of a node's widgets only the one with this element grows. Pages without such rows stay as they are. */
export function growAlone(element) {
  if (typeof ResizeObserver !== "function") return;
  const known = new WeakSet();
  const look = () => {
    const grid = element.closest(".lg-node-widgets");
    if (!grid || known.has(grid)) return;
    known.add(grid);
    const give = () => giveRoom(grid, element);
    new MutationObserver(give).observe(grid, { attributeFilter: ["style"], childList: true });
    give();
  };
  new ResizeObserver(look).observe(element);
}

function giveRoom(grid, element) {
  const now = grid.style.gridTemplateRows;
  const rows = now.split(" ");
  const own = [...grid.children].findIndex((row) => row.contains(element));
  if (rows.length !== grid.children.length || rows[own] !== "auto") return;
  const alone = rows.map((row, at) => (at === own ? row : "min-content")).join(" ");
  if (alone !== now) grid.style.gridTemplateRows = alone;
}
