"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NODE = { width: 172, height: 38 }, BOX = { width: 430, height: 50, gap: 20, top: 54, edge: 30 };
  const make = (name, attributes = {}, parent = null, text = null) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const bytes = (count) => {
    for (const [scale, unit] of [[1e9, "GB"], [1e6, "MB"], [1e4, "kB"]])
      if (count >= scale) return `${(count / (unit === "kB" ? 1e3 : scale)).toFixed(1)} ${unit}`;
    return `${count.toLocaleString("en")} B`;
  };
  const sum = (items, of) => items.reduce((total, item) => total + (of(item) || 0), 0);
  const many = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
  const paper = document.createElement("canvas").getContext("2d");
  const family = getComputedStyle(document.body).fontFamily;
  const measure = (text, font) => { paper.font = `${font} ${family}`; return paper.measureText(text).width; };
  // Keep the end of a text, which says most: names begin with the module.
  const shorten = (text, font, room) => {
    if (measure(text, font) <= room) return text;
    let cut = 1;
    while (cut < text.length && measure(`…${text.slice(cut)}`, font) > room) cut += 1;
    return `…${text.slice(cut)}`;
  };

  // ------------------------------------------------------------------------------ graphs
  const open = new Set();

  // One of the two graphs: the positions of its nodes, and the part in view.
  class View {
    constructor(graph) {
      this.graph = graph;
      this.where = new Map();
      graph.groups.forEach((group) => {
        group.real = group.nodes.filter((node) => node.kind !== "port");
        group.rounds = sum(group.real, (node) => (node.critical ? node.rounds : 0));
        group.online = sum(group.real, (node) => node.online);
        group.real.forEach((node) => this.where.set(node.name, { node, group }));
      });
      this.peak = Math.max(1, ...graph.groups.flatMap((g) => g.real.map((n) => n.online || 0)));
      const pane = document.createElement("section");
      pane.className = "pane";
      pane.dataset.graph = graph.name;
      this.svg = make("svg", {}, pane);
      this.world = make("g", {}, this.svg);
      const caption = document.createElement("div");
      caption.className = "caption";
      const shown = sum(graph.groups, (group) => group.real.length);
      caption.innerHTML = `<b></b><span></span>`;
      caption.firstChild.textContent = graph.title;
      caption.lastChild.textContent = `${many(shown, "node")}; ${many(graph.hidden, "other")} not drawn: public values and checks`;
      pane.prepend(caption);
      document.getElementById("panes").append(pane);
      this.view = { x: 0, y: 0, scale: 1 };
      this.listen();
    }

    draw() {
      this.world.replaceChildren();
      this.places = new Map();
      const links = make("g", {}, this.world);
      let y = 0;
      this.boxes = this.graph.groups.map((group) => {
        const box = this.box(group, y);
        y += box.height + BOX.gap;
        return box;
      });
      this.size = { width: Math.max(...this.boxes.map((b) => b.width)), height: y - BOX.gap };
      this.graph.links.forEach(([from, to]) => {
        const a = this.boxes[from], b = this.boxes[to];
        const [start, end] = [a.y + a.height, b.y];
        if (to === from + 1) {
          make("path", { class: "link", d: `M0 ${start}V${end}` }, links);
        } else {
          const out = Math.max(...this.boxes.slice(Math.min(from, to), Math.max(from, to) + 1).map((box) => box.width)) / 2 + 26;
          const [i, j] = [a.y + a.height / 2, b.y + b.height / 2];
          make("path", { class: "link far", d: `M${a.width / 2} ${i}C${out} ${i} ${out} ${j} ${b.width / 2} ${j}` }, links);
        }
      });
    }

    box(group, y) {
      const expanded = open.has(group.key), layout = data.layouts[group.layout];
      const width = expanded ? Math.max(BOX.width, layout.width + NODE.width + 2 * BOX.edge) : BOX.width;
      const height = expanded ? BOX.top + layout.height + NODE.height + BOX.edge : BOX.height;
      const box = make("g", { class: expanded ? "box open" : "box", transform: `translate(${-width / 2} ${y})`, "data-layer": group.key }, this.world);
      make("rect", { class: "frame", width, height, rx: 10 }, box);
      make("text", { class: "twist", x: 14, y: 24 }, box, expanded ? "▾" : "▸");
      make("text", { class: "title", x: 30, y: 24 }, box, shorten(group.key, "600 14px", 190));
      const told = [many(group.real.length, "node")];
      if (group.rounds) told.push(many(group.rounds, "round"));
      if (group.online) told.push(bytes(group.online));
      if (group.real.every((node) => node.idle)) told.push("not in this step");
      make("text", { class: "told", x: width - 14, y: 24 }, box, told.join("  ·  "));
      const hit = make("rect", { class: "hit", width, height: expanded ? 38 : height, rx: 10 }, box);
      hit.addEventListener("click", () => { if (!this.dragged) toggle(group.key, this); });
      if (expanded) this.inside(group, layout, box, width, y);
      else this.strip(group, box, width);
      return { y, width, height };
    }

    // The composition of a closed layer: bytes by kind of node where they are known, else counts.
    strip(group, box, width) {
      const weigh = group.online ? (node) => node.online || 0 : () => 1;
      const total = sum(group.real, weigh), inner = width - 28;
      let x = 14;
      data.kinds.forEach((kind) => {
        const part = sum(group.real.filter((node) => node.kind === kind), weigh) / (total || 1);
        if (!part) return;
        make("rect", { x, y: 36, width: Math.max(part * inner - 1.5, 1), height: 5, rx: 2, style: `fill:var(--${kind});pointer-events:none` }, box);
        x += part * inner;
      });
    }

    inside(group, layout, box, width, y) {
      const shift = { x: (width - layout.width) / 2, y: BOX.top + NODE.height / 2 };
      const edges = make("g", { transform: `translate(${shift.x} ${shift.y})` }, box);
      layout.paths.forEach((path) => {
        const last = path.length - 2;
        let d = `M${path[0]} ${path[1] + NODE.height / 2}`;
        for (let i = 2; i <= last; i += 2) {
          const from = path[i - 1] + (i === 2 ? NODE.height / 2 : 0);
          const to = path[i + 1] - (i === last ? NODE.height / 2 : 0);
          const half = (from + to) / 2;
          d += `C${path[i - 2]} ${half} ${path[i]} ${half} ${path[i]} ${to}`;
        }
        make("path", { class: "edge", d }, edges);
      });
      group.nodes.forEach((node, index) => {
        const at = { x: layout.places[2 * index], y: layout.places[2 * index + 1] };
        const element = this.node(node, group, edges, at);
        if (node.kind !== "port" || !this.where.has(node.name)) {
          this.places.set(node.name, { element, x: at.x + shift.x - width / 2, y: y + at.y + shift.y });
        }
      });
    }

    node(node, group, parent, at) {
      const classes = ["node", node.kind === "port" ? "port" : "", node.critical ? "on-path" : "", node.idle ? "idle" : ""];
      const element = make("g", { class: classes.filter(Boolean).join(" "), transform: `translate(${at.x - NODE.width / 2} ${at.y - NODE.height / 2})`, "data-node": node.name }, parent);
      make("rect", { width: NODE.width, height: NODE.height, rx: 7 }, element);
      if (node.kind === "port") {
        make("text", { class: "op", x: 10, y: 16 }, element, node.op);
        make("text", { class: "at", x: 10, y: 30 }, element, shorten(node.name, "10.5px", NODE.width - 20));
      } else {
        make("rect", { x: 0, y: 6, width: 4, height: NODE.height - 12, rx: 2, style: `fill:var(--${node.kind})` }, element);
        make("text", { class: "op", x: 13, y: 16 }, element, shorten(node.op, "600 12.5px", NODE.width - 50));
        const module = node.module || "";
        const local = module.startsWith(`${group.module}.`) ? module.slice(group.module.length + 1) : module === group.module ? "" : module;
        const shape = node.shape || "", font = "10.5px";
        make("text", { class: "at", x: 13, y: 30 }, element, shorten(local, font, NODE.width - 29 - measure(shape, font)));
        make("text", { class: "count", x: NODE.width - 8, y: 30 }, element, shape);
        if (node.rounds) make("text", { class: "count", x: NODE.width - 8, y: 16 }, element, `${node.rounds} r`);
        if (node.online) make("rect", { x: 8, y: NODE.height - 3, width: Math.max(2, (NODE.width - 16) * node.online / this.peak), height: 3, rx: 1.5, style: `fill:var(--${node.kind})` }, element);
      }
      element.addEventListener("click", () => { if (!this.dragged) this.tell(node.name); });
      return element;
    }

    tell(name) {
      const found = this.where.get(name);
      document.querySelectorAll(".node.hit").forEach((e) => e.classList.remove("hit"));
      this.places.get(name)?.element.classList.add("hit");
      const inputs = this.graph.groups.flatMap((g) => g.nodes).find((node) => node.name === name && node.text);
      const node = found ? found.node : inputs;
      if (!node) return;
      const users = [];
      for (const { node: other } of this.where.values())
        if (other !== node && names(other.text).includes(name)) users.push(other.name);
      detail.replaceChildren();
      const put = (tag, text, parent = detail, css = "") => {
        const element = document.createElement(tag);
        element.textContent = text;
        if (css) element.className = css;
        parent.append(element);
        return element;
      };
      put("button", "✕", detail, "close").addEventListener("click", () => { detail.hidden = true; });
      put("h3", name);
      put("pre", node.text);
      const list = put("dl", "");
      const row = (key, value) => { if (value) { put("dt", key, list); put("dd", value, list); } };
      row("module", node.module);
      row("source", node.source);
      row("visibility", node.vis);
      row("rounds", node.rounds && `${node.rounds}${node.critical ? ", on the critical path" : ", in parallel with others"}`);
      row("runs", node.idle && "only in other steps");
      row("online", node.online && bytes(node.online));
      row("offline", node.offline && bytes(node.offline));
      const linked = (key, all) => {
        const known = all.filter((other) => this.where.has(other));
        if (!known.length) return;
        put("dt", key, list);
        const cell = put("dd", "", list);
        known.forEach((other) => {
          put("a", other, cell).addEventListener("click", () => this.show(other));
          cell.append(" ");
        });
      };
      linked("operands", names(node.text).slice(1));
      linked("used by", users);
      detail.hidden = false;
    }

    show(name) {
      const found = this.where.get(name);
      if (!found) return;
      if (!open.has(found.group.key)) { open.add(found.group.key); redraw(); }
      const place = this.places.get(name);
      const { width, height } = this.svg.getBoundingClientRect();
      this.view.scale = Math.max(this.view.scale, 0.8);
      this.view.x = width / 2 - place.x * this.view.scale;
      this.view.y = height / 2 - place.y * this.view.scale;
      this.place();
      this.tell(name);
    }

    place() {
      const { x, y, scale } = this.view;
      this.world.setAttribute("transform", `translate(${x} ${y}) scale(${scale})`);
    }

    fit() {
      const { width, height } = this.svg.getBoundingClientRect();
      const across = (width - 30) / this.size.width;
      const scale = Math.min(1, across, Math.max((height - 28) / this.size.height, 0.8));
      this.view = { scale, x: width / 2, y: 14 };
      this.place();
    }

    zoom(factor, x, y) {
      const scale = Math.min(3, Math.max(0.05, this.view.scale * factor));
      const ratio = scale / this.view.scale;
      this.view = { scale, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio };
      this.place();
    }

    listen() {
      let last = null;
      this.svg.addEventListener("wheel", (event) => {
        event.preventDefault();
        const { left, top } = this.svg.getBoundingClientRect();
        if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(-event.deltaY * 0.01), event.clientX - left, event.clientY - top);
        else { this.view.x -= event.deltaX; this.view.y -= event.deltaY; this.place(); }
      }, { passive: false });
      this.svg.addEventListener("pointerdown", (event) => { last = event; this.dragged = false; });
      window.addEventListener("pointermove", (event) => {
        if (!last) return;
        const [dx, dy] = [event.clientX - last.clientX, event.clientY - last.clientY];
        if (!this.dragged && Math.hypot(dx, dy) < 4) return;
        this.dragged = true;
        this.svg.classList.add("moving");
        this.view.x += dx;
        this.view.y += dy;
        last = event;
        this.place();
      });
      window.addEventListener("pointerup", () => { last = null; this.svg.classList.remove("moving"); });
    }
  }

  const detail = document.getElementById("detail");
  const names = (text) => (text ? [...text.split("  #")[0].matchAll(/%([\w.]+)/g)].map((m) => m[1]) : []);

  function redraw() { views.forEach((view) => { view.draw(); view.place(); }); }

  // The layer's head stays where it was clicked; the other graph moves it to the same height.
  function toggle(key, view) {
    const box = (v) => v.boxes[v.graph.groups.findIndex((group) => group.key === key)];
    const height = box(view).y * view.view.scale + view.view.y;
    if (!open.delete(key)) open.add(key);
    redraw();
    views.filter(box).forEach((v) => {
      const room = v.svg.getBoundingClientRect().width - 24;
      v.view.scale = Math.min(v.view.scale, Math.max(room / box(v).width, 0.4));
      v.view.x = (room + 24) / 2;
      v.view.y = height - box(v).y * v.view.scale;
      v.place();
    });
  }

  // ------------------------------------------------------------------------------ controls
  const views = data.graphs.map((graph) => new View(graph));
  const all = (value) => {
    open.clear();
    if (value) views.forEach((view) => view.graph.groups.forEach((group) => open.add(group.key)));
    redraw();
    views.forEach((view) => view.fit());
  };
  document.getElementById("expand").addEventListener("click", () => all(true));
  document.getElementById("collapse").addEventListener("click", () => all(false));
  const zoom = (factor) => views.forEach((view) => {
    const { width, height } = view.svg.getBoundingClientRect();
    view.zoom(factor, width / 2, height / 3);
  });
  document.getElementById("in").addEventListener("click", () => zoom(1.25));
  document.getElementById("out").addEventListener("click", () => zoom(0.8));
  document.getElementById("fit").addEventListener("click", () => views.forEach((view) => view.fit()));
  document.getElementById("path").addEventListener("change", (event) => {
    views.filter((v) => v.graph.name === "after").forEach((v) => v.svg.classList.toggle("critical", event.target.checked));
  });
  const legend = document.getElementById("legend");
  data.kinds.forEach((kind) => {
    const item = document.createElement("span");
    item.innerHTML = `<i style="background:var(--${kind})"></i>`;
    item.append(kind);
    legend.append(item);
  });

  const find = document.getElementById("find"), found = document.getElementById("found");
  let hits = [], current = -1;
  find.addEventListener("input", () => {
    const wanted = find.value.trim().toLowerCase();
    const view = views[views.length - 1];
    hits = wanted ? views.flatMap((v) => [...v.where.values()].filter(({ node }) =>
      node.name.toLowerCase().includes(wanted) || node.op === wanted).map(({ node }) => [v, node.name])) : [];
    hits.sort(([a], [b]) => (a === view ? 0 : 1) - (b === view ? 0 : 1));
    current = -1;
    found.textContent = wanted ? `${hits.length} found` : "";
  });
  find.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !hits.length) return;
    current = (current + (event.shiftKey ? hits.length - 1 : 1)) % hits.length;
    hits[current][0].show(hits[current][1]);
    found.textContent = `${current + 1} of ${hits.length}`;
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input") && event.key !== "Escape") return;
    if (event.key === "/") { event.preventDefault(); find.focus(); }
    if (event.key === "+" || event.key === "=") zoom(1.25);
    if (event.key === "-") zoom(0.8);
    if (event.key === "f") views.forEach((view) => view.fit());
    if (event.key === "Escape") { detail.hidden = true; find.blur(); }
  });

  const tabs = document.querySelectorAll("header nav button");
  const select = (name) => {
    tabs.forEach((tab) => tab.classList.toggle("on", tab.dataset.tab === name));
    document.querySelectorAll("main").forEach((main) => main.classList.toggle("on", main.id === name));
    if (name === "graph" && !views[0].size) { redraw(); views.forEach((view) => view.fit()); }
  };
  tabs.forEach((tab) => tab.addEventListener("click", () => { history.replaceState(null, "", `#${tab.dataset.tab}`); select(tab.dataset.tab); }));
  document.querySelectorAll(".pass .head").forEach((head) => {
    const flip = () => head.parentElement.classList.toggle("on");
    head.addEventListener("click", flip);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") flip(); });
  });
  const root = document.documentElement;
  root.classList.toggle("dark", matchMedia("(prefers-color-scheme: dark)").matches);
  document.getElementById("theme").addEventListener("click", () => root.classList.toggle("dark"));
  const asked = location.hash.slice(1);
  select(["graph", "cost", "passes"].includes(asked) ? asked : "graph");
})();
