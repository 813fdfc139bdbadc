// The dashboard: asks the control interface every other second, and shows what has changed since.

import { clusterProblem, hideCluster, showCluster } from "./cluster.js";
import { regionName, regionState, regionUse } from "./regions.js";
import { Table, bytes, count, drawChart, drawMap, linear, logarithmic, make, plural, rounded, seconds, setText, span, sum } from "./widgets.js";

const POLL_MS = 2000, RETRY_MS = 4000, PATIENCE_MS = 8000, SLOW_MS = 15000;
const POINTS = 91, RECENT_S = 10, IMAGES = 4;
const COMMANDS = ["read", "write", "flush", "trim", "write_zeroes", "block_status", "cache"];

// What happened between two answers of /v1/metrics

function rates(now, before, elapsed_s) {
  const per = (kind, command) => Math.max(0, (now[kind][command] ?? 0) - (before?.[kind][command] ?? 0)) / elapsed_s;
  return {
    read: per("bytes", "read"), written: per("bytes", "write"), reads: per("requests", "read"), writes: per("requests", "write"),
    requests: sum(Object.keys(now.requests).map((command) => per("requests", command))),
  };
}

function recentLatency(now, before) {
  const left = new Map(before?.buckets ?? []);
  const buckets = (now?.buckets ?? []).map(([bound, number]) => [bound, number - (left.get(bound) ?? 0)]);
  return buckets.filter(([, number]) => number > 0);
}

function joined(list) {
  const all = new Map();
  for (const [bound, number] of list.flat()) all.set(bound, (all.get(bound) ?? 0) + number);
  return [...all].sort(([a], [b]) => (a ?? Infinity) - (b ?? Infinity));
}

function quantile(buckets, share) {
  const wanted = share * sum(buckets.map(([, number]) => number));
  let below = 0;
  for (const [bound, number] of buckets) {
    below += number;
    if (below >= wanted) return bound ?? 100;
  }
  return null;
}

// What is on the page

const $ = (id) => document.getElementById(id);
const perSecond = (value) => (value ? `${bytes(value)}/s` : "0");
const tables = {
  commands: new Table($("commands"), [
    { title: "Request", value: (row) => row.name, kind: "name" },
    { title: "Per second", value: (row) => row.rate, text: count, descending: true },
    { title: "50 %", value: (row) => row.p50, text: seconds, descending: true },
    { title: "95 %", value: (row) => row.p95, text: seconds, descending: true, wide: true },
    { title: "99 %", value: (row) => row.p99, text: seconds, descending: true },
    { title: "Longest ever", value: (row) => row.max, text: seconds, descending: true, wide: true },
    { title: "Total", value: (row) => row.total, text: count, descending: true, wide: true },
  ], { caption: "Requests", sorted: 6 }),
  exports: new Table($("exports"), [
    { title: "Name", value: (row) => row.name, kind: "name" },
    { title: "Size", value: (row) => row.size, text: bytes, descending: true, wide: true },
    { title: "Mode", value: (row) => (row.read_only ? "read-only" : "read-write"), wide: true },
    { title: "Clients", value: (row) => row.clients, descending: true, wide: true },
    { title: "Read", value: (row) => row.rates.read, text: perSecond, descending: true },
    { title: "Written", value: (row) => row.rates.written, text: perSecond, descending: true },
    { title: "Requests/s", value: (row) => row.rates.requests, text: count, descending: true, wide: true },
    { title: "Latency", value: (row) => row.p99, text: seconds, descending: true },
    { title: "Errors", value: (row) => row.traffic.errors, text: count, descending: true, wide: true, bad: true },
  ], { caption: "Exports", search: true, sorted: 3 }),
  connections: new Table($("connections"), [
    { title: "Client", value: (row) => `${row.number}`, text: (_, row) => `${row.number} · ${row.peer}`, kind: "name" },
    { title: "Export", value: (row) => row.export ?? "handshake" },
    { title: "Requests/s", value: (row) => row.requestRate, text: count, descending: true, wide: true },
    { title: "Traffic", value: (row) => row.byteRate, text: perSecond, descending: true },
  ], { caption: "Clients", sorted: 3, rows: 10 }),
  snapshots: new Table($("snapshots"), [
    { title: "Name", value: (row) => row.name, kind: "name" },
    { title: "Size", value: (row) => row.size, text: bytes, descending: true, wide: true },
    { title: "Taken", value: (row) => row.created_ns, text: (value) => `${span(Math.max(0, Date.now() / 1e3 - value / 1e9))} ago`, descending: true },
  ], { caption: "Snapshots", search: true, sorted: 2, rows: 10 }),
  regions: new Table($("regions"), [
    { title: "Region", value: (row) => `${row.disk} ${regionName(row)}`, text: (_, row) => regionName(row), kind: "name" },
    { title: "State", value: (row) => regionState(row), kind: "words", bad: (row) => row.problem },
    { title: "Used", value: regionUse, text: (value) => (value === null ? "–" : `${Math.round(100 * value)} %`), descending: true },
  ], { caption: "Regions", search: true, rows: 10 }),
};
const charts = { read: [], written: [], reads: [], writes: [], flushes: [] };
let samples = [], allImages = false, failures = 0, goneSince = null, slowDue = 0, timer = null, asking = false, paths = null;
let chosen = Object.fromEntries(new URLSearchParams(location.hash.slice(1))), offered = "", turn = 0;

