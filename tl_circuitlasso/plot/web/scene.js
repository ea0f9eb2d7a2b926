// What is drawn where: node boxes, edge curves and bands, for the union of what the panes show.

const CLOSE = 35, NODE_HEIGHT = 32, EDGE_STEP = 14, PORT_GAP = 10, FOLD = 16, CELL = 0.7, SMALL_MODEL = 64, MOST_SLOPE = 0.25;
const ruler = document.createElement("canvas").getContext("2d");

function buildScene(shown, everything, pinned, aspect, numbered) {
  const union = new Map();
  for (const edges of shown) for (const edge of edges) {
    const known = union.get(edge.key);
    if (!known || known.share < edge.share) union.set(edge.key, edge);
  }
  const edges = [...union.values()].sort((a, b) => b.share - a.share);
  const used = new Set(edges.flatMap(edge => [edge.source, edge.target]));
  const drawn = NODES.filter(node => node.stands === node.id && (everything || used.has(node.id) || node.end || pinned.has(node.id)));
  const { rows, bands } = foldRows(drawn, numbered, aspect);
  const widths = nodeWidths(drawn, edges);
  const layout = placeNodes(rows, edges, id => widths.get(id), aspect, numbered ? id => NODES[id].column : null);
  const ends = meetingPoints(layout, edges, widths);
  const curves = new Map(edges.map((edge, n) => [edge.key, curveOf(pastNodes([ends[n][0], ...layout.routes[n].slice(1, -1), ends[n][1]]))]));
  const boxes = new Map(drawn.map(node => [node.id, { ...layout.position.get(node.id), width: widths.get(node.id), used: used.has(node.id) }]));
  return { ...layout, rows, bands, boxes, curves, used, bounds: boundsOf(boxes, curves) };
}

// Rows of 16 nodes at most, or of as many as fill the page's width where thousands are drawn; CELL: height over width of
// what a node takes.
function foldRows(drawn, numbered, aspect) {
  const most = Math.max(FOLD, Math.ceil(Math.sqrt(CELL * drawn.length / aspect)));
  const ranks = [...new Set(drawn.map(node => node.rank))].sort((a, b) => a - b);
  const rows = [], bands = [];
  for (const rank of ranks) {
    const members = drawn.filter(node => node.rank === rank);
    const count = Math.max(1, Math.ceil(members.length / most));
    const fold = (node, n) => numbered ? node.fold : n % count;
    const folds = [...new Set(members.map(fold))].sort((a, b) => a - b);
    bands.push({ label: DATA.bands[rank], first: rows.length, last: rows.length + folds.length - 1 });
    for (const part of folds) {
      const row = members.filter((node, n) => fold(node, n) === part);
      rows.push((numbered ? row.sort((a, b) => a.column - b.column) : row).map(node => node.id));
    }
  }
  return { rows, bands };
}

function nodeWidths(drawn, edges) {
  const leaving = new Map(), entering = new Map(), ports = new Map();
  const count = (map, id) => map.set(id, (map.get(id) || 0) + 1);
  const seen = new Set();
  for (const edge of edges) {
    count(leaving, edge.source);
    count(entering, edge.target);
    const port = edge.target + edge.port;
    if (!seen.has(port)) { seen.add(port); count(ports, edge.target); }
  }
  ruler.font = "500 13px system-ui, sans-serif";
  return new Map(drawn.map(node => {
    node.lines = wrapLabel(node.text);
    const text = Math.max(...node.lines.map(line => ruler.measureText(line).width)) * (node.lines.length > 1 ? 0.82 : 1);
    const most = Math.max(leaving.get(node.id) || 0, entering.get(node.id) || 0);
    return [node.id, Math.max(58, text + 24, Math.min(260, 20 + EDGE_STEP * most + PORT_GAP * (ports.get(node.id) || 0)))];
  }));
}

function wrapLabel(text) {
  if (text.length <= 18) return [text];
  const cut = Math.max(text.lastIndexOf(" ", 18), 0) || 18;
  const rest = text.slice(cut).trim();
  return [text.slice(0, cut), rest.length > 18 ? rest.slice(0, 17).trimEnd() + "…" : rest];
}

