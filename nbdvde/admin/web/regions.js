// The management regions of disks in people's words.

import { bytes, count, plural } from "./widgets.js";

const NAMES = {
  RDIR: "directory of regions", STRE: "stream", WORM: "write once", CMVT: "compliance vault", MTRK: "metrics log", ANON: "anonymisation",
};
const day = (time_ns) => new Date(time_ns / 1e6).toISOString().slice(0, 10);

export const regionName = (row) => `${NAMES[row.type] ?? row.type} of ${row.disk}`;

// How long something lasts: rounded up, as the commands do
function lasting(left_s) {
  const [size, unit] = [[86400, "days"], [3600, "hours"], [60, "minutes"]].find(([length]) => left_s >= 2 * length) ?? [1, "s"];
  return `${Math.ceil(left_s / size)} ${unit}`;
}

function stream({ policy, entries, capacity, head }) {
  return `${plural(count(entries), "entry", "entries")} of ${count(capacity / 4096)}, the next is number ${head}; when full: ${policy}`;
}

function worm({ records, mark, left_ns }) {
  const left = left_ns === null ? "kept for ever" : left_ns ? `kept for another ${lasting(left_ns / 1e9)}` : "its retention has ended";
  return `${plural(count(records), "append")}, ${bytes(mark)}; ${left}`;
}

function vault({ passports, valid, expired, not_yet_valid, revoked }) {
  const states = [[valid, "valid"], [expired, "expired"], [not_yet_valid, "not yet valid"], [revoked, "revoked"]];
  const found = states.filter(([number]) => number).map(([number, state]) => `${count(number)} ${state}`);
  return `${plural(count(passports), "passport")}${found.length ? `: ${found.join(", ")}` : ""}`;
}

function anonymisation({ mappings, subjects, erased }) {
  return `${plural(count(mappings), "mapping")} of ${plural(count(subjects), "subject")}, ${count(erased)} erased`;
}

function metrics({ samples, first_ns, last_ns }) {
  if (!samples) return "no samples yet";
  const [first, last] = [first_ns, last_ns].map(day);
  return `${plural(count(samples), "sample")} ${first === last ? `of ${first}` : `from ${first} to ${last}`}`;
}

const STATES = { stream, worm, vault, anonymisation, metrics };

export function regionState(row) {
  if (row.problem) return row.problem;
  const kind = Object.keys(STATES).find((name) => row[name]);
  return kind ? STATES[kind](row[kind]) : "";
}

// The part of its room that is taken, as far as that is known
export function regionUse({ stream, worm, metrics, vault, anonymisation, metadata, size }) {
  if (stream) return stream.entries * 4096 / stream.capacity;
  if (worm) return worm.mark / worm.capacity;
  if (metrics) return metrics.used / metrics.capacity;
  return vault || anonymisation ? metadata / size : null;
}