function showTraffic(now, before, old) {
  const elapsed_s = before ? now.uptime_s - before.uptime_s : 0;
  const zero = elapsed_s > 0 ? rates(now.traffic, before.traffic, elapsed_s) : rates(now.traffic, now.traffic, 1);
  const recent = Object.fromEntries(COMMANDS.map((name) => [name, recentLatency(now.traffic.latency[name], old?.traffic.latency[name])]));
  const all = joined(Object.values(recent));
  tile("read", `${bytes(zero.read)}/s`, `${count(zero.reads)} requests/s`);
  tile("write", `${bytes(zero.written)}/s`, `${count(zero.writes)} requests/s`);
  tile("latency", seconds(quantile(all, 0.99)), all.length ? `half within ${seconds(quantile(all, 0.5))}` : "no requests just now");
  if (before) {
    const point = (name) => quantile(recentLatency(now.traffic.latency[name], before.traffic.latency[name]), 0.99) ?? NaN;
    push({ read: zero.read, written: zero.written, reads: point("read"), writes: point("write"), flushes: point("flush") });
  }
  const rate = (name) => (before ? Math.max(0, now.traffic.requests[name] - (before.traffic.requests[name] ?? 0)) / elapsed_s : 0);
  tables.commands.update(COMMANDS.filter((name) => now.traffic.requests[name]).map((name) => ({
    name: name.replace("_", " "), rate: rate(name), total: now.traffic.requests[name], max: now.traffic.latency[name]?.max_s ?? null,
    p50: quantile(recent[name], 0.5), p95: quantile(recent[name], 0.95), p99: quantile(recent[name], 0.99),
  })));
  document.title = `${bytes(zero.read + zero.written)}/s · nbdvde`;
}

function tile(name, value, more) {
  const [number, ...unit] = value.split(" ");
  if ($(name).dataset.value !== value) $(name).replaceChildren(number, make("small", { textContent: unit.length ? ` ${unit.join(" ")}` : "" }));
  $(name).dataset.value = value;
  setText($(`${name}-more`), more);
}

function push(point) {
  for (const [name, value] of Object.entries(point)) {
    charts[name].push(value);
    charts[name].splice(0, charts[name].length - POINTS);
  }
}

function drawCharts() {
  const room = [POINTS, (POINTS - 1) * POLL_MS / 1000];
  drawChart($("throughput-chart"), [{ name: "read", values: charts.read }, { name: "write", values: charts.written }], perSecond, linear, ...room);
  const latencies = [{ name: "read", values: charts.reads }, { name: "write", values: charts.writes }, { name: "flush", values: charts.flushes }];
  drawChart($("latency-chart"), latencies, (value) => seconds(value).replace(/\.0+ /, " "), logarithmic, ...room);
}

function showExports(now, before, old) {
  const [then, earlier] = [before, old].map((sample) => new Map((sample?.exports ?? []).map((one) => [one.name, one.traffic])));
  const elapsed_s = before ? now.uptime_s - before.uptime_s : 1;
  tables.exports.update(now.exports.map((one) => {
    const buckets = joined(Object.entries(one.traffic.latency).map(([name, found]) => recentLatency(found, earlier.get(one.name)?.latency[name])));
    return { ...one, rates: rates(one.traffic, then.get(one.name) ?? one.traffic, elapsed_s), p99: old ? quantile(buckets, 0.99) : null };
  }));
  setText($("exports-title"), now.exports.length > 1 ? `Exports (${now.exports.length})` : "Export");
}

function showClients(now, before) {
  const then = new Map((before?.clients ?? []).map((client) => [client.number, client]));
  const elapsed_s = before ? now.uptime_s - before.uptime_s : 1;
  const rate = (client, kind) => Math.max(0, client[kind] - (then.get(client.number) ?? client)[kind]) / elapsed_s;
  tables.connections.update(now.clients.map((client) => ({ ...client, requestRate: rate(client, "requests"), byteRate: rate(client, "bytes") })));
  $("clients-section").hidden = !now.clients.length;
  const used = now.exports.filter((one) => one.clients).length;
  tile("clients", `${now.connections.open}`, now.connections.open ? `at ${plural(used, "export")} of ${now.exports.length}` : `${plural(now.connections.total, "connection")} so far`);
}

