"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;

function inBytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return unit === "B" ? `${value.toFixed(0)} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}
function inMs(value) {
  if (!known(value)) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  return value >= 1 ? `${value.toFixed(1)} ms` : `${(value * 1000).toFixed(0)} µs`;
}
const inUnits = (value, digits = 2) => (known(value) ? value.toFixed(digits) : "–");

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

/* A canvas as large as it is shown, in sharp pixels. */
function surface(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || canvas.parentElement.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  return { pen, width, height };
}

function roundStep(span, wanted) {
  const rough = span / Math.max(wanted, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
}

const tip = byId("tip");
function showTip(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 6);
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 6)}px`;
}

/* Timeline: canvas, with a window [from, to] in milliseconds. */
const timeline = {
  canvas: byId("timeline"), intervals: null, from: 0, to: 1, all: [0, 1], left: 64, bottom: 24,
  show(index) {
    this.update = data.updates[index];
    this.intervals = data.intervals[index];
    this.all = this.intervals ? [0, this.intervals.length_ms] : [0, 1];
    [this.from, this.to] = this.all;
    this.draw();
  },
  lane() {
    const ranks = this.update.num_ranks;
    return ranks <= 16 ? 42 : ranks <= 64 ? 12 : Math.max(2, Math.min(6, 900 / ranks));
  },
  draw() {
    const ranks = this.update.num_ranks, lane = this.lane();
    const { pen, width, height } = surface(this.canvas, ranks * lane + this.bottom + 6);
    this.width = width;
    if (!this.intervals) {
      pen.fillStyle = "#5d6875";
      pen.fillText("Its intervals are not in this page; draw it with --update.", 8, 20);
      return;
    }
    const scale = (width - this.left - 8) / (this.to - this.from);
    const x = (ms) => this.left + (ms - this.from) * scale;
    const step = roundStep(this.to - this.from, width / 110), foot = ranks * lane;
    pen.textAlign = "center";
    for (let at = Math.ceil(this.from / step) * step; at <= this.to; at += step) {
      pen.fillStyle = "#e6e9ed";
      pen.fillRect(x(at), 0, 1, foot);
      pen.fillStyle = "#5d6875";
      pen.fillText(`${+at.toPrecision(6)} ms`, Math.min(x(at), width - 26), foot + 17);
    }
    const inner = lane * 0.86 / data.stages.length;
    pen.save();
    pen.beginPath();
    pen.rect(this.left, 0, width - this.left - 8, foot);
    pen.clip();
    const apart = ranks <= data.max_lanes;
    [...(apart ? data.stages : data.from_below), data.fence].forEach((stage, index) => {
      const full = !apart || stage === data.fence;
      const { rank, start, end } = this.intervals[stage.name];
      pen.fillStyle = stage.colour;
      for (let at = 0; at < rank.length; at++) {
        if (end[at] < this.from || start[at] > this.to) continue;
        const long = (end[at] - start[at]) * scale;
        const from = long < 1 ? Math.floor(x(start[at])) : x(start[at]), size = Math.max(long - (long > 3 ? 0.6 : 0), 1);
        pen.fillRect(from, rank[at] * lane + (full ? 0 : index * inner), size, full ? Math.max(lane * 0.86, 0.8) : inner * 0.94);
      }
    });
    if (lane >= 30) {
      const { rank, layer, start, end } = this.intervals.transfer;
      const middle = (data.stages.findIndex((stage) => stage.name === "transfer") + 0.5) * inner;
      pen.fillStyle = "#fff";
      pen.font = "8px system-ui, 'DejaVu Sans', sans-serif";
      for (let at = 0; at < rank.length; at++) {
        if ((end[at] - start[at]) * scale > 20) pen.fillText(layer[at], x((start[at] + end[at]) / 2), rank[at] * lane + middle + 2.5);
      }
      pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    }
    pen.restore();
    pen.textAlign = "right";
    const perNode = ranks / this.update.num_nodes, every = Math.ceil(14 / lane);
    for (let rank = 0; rank < ranks; rank++) {
      pen.fillStyle = "#1c2530";
      if (rank % every === 0) pen.fillText(`rank ${rank}`, this.left - 8, rank * lane + Math.max(lane * 0.5, 6) + 3);
      if (rank && rank % perNode === 0) {
        pen.fillStyle = this.update.num_nodes > 16 ? "#d3d8de" : "#77818c";
        pen.fillRect(0, rank * lane - 1.5, width, 1);
      }
    }
    this.canvas.dataset.window = `${this.from.toFixed(3)},${this.to.toFixed(3)}`;
  },
  zoom(factor, centre = (this.from + this.to) / 2) {
    const span = Math.min(Math.max((this.to - this.from) * factor, 0.01), this.all[1] - this.all[0]);
    const share = (centre - this.from) / (this.to - this.from);
    this.move(centre - share * span, span);
  },
  move(from, span = this.to - this.from) {
    this.from = Math.min(Math.max(from, this.all[0]), this.all[1] - span);
    this.to = this.from + span;
    this.draw();
  },
  timeAt(clientX) {
    const box = this.canvas.getBoundingClientRect();
    return this.from + (clientX - box.left - this.left) / (this.width - this.left - 8) * (this.to - this.from);
  },
  intervalAt(event) {
    if (!this.intervals) return "";
    const box = this.canvas.getBoundingClientRect(), lane = this.lane();
    const at = this.timeAt(event.clientX), rank = Math.floor((event.clientY - box.top) / lane);
    const line = Math.floor(((event.clientY - box.top) - rank * lane) / (lane * 0.86 / data.stages.length));
    const apart = this.update.num_ranks <= data.max_lanes;
    for (const stage of apart ? [data.stages[Math.min(line, data.stages.length - 1)]] : [...data.from_below].reverse()) {
      const mine = this.intervals[stage.name];
      for (let index = 0; index < mine.rank.length; index++) {
        if (mine.rank[index] === rank && mine.start[index] <= at && at <= mine.end[index]) {
          return `rank ${rank}, layer ${mine.layer[index]}: ${stage.label}\n${inMs(mine.end[index] - mine.start[index])} from ${inMs(mine.start[index])}`;
        }
      }
    }
    return "";
  },
  listen() {
    const canvas = this.canvas, touches = new Map();
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.timeAt(event.clientX));
    }, { passive: false });
    canvas.addEventListener("dblclick", () => { [this.from, this.to] = this.all; this.draw(); });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      touches.set(event.pointerId, event.clientX);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => touches.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => showTip(null, ""));
    canvas.addEventListener("pointermove", (event) => {
      if (!touches.has(event.pointerId)) return showTip(event, this.intervalAt(event));
      showTip(event, "");
      const before = touches.get(event.pointerId), others = [...touches].filter(([id]) => id !== event.pointerId);
      if (others.length) {
        const other = others[0][1], apart = Math.abs(event.clientX - other);
        if (apart > 8) this.zoom(Math.abs(before - other) / apart, this.timeAt((event.clientX + other) / 2));
      } else {
        this.move(this.from + this.timeAt(before) - this.timeAt(event.clientX));
      }
      touches.set(event.pointerId, event.clientX);
    });
    byId("zoom-in").addEventListener("click", () => this.zoom(0.5));
    byId("zoom-out").addEventListener("click", () => this.zoom(2));
    byId("zoom-all").addEventListener("click", () => { [this.from, this.to] = this.all; this.draw(); });
  },
};

