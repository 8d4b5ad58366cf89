// Keeps the parts of a page that carry data-live="ADDRESS" fresh. Without scripts a page still works:
// it shows what was true when it was loaded.
"use strict";

const EVERY_MS = 2000;

async function refresh(part) {
  const answer = await fetch(part.dataset.live, { cache: "no-store" });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const text = await answer.text();
  if (text === part.accordShown) return; // unchanged: what a reader selected stays selected
  part.accordShown = text;
  // Made by our templates, which escape all text of models and users; no script in it would run.
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  const ticked = [...part.querySelectorAll("input:checked")].map((box) => box.value);
  part.replaceChildren(...fresh.body.childNodes);
  for (const box of part.querySelectorAll("input[type=checkbox]")) box.checked = ticked.includes(box.value);
  if (focused) document.getElementById(focused)?.focus();
}

function watch(part) {
  const lost = document.querySelector("[data-lost]");
  const again = async () => {
    if (!document.hidden) {
      try {
        await refresh(part);
        if (lost) lost.hidden = true;
      } catch {
        if (lost) lost.hidden = false;
      }
    }
    setTimeout(again, Number(part.dataset.every) || EVERY_MS);
  };
  setTimeout(again, Number(part.dataset.every) || EVERY_MS);
}

document.querySelectorAll("[data-live]").forEach(watch);

// Charts: the values at the step under the pointer, or at the one that the arrow keys chose.
function reading(chart, at) {
  const d = Object.fromEntries(Object.entries(chart.dataset).map(([k, v]) => [k, Number(v)]));
  const value = (y) => d.y0 + ((d.bottom - y) / (d.bottom - d.top)) * (d.y1 - d.y0);
  const lines = [...chart.querySelectorAll("polyline[data-label]")].map((line) => {
    const points = line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number));
    const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    return { label: line.dataset.label, near };
  });
  if (!lines.length) return at;
  const x = lines[0].near[0];
  const step = Math.round(d.x0 + ((x - d.left) / (d.right - d.left)) * (d.x1 - d.x0));
  const told = lines.map((l) => `${l.label} ${Number(value(l.near[1]).toPrecision(3))}`);
  chart.parentElement.querySelector("output").textContent = `step ${step}: ${told.join(", ")}`;
  let cursor = chart.querySelector(".cursor");
  if (!cursor) {
    cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    chart.append(cursor);
  }
  for (const [name, v] of [["x1", x], ["x2", x], ["y1", d.top], ["y2", d.bottom]]) cursor.setAttribute(name, v);
  return x;
}

document.addEventListener("pointermove", (event) => {
  const chart = event.target.closest?.(".plot svg");
  if (!chart) return;
  const box = chart.getBoundingClientRect();
  reading(chart, ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width);
});

document.addEventListener("keydown", (event) => {
  const chart = event.target.closest?.(".plot svg");
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!chart || !by) return;
  event.preventDefault();
  const left = Number(chart.dataset.left), right = Number(chart.dataset.right);
  const from = chart.querySelector(".cursor") ? Number(chart.querySelector(".cursor").getAttribute("x1")) : right;
  reading(chart, Math.min(right, Math.max(left, from + by * 6)));
});
