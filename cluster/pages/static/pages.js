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
  part.replaceChildren(...fresh.body.childNodes);
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
