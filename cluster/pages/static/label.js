// Adds to the labelling page: keys, drafts, and sending that survives a lost connection. Without
// this file the page works as well.
"use strict";

document.documentElement.classList.add("scripted");

const RETRY_MS = [1000, 2000, 4000, 8000, 15000];
const DRAFT_MS = 1500;
const SENT = ["submit", "skip", "flag"];
const form = document.getElementById("task");
// Not form.action: that is what the form's buttons are called.
const address = form?.getAttribute("action");
const say = (text) => { document.querySelector("[data-status]").textContent = text; };

if (document.querySelector("[data-left]")) {
  for (const name of Object.keys(localStorage)) if (name.startsWith("accord-task-")) localStorage.removeItem(name);
}
document.querySelector("[data-problems]")?.focus();

// -- drafts: in this browser at once, on the server a moment later ---------------------------------

const place = form && `accord-task-${form.dataset.task}-${form.elements.supersedes?.value ?? ""}`;

function entered() {
  const found = Object.fromEntries(new FormData(form));
  delete found.csrf;
  return found;
}

function keepHere() {
  try { localStorage.setItem(place, JSON.stringify(entered())); } catch { /* full, or not allowed */ }
}

function restore() {
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(place)); } catch { /* not allowed */ }
  for (const [name, value] of Object.entries(kept ?? {})) {
    const field = form.elements[name];
    if (field && field.type !== "hidden") {
      if (field.type === "checkbox") field.checked = true; else field.value = value;
    }
  }
}

let draftTimer = 0;
let sending = false;

function changed() {
  keepHere();
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, DRAFT_MS);
}

async function saveDraft() {
  if (sending) return;
  const body = new URLSearchParams(new FormData(form));
  body.set("action", "draft");
  try {
    const answer = await fetch(address, { method: "POST", body, headers: { "x-accord": "script" } });
    if (answer.ok && !sending) say("");
  } catch {
    if (!sending) say("No connection to the server. What you enter is kept in this browser.");
  }
}

// -- sending ---------------------------------------------------------------------------------------

async function send(button) {
  sending = true;
  clearTimeout(draftTimer);
  keepHere();
  const body = new URLSearchParams(new FormData(form));
  body.set("action", button.value);
  for (const one of form.querySelectorAll("button")) one.disabled = true;
  for (let attempt = 0; ; attempt++) {
    let answer = null;
    try {
      answer = await fetch(address, { method: "POST", body, headers: { "x-accord": "script" } });
    } catch { /* no connection */ }
    if (answer?.ok && !answer.redirected) {
      localStorage.removeItem(place);
      location.assign((await answer.json()).next);
      return;
    }
    if (answer && answer.status < 500) { // the server says no: let the browser show its page
      for (const one of form.querySelectorAll("button")) one.disabled = false;
      const action = Object.assign(document.createElement("input"), { type: "hidden", name: "action", value: button.value });
      form.append(action);
      form.submit();
      return;
    }
    say("Not sent yet: the server does not answer. Your label is kept in this browser and is sent again by itself.");
    await pause(RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]);
  }
}

function pause(milliseconds) {
  return new Promise((done) => {
    const timer = setTimeout(done, milliseconds);
    addEventListener("online", () => { clearTimeout(timer); done(); }, { once: true });
  });
}

// -- keys ------------------------------------------------------------------------------------------

function press(key) {
  const target = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (!target) return false;
  if (target.matches("input")) {
    target.click();
    target.focus();
  } else if (target.matches("summary")) {
    target.parentElement.open = true;
    const field = target.parentElement.querySelector("textarea, select");
    (field ?? target).focus();
  } else {
    target.click();
  }
  return true;
}

function rank(key) {
  const rows = [...form.querySelectorAll(".ranks fieldset")];
  const empty = rows.findIndex((row) => !row.querySelector(":checked"));
  if (key === "Backspace") {
    const last = rows.filter((row) => row.querySelector(":checked")).pop();
    if (last) last.querySelector(":checked").checked = false;
  } else {
    const field = empty >= 0 && rows[empty].querySelector(`input[value="${CSS.escape(key)}"]`);
    if (!field) return false;
    field.checked = true;
  }
  markNext();
  changed();
  return true;
}

function markNext() {
  const rows = [...form.querySelectorAll(".ranks fieldset")];
  const next = rows.find((row) => !row.querySelector(":checked"));
  for (const row of rows) row.classList.toggle("next", row === next);
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.metaKey || event.isComposing) return;
  const at = event.target;
  const writing = at.matches?.("textarea, select, input:not([type=radio]):not([type=checkbox])");
  if (form && event.key === "Enter" && (event.ctrlKey || !(writing || at.matches?.("button, a, summary, input")))) {
    event.preventDefault();
    form.requestSubmit(form.querySelector("button.main"));
    return;
  }
  if (writing && event.key === "Escape") at.blur();
  if (writing || event.ctrlKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const why = key === "w" && document.querySelector("[data-focus-key=w]");
  const done = why ? (why.focus(), true) : (form?.querySelector(".ranks") && /^(\d|Backspace)$/.test(key) ? rank(key) : key.length === 1 && press(key));
  if (done) event.preventDefault();
});

if (form) {
  restore();
  markNext();
  form.addEventListener("input", () => { markNext(); changed(); });
  form.addEventListener("submit", (event) => {
    const button = event.submitter ?? form.querySelector("button.main");
    if (!SENT.includes(button.value)) { keepHere(); return; }
    event.preventDefault();
    if (!sending) send(button);
  });
}