function showImages(images) {
  const sorted = [...images].sort((a, b) => b.file_bytes - a.file_bytes), shown = allImages ? sorted : sorted.slice(0, IMAGES);
  $("images-section").hidden = !images.length;
  $("images").replaceChildren(...shown.map(imageItem));
  $("images-more").hidden = images.length <= IMAGES;
  setText($("images-more"), allImages ? "Show the largest only" : `Show all ${images.length} images`);
}

function imageItem(image) {
  const { space, statistics } = image, inFile = space.live_bytes + space.overhead_bytes + space.garbage_bytes + space.free_bytes;
  const kinds = [["live", space.live_bytes, "data"], ["overhead", space.overhead_bytes, "maps and prepared segments"], ["garbage", space.garbage_bytes, "garbage"], ["free", space.free_bytes, "free in the file"]];
  if (space.capacity_bytes !== null) kinds.push(["left", Math.max(0, space.capacity_bytes - inFile), "left of the capacity"]);
  const whole = Math.max(1, sum(kinds.map(([, size]) => size)));
  const bar = make("div", { className: "bar" });
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", kinds.map(([, size, name]) => `${bytes(size)} ${name}`).join(", "));
  for (const [kind, size, name] of kinds) {
    if (!size) continue;
    const part = make("span", { className: kind, title: `${name}: ${bytes(size)}` });
    part.style.flex = `${size / whole} 0 0`;
    bar.append(part);
  }
  const fact = (value, name) => make("span", {}, make("b", { textContent: value }), ` ${name}`);
  const fresh = statistics.bytes_in - 4096 * statistics.blocks_shared, looked = image.cache_hits + image.cache_misses;
  const facts = [fact(bytes(space.live_bytes), "data"), fact(bytes(space.garbage_bytes), "garbage")];
  facts.push(fact(bytes(sum(image.disks.map((disk) => disk.logical_bytes))), "as clients see it"));
  if (statistics.bytes_stored && fresh) facts.push(fact(`${rounded(fresh / statistics.bytes_stored)}:1`, "compressed"));
  if (statistics.blocks_shared && fresh) facts.push(fact(`${rounded(statistics.bytes_in / fresh)}:1`, "by sharing"));
  if (looked) facts.push(fact(`${Math.round(100 * image.cache_hits / looked)} %`, "cache hits"));
  if (image.syncs.count) facts.push(fact(seconds(image.syncs.p99_s), "sync, 99 %"));
  if (image.cleaned_segments) facts.push(fact(bytes(image.cleaned_bytes), "cleaned"));
  const size = `${bytes(image.file_bytes)}${space.capacity_bytes === null ? "" : ` of ${bytes(space.capacity_bytes)}`}`;
  const title = make("h3", {}, make("span", { textContent: image.path, title: image.path }), make("span", { textContent: size }));
  return make("li", {}, title, bar, make("div", { className: "facts" }, ...facts));
}

// The image and disk of which there is more to be seen: the first ones until somebody chooses, or when theirs are gone

function chosenOf(images) {
  const image = images.find(({ path }) => path === chosen.image) ?? images[0];
  const disk = image?.disks.find(({ name }) => name === chosen.disk) ?? image?.disks[0];
  return { image, disk };
}

function offer(images) {
  const names = JSON.stringify(images.map((image) => [image.path, image.disks.map(({ name }) => name)])), { image, disk } = chosenOf(images);
  const option = (path, { name }) => make("option", { textContent: name, value: JSON.stringify([path, name]) });
  if (names !== offered) {
    const groups = images.map(({ path, disks }) => make("optgroup", { label: path }, ...disks.map((one) => option(path, one))));
    $("disk").replaceChildren(...(images.length === 1 ? groups[0].children : groups));
    offered = names;
  }
  if (disk && document.activeElement !== $("disk")) $("disk").value = JSON.stringify([image.path, disk.name]);
  $("disk-choice").hidden = !disk;
  $("disk").disabled = $("disk").options.length < 2;
}

function choose() {
  const [image, disk] = JSON.parse($("disk").value);
  chosen = { image, disk };
  history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
  askSlowly(samples.at(-1)?.images ?? []).catch(() => { slowDue = 0; });
}

function showMap(map, message) {
  $("map").hidden = !map;
  if (map) drawMap($("map"), $("map-legend"), map);
  else $("map-legend").replaceChildren(message);
}