// Where each edge leaves and enters its nodes: side by side in the order in which they come, ports q, k, v from the left.
function meetingPoints(layout, edges, widths) {
  const starts = new Map(), stops = new Map(), leaving = new Map(), entering = new Map();
  const add = (map, id, n) => (map.get(id) || map.set(id, []).get(id)).push(n);
  edges.forEach((edge, n) => { add(leaving, edge.source, n); add(entering, edge.target, n); });
  for (const [id, numbers] of leaving) {
    numbers.sort((a, b) => layout.routes[a][1].x - layout.routes[b][1].x || PORTS.indexOf(edges[a].port) - PORTS.indexOf(edges[b].port));
    sideBySide(numbers, numbers.map(() => 0), layout.position.get(id), widths.get(id), -NODE_HEIGHT / 2, starts);
  }
  for (const [id, numbers] of entering) {
    const before = n => layout.routes[n][layout.routes[n].length - 2].x;
    numbers.sort((a, b) => PORTS.indexOf(edges[a].port) - PORTS.indexOf(edges[b].port) || before(a) - before(b));
    const gaps = numbers.map((n, place) => place && edges[n].port !== edges[numbers[place - 1]].port ? PORT_GAP : 0);
    sideBySide(numbers, gaps, layout.position.get(id), widths.get(id), NODE_HEIGHT / 2, stops);
  }
  return edges.map((_, n) => [starts.get(n), stops.get(n)]);
}

function sideBySide(numbers, gaps, centre, width, rise, places) {
  let total = 0;
  const at = gaps.map((gap, n) => (total += gap + (n ? EDGE_STEP : 0)));
  const squeeze = total ? Math.min(1, 0.74 * width / total) : 1;
  numbers.forEach((number, n) => places.set(number, { x: centre.x + (at[n] - total / 2) * squeeze, y: centre.y + rise }));
}

// An upright piece wherever a route passes close beside a node, and how slanted it may be elsewhere.
function pastNodes(points) {
  return points.flatMap(({ x, y, room }) => room > 0 && room < CLOSE
    ? [{ x, y: y + NODE_HEIGHT / 2, most: MOST_SLOPE }, { x, y: y - NODE_HEIGHT / 2, most: MOST_SLOPE }]
    : [{ x, y, most: Math.max(MOST_SLOPE, 0.55 * (room || 0) / NODE_HEIGHT) }]);
}

// A smooth curve through the points that never overshoots: cubic pieces whose slopes are limited (Fritsch and Carlson
// 1980, and so that no curve cuts the corner of a node beside its bend point), upright at both ends.
function curveOf(points) {
  const samples = [], last = points.length - 1;
  const tip = { x: points[last].x, y: points[last].y };
  const knots = [...points.slice(0, last), { x: tip.x, y: tip.y + 7 }];
  const steep = knots.slice(1).map((p, n) => (p.x - knots[n].x) / (p.y - knots[n].y));
  const slope = knots.map((_, n) => n && n < last && steep[n - 1] * steep[n] > 0
    ? Math.max(-knots[n].most, Math.min(knots[n].most, 2 * steep[n - 1] * steep[n] / (steep[n - 1] + steep[n]))) : 0);
  const spot = ({ x, y }) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  let d = `M${spot(knots[0])}`;
  for (let n = 0; n < last; n++) {
    const [a, b] = [knots[n], knots[n + 1]], h = (b.y - a.y) * 0.46;
    const c = { x: a.x + slope[n] * h, y: a.y + h }, e = { x: b.x - slope[n + 1] * h, y: b.y - h };
    d += `C${spot(c)} ${spot(e)} ${spot(b)}`;
    for (let step = n ? 1 : 0; step <= 6; step++) samples.push(bezierPoint(a, c, e, b, step / 6));
  }
  return { path: new Path2D(d), d, samples, tip };
}

function bezierPoint(a, b, c, d, t) {
  const s = 1 - t;
  const mix = axis => s * s * s * a[axis] + 3 * s * s * t * b[axis] + 3 * s * t * t * c[axis] + t * t * t * d[axis];
  return { x: mix("x"), y: mix("y") };
}

function boundsOf(boxes, curves) {
  let left = Infinity, right = -Infinity, top = Infinity, bottom = -Infinity;
  for (const { x, y, width } of boxes.values()) {
    left = Math.min(left, x - width / 2); right = Math.max(right, x + width / 2);
    top = Math.min(top, y - NODE_HEIGHT / 2); bottom = Math.max(bottom, y + NODE_HEIGHT / 2);
  }
  for (const { samples } of curves.values()) for (const { x } of samples) { left = Math.min(left, x); right = Math.max(right, x); }
  return { left, right, top, bottom };
}

function distanceTo(samples, x, y) {
  let best = Infinity;
  for (let n = 1; n < samples.length; n++) {
    const a = samples[n - 1], b = samples[n], dx = b.x - a.x, dy = b.y - a.y;
    const t = Math.max(0, Math.min(1, ((x - a.x) * dx + (y - a.y) * dy) / (dx * dx + dy * dy || 1)));
    best = Math.min(best, (a.x + t * dx - x) ** 2 + (a.y + t * dy - y) ** 2);
  }
  return Math.sqrt(best);
}