/* Matrix of all updates of the run. */
const matrix = {
  canvas: byId("matrix"), left: 40, top: 6, bottom: 34,
  draw() {
    const { ranks, nodes, cells } = data.traffic[timeline.update.run];
    const wide = Math.min(this.canvas.parentElement.clientWidth - 32, 520);
    const size = (Math.max(wide, 200) - this.left - 8) / ranks, peak = Math.max(1, ...cells.map((cell) => cell[2]));
    const { pen } = surface(this.canvas, this.top + size * ranks + this.bottom);
    this.size = size;
    this.cells = new Map(cells.map(([src, dst, nbytes]) => [src * ranks + dst, nbytes]));
    this.ranks = ranks;
    pen.fillStyle = "#f1f3f6";
    pen.fillRect(this.left, this.top, size * ranks, size * ranks);
    const gap = size > 6 ? 1 : 0;
    for (const [src, dst, nbytes] of cells) {
      const share = nbytes / peak;
      pen.fillStyle = `hsl(${200 + 15 * share} ${45 + 30 * share}% ${90 - 62 * share}%)`;
      pen.fillRect(this.left + dst * size, this.top + src * size, Math.max(size - gap, 0.7), Math.max(size - gap, 0.7));
    }
    pen.fillStyle = nodes > 16 ? "#33333340" : "#333";
    for (let border = 1; border < nodes; border++) {
      const at = border * ranks / nodes * size - 0.5;
      pen.fillRect(this.left + at, this.top, 1, size * ranks);
      pen.fillRect(this.left, this.top + at, size * ranks, 1);
    }
    const every = Math.ceil(30 / size);
    pen.fillStyle = "#5d6875";
    for (let rank = 0; rank < ranks; rank += every) {
      pen.textAlign = "right";
      pen.fillText(rank, this.left - 6, this.top + rank * size + size / 2 + 4);
      pen.textAlign = "center";
      pen.fillText(rank, this.left + rank * size + size / 2, this.top + ranks * size + 15);
    }
    pen.fillText("to rank", this.left + ranks * size / 2, this.top + ranks * size + 29);
    pen.save();
    pen.translate(10, this.top + ranks * size / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("from rank", 0, 0);
    pen.restore();
    byId("matrix-note").textContent = `All updates of the run; darkest: ${inBytes(peak)}. Lines part nodes.`;
  },
  listen() {
    this.canvas.addEventListener("pointerleave", () => showTip(null, ""));
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const dst = Math.floor((event.clientX - box.left - this.left) / this.size);
      const src = Math.floor((event.clientY - box.top - this.top) / this.size);
      const inside = src >= 0 && dst >= 0 && src < this.ranks && dst < this.ranks;
      showTip(event, inside ? `rank ${src} → rank ${dst}: ${inBytes(this.cells.get(src * this.ranks + dst) || 0)}` : "");
    });
  },
};