function showAlerts(images) {
  const alerts = [];
  if (goneSince) alerts.push(`The server has not answered since ${goneSince.toLocaleTimeString()}. These figures are from before.`);
  for (const image of images) {
    alerts.push(...clusterProblem(image));
    if (image.failure) alerts.push(`${image.path} takes no more writes: ${image.failure}. Mend the device and open it again.`);
    if (image.damaged_segments) alerts.push(`${image.path}: damage was found in ${plural(image.damaged_segments, "segment")}. Run nbdvde check.`);
  }
  const box = $("alerts"), text = alerts.join("\n");
  if (box.dataset.text === text) return;
  box.dataset.text = text;
  box.replaceChildren(...alerts.map((alert) => make("p", { className: "card alert", textContent: alert })));
}

function showState(kind, text) {
  $("state").className = `state ${kind}`;
  setText($("state"), text);
  $("content").classList.toggle("stale", kind === "bad");
}

// Asking

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error(await answer.json().then(({ error }) => `${error.message}${error.hint && ` (${error.hint})`}`, () => `${path}: ${answer.status}`));
  return answer.json();
}

// What this server has and an image can tell, or why it cannot
async function optional(path, query) {
  paths ??= (await ask("v1/openapi.json")).paths;
  return `/${path}` in paths ? ask(`${path}?${new URLSearchParams(query)}`).catch((error) => ({ message: error.message })) : {};
}

async function askSlowly(images) {
  const own = ++turn;
  slowDue = performance.now() + SLOW_MS;
  const status = await ask("v1/status"), { image, disk } = chosenOf(images);
  setText($("about"), `${location.host} · version ${status.version} · process ${status.pid}`);
  const of = { image: image?.path };
  const [info, regions, map] = disk ? await Promise.all([optional("v1/info", of), optional("v1/regions", of), optional("v1/map", { ...of, disk: disk.name })]) : [{}, {}, {}];
  if (own !== turn) return; // another one was chosen meanwhile
  const snapshots = (info.disks ?? []).flatMap((one) => one.snapshots.map((snapshot) => ({ ...snapshot, name: `${one.name}@${snapshot.name}` })));
  tables.snapshots.update(snapshots);
  $("snapshots-section").hidden = !snapshots.length;
  tables.regions.update(regions.regions ?? []);
  $("regions-section").hidden = !regions.regions?.length;
  $("map-section").hidden = !disk;
  showMap(map.counts ? map : null, map.message ?? "");
  setText($("map-title"), disk ? `Map of ${disk.name}${images.length > 1 ? ` in ${image.path}` : ""}, ${bytes(disk.size)}` : "Map");
  for (const [name, title] of [["snapshots", "Snapshots"], ["regions", "Regions"]]) {
    setText($(`${name}-title`), images.length > 1 ? `${title} of ${image.path}` : title);
  }
}

// An image at most is replicated by a server
async function askCluster(images) {
  const measures = images.find(({ cluster }) => cluster)?.cluster;
  const status = measures ? await optional("v1/cluster/status", {}) : {};
  if (status.nodes) showCluster(status, measures);
  else hideCluster();
}

async function poll() {
  clearTimeout(timer);
  asking = true;
  try {
    const now = await ask("v1/metrics");
    if (samples.length && now.uptime_s < samples.at(-1).uptime_s) samples = []; // it was started again
    show(now);
    if (goneSince || performance.now() >= slowDue) await askSlowly(now.images);
    await askCluster(now.images);
    [failures, goneSince] = [0, null];
    showState("good", `Serving for ${span(now.uptime_s)}`);
    showAlerts(now.images);
  } catch (error) {
    failures += 1;
    goneSince ??= new Date();
    if (samples.length) push({ read: NaN, written: NaN, reads: NaN, writes: NaN, flushes: NaN });
    showState("bad", "No answer, trying again");
    showAlerts([]);
  }
  asking = false;
  $("content").setAttribute("aria-busy", "false");
  drawCharts();
  if (!document.hidden) timer = setTimeout(poll, failures ? RETRY_MS : POLL_MS);
}

function show(now) {
  const before = samples.at(-1), old = samples.findLast((sample) => now.uptime_s - sample.uptime_s >= RECENT_S) ?? samples[0];
  showTraffic(now, before, old);
  showExports(now, before, old);
  showClients(now, before);
  showImages(now.images);
  offer(now.images);
  samples = [...samples.filter((sample) => now.uptime_s - sample.uptime_s < 2 * RECENT_S), now];
}

$("disk").onchange = choose;
$("images-more").onclick = () => { allImages = !allImages; showImages(samples.at(-1)?.images ?? []); };
addEventListener("resize", drawCharts);
document.addEventListener("visibilitychange", () => { if (!document.hidden && !asking) poll(); });
poll();
