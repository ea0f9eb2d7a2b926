// The search field: what matches is ringed in the drawing and listed under the field.

let chosen = 0, listed = [];

function search(text) {
  const words = text.trim().toLowerCase();
  const hits = words ? NODES.filter(node => node.name.toLowerCase().includes(words) || node.text.toLowerCase().includes(words)) : [];
  state.matches = new Set(hits.map(node => node.id));
  listed = hits.sort((a, b) => Number(scene.used.has(b.id)) - Number(scene.used.has(a.id))).slice(0, 10);
  chosen = 0;
  listMatches(hits.length);
  redraw();
}

function listMatches(total) {
  const list = at("matches");
  list.hidden = !listed.length;
  list.replaceChildren(...listed.map((node, n) => {
    const item = make("li");
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", String(n === chosen));
    item.append(make("span", node.text), make("small", scene.used.has(node.id) ? node.text === node.name ? "" : node.name : "not in the circuit"));
    item.onmousedown = event => { event.preventDefault(); pick(node.id); };
    return item;
  }));
  if (at("search").value) at("live").textContent = `${total} found`;
}

function pick(id) {
  at("matches").hidden = true;
  at("search").value = "";
  state.matches = new Set();
  panes[0].canvas.focus();
  select(id);
}

at("search").addEventListener("input", event => search(event.target.value));
at("search").addEventListener("blur", () => { at("matches").hidden = true; });
at("search").addEventListener("keydown", event => {
  event.stopPropagation();
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && listed.length) { event.preventDefault(); chosen = (chosen + step + listed.length) % listed.length; listMatches(listed.length); }
  if (event.key === "Enter" && listed.length) pick(listed[chosen].id);
  if (event.key === "Escape") { event.target.value = ""; search(""); event.target.blur(); }
});
