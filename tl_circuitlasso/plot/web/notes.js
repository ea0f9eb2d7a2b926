// What readers add to a circuit: pins, names, notes and groups; kept in the page's address and, on demand, in a file.

const added = { pins: [], names: {}, notes: {}, groups: {} };
for (const node of NODES) node.given = node.text;

// Names and groups take effect: a group's members are drawn as one node, in the place of the first of them.
function applyAdded() {
  for (const node of NODES) {
    node.text = added.names[node.name] || node.given;
    node.stands = node.id;
    node.members = null;
  }
  for (const [title, names] of Object.entries(added.groups)) {
    const members = names.map(name => ID_OF.get(name)).filter(id => id !== undefined && NODES[id].rank === NODES[ID_OF.get(names[0])].rank);
    if (members.length < 2) continue;
    for (const id of members) NODES[id].stands = members[0];
    NODES[members[0]].text = `${title} (${members.length})`;
    NODES[members[0]].members = members;
  }
}

// Edges between what is drawn: those of a group's members become its own, and the strongest stands for equal ones.
function merged(edges) {
  if (!Object.keys(added.groups).length) return edges;
  const found = new Map();
  for (const edge of edges) {
    const source = NODES[edge.source].stands, target = NODES[edge.target].stands;
    if (source === target) continue;
    const key = (source * NODES.length + target) * 4 + PORTS.indexOf(edge.port), known = found.get(key);
    if (!known || known.share < edge.share) found.set(key, { ...edge, source, target, key, pair: source * NODES.length + target });
  }
  return [...found.values()].sort((a, b) => b.share - a.share);
}

function changed() {
  applyAdded();
  remember();
  relayout(false);
}

function togglePin(id) {
  const name = NODES[id].name, at = added.pins.indexOf(name);
  if (at < 0) added.pins.push(name); else added.pins.splice(at, 1);
  changed();
}

function rename(id, title) {
  if (NODES[id].members) {
    const old = Object.keys(added.groups).find(key => added.groups[key][0] === NODES[id].name), names = added.groups[old];
    delete added.groups[old];
    added.groups[title || old] = names;
  } else if (title && title !== NODES[id].given) added.names[NODES[id].name] = title;
  else delete added.names[NODES[id].name];
  changed();
}

function note(id, text) {
  if (text.trim()) added.notes[NODES[id].name] = text; else delete added.notes[NODES[id].name];
  remember();
}

// The pinned nodes of the row of `id`, with it, become one; a group falls apart again.
function regroup(id) {
  const node = NODES[id];
  if (node.members) {
    for (const [title, names] of Object.entries(added.groups)) if (names[0] === node.name) delete added.groups[title];
  } else {
    const names = [node.name, ...groupable(id)];
    if (names.length < 2) return;
    let title = node.text, number = 1;
    while (title in added.groups) title = `${node.text} ${++number}`;
    added.groups[title] = names;
    added.pins = added.pins.filter(name => !names.includes(name) || name === node.name);
  }
  changed();
}

function groupable(id) {
  return added.pins.filter(name => name !== NODES[id].name && ID_OF.has(name) && NODES[ID_OF.get(name)].rank === NODES[id].rank && !NODES[ID_OF.get(name)].members);
}

// ---- the page's address, and a file ---------------------------------------------------------------------------------

function remembered() {
  return { count: state.count, selected: state.selected === null ? null : NODES[state.selected].name, mode: state.mode, filter: state.filter, ...added };
}

function remember() {
  try {
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(remembered()))}`);
  } catch { /* a page inside another has no address of its own */ }
}

function recall(text) {
  let said;
  try { said = JSON.parse(text); } catch { return false; }
  if (!said || typeof said !== "object") return false;
  const texts = value => Object.fromEntries(Object.entries(value && typeof value === "object" ? value : {}).filter(([name, words]) => ID_OF.has(name) && typeof words === "string"));
  added.pins = Array.isArray(said.pins) ? said.pins.filter(name => ID_OF.has(name)) : [];
  added.names = texts(said.names);
  added.notes = texts(said.notes);
  added.groups = Object.fromEntries(Object.entries(said.groups || {}).filter(([, names]) => Array.isArray(names) && names.every(name => ID_OF.has(name))));
  state.count = Number.isInteger(said.count) ? Math.max(0, Math.min(MOST, said.count)) : null;
  state.selected = ID_OF.get(said.selected) ?? null;
  state.mode = MODES.includes(said.mode) ? said.mode : "paths";
  state.filter = { ...NO_FILTER, ...(said.filter && typeof said.filter === "object" ? said.filter : {}) };
  applyAdded();
  return true;
}
