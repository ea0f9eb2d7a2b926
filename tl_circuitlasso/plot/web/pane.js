// One canvas: draws a graph's share of the scene, finds what lies under the pointer.

const READABLE = 9; // pixels: no letter is drawn smaller
const HEAVY = 1500; // edges; past that, drawing once and moving the picture is smoother

let COLOURS = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "ink", "soft", "faint", "rule", "band", "accent", "focus", "q", "k", "v", "plain", "negative",
    "head-face", "head-rim", "mlp-face", "mlp-rim", "other-face", "other-rim", "end-face", "end-rim", "end-ink"];
  COLOURS = Object.fromEntries(names.map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function shortLabel(text) {
  return text.length > 16 ? `${text.slice(0, 15).trimEnd()}…` : text;
}

function edgeColour(edge) {
  if (edge.port) return COLOURS[edge.port];
  return edge.score < 0 ? COLOURS.negative : COLOURS.plain;
}

class Pane {
  constructor(graph, number, host) {
    this.graph = graph;
    this.number = number;
    this.root = host.appendChild(document.createElement("section"));
    this.root.className = "pane";
    this.canvas = this.root.appendChild(document.createElement("canvas"));
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", `${graph.name}: circuit drawing. Arrow keys move between nodes, Enter shows paths.`);
    this.caption = this.root.appendChild(document.createElement("div"));
    this.caption.className = "caption";
    this.hint = this.root.appendChild(document.createElement("p"));
    this.hint.className = "hint";
    this.context = this.canvas.getContext("2d");
    this.edges = [];
    this.shared = new Set();
    this.previous = null;
    this.progress = 1;
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.width = this.root.clientWidth;
    this.height = this.root.clientHeight;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.sheet = null;
  }

  show(scene, edges, previous) {
    this.scene = scene;
    this.edges = edges;
    this.previous = previous;
    this.sheet = null;
    this.used = new Set(edges.flatMap(edge => [edge.source, edge.target]));
  }

  place(id) {
    const box = this.scene.boxes.get(id), before = this.previous && this.previous.boxes.get(id);
    if (!before || this.progress >= 1) return box;
    const t = this.progress;
    return { ...box, x: before.x + (box.x - before.x) * t, y: before.y + (box.y - before.y) * t };
  }

  draw(transform, look) {
    if (!this.scene) return;
    const ctx = this.context, [left, top] = transform.invert([0, 0]), [right, bottom] = transform.invert([this.width, this.height]);
    this.view = { left, right, top, bottom };
    this.thinnest = (this.edges.length > HEAVY ? 0.4 : 0.75) / transform.k; // on the screen: below it lines fade away
    if (this.edges.length > HEAVY) {
      this.drawFromSheet(ctx, transform, look);
    } else {
      this.clear(ctx, transform);
      this.drawBands(ctx);
      this.drawEdges(ctx, look);
    }
    for (const id of this.scene.boxes.keys()) this.drawNode(ctx, NODES[id], look, transform.k);
    if (13 * transform.k < READABLE) this.drawLabelsApart(ctx, look, transform.k);
    this.drawBandLabels(ctx, transform);
  }

  clear(ctx, transform) {
    const ratio = window.devicePixelRatio || 1;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.globalAlpha = 1;
    ctx.fillStyle = COLOURS.paper;
    ctx.fillRect(0, 0, this.canvas.width, this.canvas.height);
    ctx.setTransform(ratio * transform.k, 0, 0, ratio * transform.k, ratio * transform.x, ratio * transform.y);
  }

  // Thousands of edges are drawn once on a sheet. While the page moves the sheet moves; what is pointed at lies on top.
  drawFromSheet(ctx, transform, look) {
    if (!this.sheet || (!this.moving && this.sheet.at !== transform) || this.sheet.paper !== COLOURS.paper) {
      const canvas = this.sheet ? this.sheet.canvas : document.createElement("canvas");
      canvas.width = this.canvas.width;
      canvas.height = this.canvas.height;
      this.sheet = { canvas, at: transform, paper: COLOURS.paper };
      const page = canvas.getContext("2d");
      this.clear(page, transform);
      this.drawBands(page);
      this.drawEdges(page, { ...look, paths: null, edge: null });
    }
    const { at, canvas } = this.sheet, ratio = window.devicePixelRatio || 1, k = transform.k / at.k;
    this.clear(ctx, transform);
    ctx.setTransform(k, 0, 0, k, ratio * (transform.x - k * at.x), ratio * (transform.y - k * at.y));
    ctx.globalAlpha = look.paths ? 0.22 : 1;
    ctx.drawImage(canvas, 0, 0);
    ctx.globalAlpha = 1;
    ctx.setTransform(ratio * transform.k, 0, 0, ratio * transform.k, ratio * transform.x, ratio * transform.y);
    const bright = this.edges.filter(edge => (look.paths && look.paths.has(edge.key)) || edge.key === look.edge);
    if (bright.length < HEAVY) for (const edge of bright.reverse()) this.drawEdge(ctx, edge, 0.9, bright.length < 400, edge.key === look.edge ? 1.5 : 0);
  }

  drawBands(ctx) {
    ctx.fillStyle = COLOURS.band;
    for (const band of this.scene.bands) {
      if (!band.label) continue;
      const high = this.scene.rowY[band.last] - 26, low = this.scene.rowY[band.first] + 26;
      ctx.fillRect(this.view.left, high, this.view.right - this.view.left, low - high);
    }
  }

  // Names of the rows keep to the left edge of the window and to a readable size.
  drawBandLabels(ctx, transform) {
    const size = Math.max(9.5, Math.min(12, 12 * transform.k)) / transform.k;
    ctx.font = `${size}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    let last = Infinity;
    for (const band of this.scene.bands) {
      const y = (this.scene.rowY[band.first] + this.scene.rowY[band.last]) / 2, x = this.view.left + 12 / transform.k;
      if (!band.label || Math.abs(y - last) < 1.6 * size) continue;
      last = y;
      ctx.globalAlpha = 0.85;
      ctx.fillStyle = COLOURS.band;
      ctx.fillRect(x - size / 2, y - 0.8 * size, ctx.measureText(band.label).width + size, 1.6 * size);
      ctx.globalAlpha = 1;
      ctx.fillStyle = COLOURS.soft;
      ctx.fillText(band.label, x, y);
    }
  }

  drawEdges(ctx, look) {
    const few = this.edges.length <= 400, busy = look.paths !== null;
    ctx.lineCap = "butt";
    const faded = [], bright = [];
    for (let n = this.edges.length - 1; n >= 0; n--) {
      const edge = this.edges[n];
      (busy && !look.paths.has(edge.key) ? faded : bright).push(edge);
    }
    for (const edge of faded) this.drawEdge(ctx, edge, 0.1, false);
    const fade = few || busy ? 1 : this.edges.length <= HEAVY ? 0.9 : 0.6;
    for (const edge of bright) {
      const shared = look.differences && this.shared.has(edge.pair);
      this.drawEdge(ctx, edge, shared ? 0.13 : opacityOf(edge) * fade, few && !shared);
    }
    if (look.edge && this.edges.some(edge => edge.key === look.edge)) {
      this.drawEdge(ctx, this.edges.find(edge => edge.key === look.edge), 1, true, 1.5);
    }
  }

  drawEdge(ctx, edge, alpha, rim, extra = 0) {
    const curve = this.scene.curves.get(edge.key), width = Math.max(widthOf(edge), this.thinnest) + extra;
    if (!curve || this.outside(curve)) return;
    const appear = this.progress < 1 ? this.progress ** 2 : 1;
    if (rim) {
      ctx.globalAlpha = appear;
      ctx.strokeStyle = COLOURS.paper;
      ctx.lineWidth = width + 3;
      ctx.stroke(curve.path);
    }
    ctx.globalAlpha = alpha * appear;
    ctx.strokeStyle = ctx.fillStyle = edgeColour(edge);
    ctx.lineWidth = width;
    if (edge.score < 0 && this.edges.length <= HEAVY) ctx.setLineDash([3 + 1.6 * width, 2 + width]);
    ctx.stroke(curve.path);
    ctx.setLineDash([]);
    if (this.edges.length <= HEAVY) this.drawHead(ctx, edge, curve.tip, width);
    ctx.globalAlpha = 1;
  }

  drawHead(ctx, edge, tip, width) {
    const half = 3 + 0.75 * width;
    if (edge.score < 0) {
      ctx.fillRect(tip.x - half - 1, tip.y + 4, 2 * half + 2, 3.2);
    } else {
      ctx.beginPath();
      ctx.moveTo(tip.x, tip.y + 0.5);
      ctx.lineTo(tip.x - half, tip.y + 7.5);
      ctx.lineTo(tip.x + half, tip.y + 7.5);
      ctx.fill();
    }
  }

  outside({ samples }) {
    const a = samples[0], b = samples[samples.length - 1];
    return b.y > this.view.bottom || a.y < this.view.top;
  }

  drawNode(ctx, node, look, zoom) {
    const box = this.place(node.id), used = this.used.has(node.id), x = box.x - box.width / 2, y = box.y - NODE_HEIGHT / 2;
    if (x > this.view.right || x + box.width < this.view.left || y > this.view.bottom || y + NODE_HEIGHT < this.view.top) return;
    const dim = look.nodes !== null && !look.nodes.has(node.id);
    const radius = { head: 15, mlp: 5 }[node.look] || 9;
    ctx.globalAlpha = dim ? 0.28 : 1;
    ctx.beginPath();
    ctx.roundRect(x, y, box.width, NODE_HEIGHT, radius);
    ctx.fillStyle = COLOURS.paper;
    ctx.globalAlpha = 1;
    ctx.fill();
    ctx.globalAlpha = dim ? 0.28 : 1;
    if (used) { ctx.fillStyle = COLOURS[`${node.look}-face`]; ctx.fill(); }
    const marked = look.selected === node.id || look.hovered === node.id;
    ctx.strokeStyle = marked ? COLOURS.accent : used ? COLOURS[`${node.look}-rim`] : COLOURS.rule;
    ctx.lineWidth = marked ? 2.6 : 1.2;
    ctx.stroke();
    if (look.matches.has(node.id) || look.focused === node.id) this.drawRing(ctx, x, y, box.width, radius, look.focused === node.id);
    if (added.pins.includes(node.name)) this.drawPin(ctx, x + box.width, y);
    if (13 * zoom >= READABLE) this.drawLabel(ctx, node, box, used);
    ctx.globalAlpha = 1;
  }

  drawPin(ctx, x, y) {
    ctx.beginPath();
    ctx.arc(x - 3, y + 3, 5, 0, 2 * Math.PI);
    ctx.fillStyle = COLOURS.focus;
    ctx.fill();
  }

  // Where boxes are too small for their names, as many names as have room at a readable size, what matters most first.
  drawLabelsApart(ctx, look, zoom) {
    const size = READABLE / zoom, taken = [], rank = new Map();
    this.edges.forEach((edge, n) => { for (const id of [edge.source, edge.target]) if (!rank.has(id)) rank.set(id, n); });
    const first = id => id === look.selected || id === look.hovered || look.matches.has(id) ? -2 : NODES[id].end || added.pins.includes(NODES[id].name) ? -1 : rank.get(id) ?? Infinity;
    const shown = [...this.scene.boxes.keys()].filter(id => first(id) < Infinity && (!look.nodes || look.nodes.has(id) || first(id) < 0));
    ctx.font = `600 ${size}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    for (const id of shown.sort((a, b) => first(a) - first(b)).slice(0, 400)) {
      const box = this.place(id), text = shortLabel(NODES[id].text), half = ctx.measureText(text).width / 2 + 0.2 * size;
      const frame = [box.x - half, box.x + half, box.y - 0.62 * size, box.y + 0.62 * size];
      if (taken.some(other => frame[0] < other[1] && other[0] < frame[1] && frame[2] < other[3] && other[2] < frame[3])) continue;
      taken.push(frame);
      const inside = 2 * half <= box.width && 1.2 * size <= NODE_HEIGHT;
      ctx.globalAlpha = 0.85;
      ctx.fillStyle = COLOURS.paper;
      if (!inside) ctx.fillRect(frame[0], frame[2], 2 * half, 1.24 * size);
      ctx.globalAlpha = 1;
      ctx.fillStyle = inside && NODES[id].look === "end" && this.used.has(id) ? COLOURS["end-ink"] : COLOURS.ink;
      ctx.fillText(text, box.x, box.y);
    }
    this.named = taken.length;
  }

  drawRing(ctx, x, y, width, radius, dashed) {
    ctx.strokeStyle = COLOURS.focus;
    ctx.lineWidth = 2.2;
    if (dashed) ctx.setLineDash([5, 3]);
    ctx.beginPath();
    ctx.roundRect(x - 4.5, y - 4.5, width + 9, NODE_HEIGHT + 9, radius + 4);
    ctx.stroke();
    ctx.setLineDash([]);
  }

  drawLabel(ctx, node, box, used) {
    const two = node.lines.length > 1;
    ctx.font = `${node.look === "end" ? 650 : 500} ${two ? 10.6 : 13}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    ctx.fillStyle = !used ? COLOURS.faint : node.look === "end" ? COLOURS["end-ink"] : COLOURS.ink;
    node.lines.forEach((line, n) => ctx.fillText(line, box.x, box.y + 0.8 + (two ? 12.4 * (n - 0.5) : 0)));
  }

  // The node or else the edge under a point of the page.
  find(transform, clientX, clientY) {
    const frame = this.canvas.getBoundingClientRect();
    const [x, y] = transform.invert([clientX - frame.left, clientY - frame.top]);
    for (const [id, box] of this.scene.boxes) {
      if (Math.abs(x - box.x) <= box.width / 2 + 2 && Math.abs(y - box.y) <= NODE_HEIGHT / 2 + 2) return { node: id };
    }
    let best = null, nearest = 7 / transform.k;
    for (const edge of this.edges) {
      const { samples } = this.scene.curves.get(edge.key);
      if (y > samples[0].y + nearest || y < samples[samples.length - 1].y - nearest) continue;
      const distance = distanceTo(samples, x, y) - edge.share * 2;
      if (distance < nearest) { nearest = distance; best = edge; }
    }
    return best && { edge: best };
  }
}