/* Balancedness: each decision is a dot before, and one after it was moved to. */
function drawBalance() {
  const canvas = byId("balance"), run = data.updates.length ? timeline.update.run_id : null;
  const points = data.rebalances.filter((each) => each.run_id === run);
  const { pen, width, height } = surface(canvas, points.length ? 240 : 1);
  byId("balance-note").textContent = points.length
    ? "Mean over the maximum of ranks' loads, mean of layers; 1 is best. Steps are placements that were moved to."
    : "No rebalance is in this log: placements came from elsewhere.";
  if (!points.length) return;
  const left = 40, right = width - 12, top = 10, foot = height - 26;
  const first = points[0].time_s, last = Math.max(points[points.length - 1].time_s, first + 0.001);
  const x = (time) => left + (time - first) / (last - first) * (right - left - 30) + 15;
  const y = (value) => foot - value * (foot - top);
  pen.textAlign = "right";
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    pen.fillStyle = "#e6e9ed";
    pen.fillRect(left, y(value), right - left, 1);
    pen.fillStyle = "#5d6875";
    pen.fillText(value, left - 6, y(value) + 4);
  }
  pen.textAlign = "center";
  const step = roundStep(last - first, width / 130);
  for (let at = 0; at <= last - first; at += step) pen.fillText(`${+at.toPrecision(4)} s`, x(first + at), foot + 17);
  pen.strokeStyle = "#2a7ab9";
  pen.lineWidth = 2;
  pen.beginPath();
  points.forEach((point, index) => {
    pen[index ? "lineTo" : "moveTo"](x(point.time_s), y(point.balancedness_before));
    if (point.pays) pen.lineTo(x(point.time_s), y(point.balancedness_after));
  });
  pen.stroke();
  for (const point of points) {
    for (const [value, colour] of [[point.balancedness_before, "#8a95a1"], [point.pays ? point.balancedness_after : null, "#2e8b57"]]) {
      if (value === null) continue;
      pen.fillStyle = colour;
      pen.beginPath();
      pen.arc(x(point.time_s), y(value), 3.5, 0, 7);
      pen.fill();
    }
  }
}

function drawCards() {
  const update = timeline.update, cards = byId("cards");
  cards.textContent = "";
  const received = update.received_nbytes_within_node + update.received_nbytes_across_nodes;
  const good = update.outcome === "finished";
  const rows = [
    ["outcome", update.outcome, update.error || update.mode, good ? "good" : "bad"],
    ["duration", inMs(update.duration_ms), `overlap ${inUnits(update.overlap)}`],
    ["layers", `${update.num_layers} moved`, `${update.num_unchanged_layers} skipped`],
    ["received", inBytes(received), `${inBytes(update.received_nbytes_across_nodes)} across nodes`],
    ...data.stages.map((stage) => [
      stage.label, inMs(update[stage.total]), stage.name === "commit" ? inBytes(update.committed_nbytes) : "slowest rank, all layers",
    ]),
    ["stall of a step", `${inMs(update.stall_p99_ms)}`, update.num_stalls ? `p99; p50 ${inMs(update.stall_p50_ms)}, max ${inMs(update.stall_max_ms)}` : "the model stood still"],
    ["passes beside it", update.num_passes_beside ? inMs(update.pass_beside_p99_ms) : "–", update.num_passes_beside ? `p99; others ${inMs(update.pass_p99_ms)}` : "none in the log"],
    ["waits at fences", update.num_fence_waits, `${inMs(update.fence_wait_ms)} together`, update.num_fence_waits ? "bad" : ""],
    ["balancedness", known(update.balancedness_before) ? `${inUnits(update.balancedness_before)} → ${inUnits(update.balancedness_after)}` : "–", known(update.balancedness_before) ? "mean of layers" : "no rebalance in the log"],
    ["paid back", known(update.break_even_steps) ? `${update.break_even_steps.toFixed(0)} steps` : "–", known(update.saved_ms_per_step) ? `${inMs(update.saved_ms_per_step)} saved a step` : "no estimate in the log"],
  ];
  for (const [label, value, note, kind] of rows) {
    const card = element("div", undefined, cards);
    if (kind) card.className = kind;
    element("dt", label, card);
    const held = element("dd", value, card);
    element("small", note, held);
  }
}

