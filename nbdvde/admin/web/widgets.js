// Numbers for people, tables, charts and maps. Everything is text that is set as text: no name is taken for markup.

export const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Numbers as people read them

export function rounded(value) {
  return value >= 100 || value === 0 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit ? rounded(value) : Math.round(value)} ${units[unit]}`;
}

export function count(value) {
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (value >= size) return `${rounded(value / (size === 1e4 ? 1e3 : size))} ${unit}`;
  }
  return value && value < 10 ? rounded(value).replace(/\.?0+$/, "") : Math.round(value).toString();
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1) return `${rounded(value)} s`;
  return value >= 1e-3 ? `${rounded(value * 1e3)} ms` : `${rounded(value * 1e6)} µs`;
}

export function span(value) {
  for (const [size, unit] of [[86400, "day"], [3600, "hour"], [60, "minute"]]) {
    if (value >= size) return `${Math.floor(value / size)} ${unit}${value >= 2 * size ? "s" : ""}`;
  }
  return `${Math.floor(value)} s`;
}

export const plural = (number, what, several = `${what}s`) => `${number} ${String(number) === "1" ? what : several}`;

// A table that can be searched, sorted and turned over

export class Table {
  // Columns: {title, value(row), text(value, row), wide, kind}
  constructor(root, columns, { caption, search = false, sorted = 0, rows = 12 }) {
    Object.assign(this, { columns, sorted, descending: columns[sorted].descending ?? false, page: 0, size: rows, rows: [], found: "" });
    this.body = make("tbody");
    this.heads = columns.map((column, index) => this.head(column, index));
    this.table = make("table", {}, make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    this.table.setAttribute("aria-label", caption);
    this.empty = make("p", { className: "muted", hidden: true });
    this.previous = make("button", { type: "button", textContent: "‹", onclick: () => this.turn(-1) });
    this.next = make("button", { type: "button", textContent: "›", onclick: () => this.turn(1) });
    this.previous.setAttribute("aria-label", "Previous page");
    this.next.setAttribute("aria-label", "Next page");
    this.where = make("span");
    this.pages = make("div", { className: "pages" }, this.previous, this.where, this.next);
    this.tools = make("div", { className: "tools" }, this.pages);
    if (search) {
      const input = make("input", { type: "search", placeholder: "Find by name", oninput: () => this.find(input.value) });
      input.setAttribute("aria-label", `Find in ${caption}`);
      this.tools.prepend(input);
    }
    root.append(this.tools, this.table, this.empty);
    this.search = search;
  }

  head(column, index) {
    const button = make("button", { type: "button", textContent: column.title, onclick: () => this.sort(index) });
    const cell = make("th", { scope: "col" }, button);
    cell.classList.toggle("wide", Boolean(column.wide));
    cell.classList.toggle("words", column.kind === "words");
    return cell;
  }

  update(rows) { this.rows = rows; this.draw(); }
  turn(step) { this.page += step; this.draw(); }
  find(text) { this.found = text.toLowerCase(); this.page = 0; this.draw(); }

  sort(index) {
    this.descending = index === this.sorted ? !this.descending : this.columns[index].descending ?? false;
    this.sorted = index;
    this.page = 0;
    this.draw();
  }

  draw() {
    const name = this.columns[0].value, { value } = this.columns[this.sorted], sign = this.descending ? -1 : 1;
    const order = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    const found = this.rows.filter((row) => String(name(row)).toLowerCase().includes(this.found));
    found.sort((a, b) => sign * order(value(a) ?? -1, value(b) ?? -1) || order(name(a), name(b)));
    const pages = Math.max(1, Math.ceil(found.length / this.size));
    this.page = Math.min(Math.max(0, this.page), pages - 1);
    this.fill(found.slice(this.page * this.size, (this.page + 1) * this.size));
    this.heads.forEach((cell, index) => {
      if (index === this.sorted) cell.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    this.table.hidden = !this.rows.length;
    this.empty.hidden = Boolean(found.length);
    setText(this.empty, this.rows.length ? "None of that name." : "None yet.");
    this.pages.hidden = pages === 1;
    this.tools.hidden = pages === 1 && !(this.search && this.rows.length > this.size);
    setText(this.where, `${this.page * this.size + 1}–${Math.min((this.page + 1) * this.size, found.length)} of ${found.length}`);
    this.previous.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
  }

  fill(rows) {
    while (this.body.rows.length > rows.length) this.body.lastChild.remove();
    rows.forEach((row, index) => {
      const line = this.body.rows[index] ?? this.body.appendChild(make("tr", {}, ...this.columns.map(() => make("td"))));
      this.columns.forEach((column, number) => {
        const cell = line.cells[number], found = column.value(row), text = column.text?.(found, row) ?? String(found ?? "–");
        setText(cell, text);
        const bad = typeof column.bad === "function" ? column.bad(row) : column.bad && found;
        cell.className = [column.wide ? "wide" : "", column.kind ?? (found ? "" : "zero"), bad ? "bad" : ""].join(" ");
        if (column.kind === "name") cell.title = column.title_of?.(row) ?? text;
      });
    });
  }
}

// A chart of lines over the last minutes

export function linear(values) {
  const highest = 2 ** Math.ceil(Math.log2(Math.max(1024, ...values)));
  return { share: (value) => value / highest, marks: [0, highest / 2, highest] };
}

export function logarithmic(values) {
  const lowest = Math.floor(Math.log10(Math.min(1e-4, ...values))), highest = Math.ceil(Math.log10(Math.max(1e-2, ...values)));
  const marks = Array.from({ length: highest - lowest + 1 }, (_, index) => 10 ** (lowest + index));
  return { share: (value) => (Math.log10(Math.max(value, marks[0])) - lowest) / (highest - lowest), marks };
}

// `points` values at most have room, of the last `whole_s` seconds
export function drawChart(svg, series, text, scale, points, whole_s) {
  const width = svg.clientWidth, height = svg.clientHeight, left = 62, bottom = 20, top = 8;
  if (!width) return;
  const { share, marks } = scale(series.flatMap(({ values }) => values.filter(Number.isFinite)));
  const x = (index) => left + (index / (points - 1)) * (width - left - 4);
  const y = (value) => top + (1 - share(value)) * (height - top - bottom);
  const node = (tag, attributes, content = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = content;
    return element;
  };
  const parts = marks.flatMap((mark) => [
    node("line", { class: "grid", x1: left, x2: width, y1: y(mark), y2: y(mark) }),
    node("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, text(mark)),
  ]);
  parts.push(node("text", { x: left, y: height - 4 }, `${span(whole_s)} ago`));
  parts.push(node("text", { x: width - 2, y: height - 4, "text-anchor": "end" }, "now"));
  for (const { name, values } of series) {
    for (const run of runs(values, points - values.length)) {
      const line = run.map(([index, value]) => `${x(index).toFixed(1)},${y(value).toFixed(1)}`).join(" L");
      const [[first], [last]] = [run[0], run.at(-1)];
      const floor = height - bottom;
      if (scale === linear) parts.push(node("path", { class: `area ${name}`, d: `M${x(first)},${floor} L${line} L${x(last)},${floor} Z` }));
      parts.push(node("path", { class: `line ${name}`, d: `M${line}${run.length === 1 ? "h1" : ""}` }));
    }
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...parts);
}

function runs(values, offset) {
  const found = [];
  values.forEach((value, index) => {
    if (!Number.isFinite(value)) return;
    if (!index || !Number.isFinite(values[index - 1])) found.push([]);
    found.at(-1).push([index + offset, value]);
  });
  return found;
}

// A map of a disk, cell by cell

const PARTS = {
  zero: [150, 150, 150], compressed: [0, 114, 178], incompressible: [230, 159, 0], shared: [0, 158, 115],
  changed: [204, 72, 160], unreadable: [200, 0, 0],
};
const FAINTEST = 0.35;

export function drawMap(canvas, legend, map) {
  const columns = Math.max(1, Math.min(128, 2 ** Math.ceil(Math.log2(2 * map.cells) / 2)));
  Object.assign(canvas, { width: columns, height: Math.ceil(map.cells / columns) });
  const context = canvas.getContext("2d"), picture = context.createImageData(canvas.width, canvas.height);
  const counts = Object.entries(map.counts).filter(([part]) => part in PARTS);
  for (let cell = 0; cell < map.cells; cell++) {
    const used = sum(counts.map(([, numbers]) => numbers[cell]));
    if (!used) continue; // holes are what is behind the map
    const blocks = Math.ceil((cell + 1) * map.blocks / map.cells) - Math.ceil(cell * map.blocks / map.cells);
    const mixed = [0, 1, 2].map((channel) => sum(counts.map(([part, numbers]) => numbers[cell] * PARTS[part][channel])) / used);
    picture.data.set([...mixed, 255 * (FAINTEST + (1 - FAINTEST) * used / blocks)], 4 * cell);
  }
  context.putImageData(picture, 0, 0);
  const shown = Object.entries(map.bytes).filter(([part, size]) => size && part in PARTS);
  canvas.setAttribute("aria-label", `Disk ${map.disk}: ${shown.map(([part, size]) => `${bytes(size)} ${part}`).join(", ") || "empty"}`);
  const keys = shown.map(([part, size]) => {
    const key = make("span", { className: "key", textContent: `${part} ${bytes(size)}` });
    key.style.setProperty("--key", `rgb(${PARTS[part].join(" ")})`);
    return key;
  });
  legend.replaceChildren(...(keys.length ? keys : ["Nothing is stored."]));
}
