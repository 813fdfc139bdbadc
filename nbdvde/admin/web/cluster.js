// The cluster that replicates an image, as this node sees it.

import { Table, bytes, count, make, plural, setText } from "./widgets.js";

const $ = (id) => document.getElementById(id);
const entries = (number) => plural(count(number), "entry", "entries");
let table = null;

function nodes() {
  return new Table($("nodes"), [
    { title: "Node", value: (row) => `${row.node}`, text: (_, row) => `${row.node} · ${row.name}`, kind: "name" },
    { title: "Role", value: (row) => row.role },
    { title: "Address", value: (row) => row.address, wide: true },
    { title: "Behind", value: (row) => row.behind, text: (value) => (value === null ? "–" : count(value)), descending: true },
    { title: "Connection", value: (row) => (row.here ? "this node" : row.connected ? "connected" : "none"), bad: (row) => !row.connected },
  ], { caption: "Nodes", rows: 10 });
}

function headline({ node, leader, role, term }) {
  const does = node === leader ? "leads" : leader ? `follows node ${leader}` : `looks for a leader (${role})`;
  return `Node ${node} ${does}, in term ${term}.`;
}

function facts(status, measures) {
  const lag = status.committed - status.applied;
  const found = [[lag ? entries(lag) : "nothing", "agreed on and not yet applied here"], [count(status.committed), "entries agreed on"],
    [bytes(status.log_bytes), "of them kept for others"], [count(status.elections), "times asked for votes"]];
  if (measures.received_bytes) found.push([bytes(measures.received_bytes), "taken over to catch up"]);
  if (measures.compared_bytes) found.push([bytes(measures.compared_bytes), "compared with the other nodes"]);
  if (measures.repaired) found.push([count(measures.repaired), "differences repaired"]);
  return found.map(([value, name]) => make("span", {}, make("b", { textContent: value }), ` ${name}`));
}

// `status` is the answer of /v1/cluster/status, `measures` what /v1/metrics tells of the image's part in it
export function showCluster(status, measures) {
  table ??= nodes();
  $("cluster-section").hidden = false;
  setText($("cluster-state"), headline(status));
  $("cluster-facts").replaceChildren(...facts(status, measures));
  table.update(status.nodes.map((node) => ({ ...node, here: node.node === status.node })));
}

export const hideCluster = () => { $("cluster-section").hidden = true; };

export function clusterProblem({ path, cluster }) {
  const found = [];
  if (cluster?.problem) found.push(`${path}: this node takes no part in its cluster: ${cluster.problem}.`);
  const left = cluster ? cluster.differences - cluster.repaired : 0;
  if (left > 0) found.push(`${path}: nodes differ in ${count(left)} chunks of 1 MiB: see nbdvde cluster verify.`);
  return found;
}