/* Tables whose columns sort: [title, key, format]. */
function sortable(table, columns, rows, start, down = true) {
  const head = table.tHead, body = table.tBodies[0];
  let sorted = start;
  const render = () => {
    const ordered = [...rows()].sort((a, b) => (down ? -1 : 1) * (a[sorted] < b[sorted] ? -1 : a[sorted] > b[sorted] ? 1 : 0));
    body.textContent = "";
    for (const row of ordered.slice(0, 2000)) {
      const line = element("tr", undefined, body);
      for (const [, key, format] of columns) element("td", format ? format(row[key]) : row[key], line);
    }
    [...head.rows[0].cells].forEach((cell, index) => {
      cell.setAttribute("aria-sort", columns[index][1] !== sorted ? "none" : down ? "descending" : "ascending");
    });
  };
  const line = element("tr", undefined, head);
  for (const [title, key] of columns) {
    element("button", title, element("th", undefined, line)).addEventListener("click", () => {
      down = key === sorted ? !down : true;
      sorted = key;
      render();
    });
  }
  render();
  return render;
}

function fill() {
  const notes = [...data.faults, ...data.left_out];
  if (notes.length) {
    byId("notes").hidden = false;
    element("h2", "Faults, and what was left out", byId("notes"));
    const list = element("ul", undefined, byId("notes"));
    for (const note of notes.slice(0, 30)) element("li", note, list);
  }
  byId("subtitle").textContent = `${data.updates.length} update${data.updates.length === 1 ? "" : "s"}${data.clock_error_ms ? `; times of ranks of different hosts are right to ${inMs(data.clock_error_ms)}` : ""}`;
  const select = byId("update");
  data.updates.forEach((update, index) => {
    const option = element("option", `${update.generation} of ${update.run_id.slice(0, 8)}: ${update.outcome}, ${inMs(update.duration_ms)}`, select);
    option.value = index;
  });
  for (const stage of [...data.stages, data.fence]) {
    const item = element("span", undefined, byId("legend"));
    element("i", undefined, item).style.background = stage.colour;
    item.append(stage.label);
  }
  timeline.listen();
  matrix.listen();
  const filter = byId("filter");
  const renderLayers = sortable(byId("layers"), [
    ["layer", "layer"], ["slowest rank", "rank"], ["total", "total_ms", inMs],
    ...data.stages.map((stage) => [stage.label, stage.total, inMs]), ["bytes", "nbytes", inBytes],
  ], () => {
    const wanted = filter.value.trim(), update = timeline.update || {};
    const rows = data.layers.filter((row) => row.run_id === update.run_id && row.generation === update.generation);
    byId("layers-note").textContent = `${rows.length} layers; times of the rank that took longest.`;
    return wanted ? rows.filter((row) => String(row.layer) === wanted || String(row.rank) === wanted) : rows;
  }, "total_ms");
  filter.addEventListener("input", renderLayers);
  sortable(byId("links"), [
    ["from", "src_rank"], ["to", "dst_rank"], ["link", "within_node", (same) => (same ? "same node" : "across nodes")],
    ["bytes", "nbytes", inBytes], ["speed", "nbytes_per_s", (value) => `${inBytes(value)}/s`],
  ], () => data.links, "nbytes_per_s", false);
  sortable(byId("ranks"), [
    ["rank", "rank"], ["after the median", "lag_ms", (value) => (value < 0 ? "−" : "") + inMs(Math.abs(value))], ["last in", "num_last"], ["layers", "num_layers"],
  ], () => data.ranks, "lag_ms");
  const show = (index) => {
    timeline.show(index);
    drawCards();
    matrix.draw();
    drawBalance();
    renderLayers();
  };
  if (data.updates.length) {
    select.value = data.updates.length - 1;
    show(data.updates.length - 1);
  }
  select.addEventListener("change", () => show(Number(select.value)));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width || !data.updates.length) return;
    width = window.innerWidth;
    timeline.draw();
    matrix.draw();
    drawBalance();
  });
}
fill();
