// What was run, kept in this browser: a list of {id, at, mode, system, panels: [{settings, messages}]}, the newest first.
const KEPT = 50, STORE = "hasten-history", OPEN = "hasten-open";

function kept() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) || [];
  } catch {
    return []; // the browser keeps nothing for this page, or something else was written there
  }
}

function keep(entries) {
  for (let count = Math.min(KEPT, entries.length); count >= 0; count -= 1) {
    try {
      localStorage.setItem(STORE, JSON.stringify(entries.slice(0, count)));
      break;
    } catch { /* it has no room for as many, or none at all */ }
  }
  list();
}

function remember() {
  const found = panels.map((panel) => ({ settings: panel.settings, messages: panel.messages.map(({ role, content }) => ({ role, content })) }));
  if (!found.some((panel) => panel.messages.length)) return;
  const id = sessionStorage.getItem(OPEN) || crypto.getRandomValues(new Uint32Array(2)).join("-");
  sessionStorage.setItem(OPEN, id);
  keep([{ id, at: Date.now(), mode: mode(), system: byId("system").value, panels: found }, ...kept().filter((entry) => entry.id !== id)]);
}

function restore(entry) {
  sessionStorage.setItem(OPEN, entry.id);
  document.querySelector(`[name=mode][value=${entry.mode}]`).checked = true;
  byId("system").value = entry.system;
  setPanels(entry.panels.map(({ settings, messages }, at) => new Panel("AB"[at], settings, messages)));
  byId("prompt").value = entry.mode === "chat" ? "" : entry.panels[0].messages[0].content;
  list();
}

function list() {
  const entries = kept(), open = sessionStorage.getItem(OPEN);
  byId("history-empty").hidden = byId("clear").hidden = true;
  byId(entries.length ? "clear" : "history-empty").hidden = false;
  byId("entries").replaceChildren(...entries.map((entry) => {
    const title = entry.panels[0].messages[0]?.content || "…";
    const shown = make("button", { type: "button", className: "entry", title, textContent: title.slice(0, 80), onclick: () => { if (!running) restore(entry); } });
    if (entry.id === open) shown.setAttribute("aria-current", "true");
    const about = `${entry.mode}${entry.panels.length > 1 ? ", compared" : ""}, ${new Date(entry.at).toLocaleString()}`;
    const gone = make("button", { type: "button", className: "gone", textContent: "×", title: "Delete", onclick: () => keep(kept().filter((other) => other.id !== entry.id)) });
    gone.setAttribute("aria-label", `Delete “${title.slice(0, 40)}”`);
    return make("li", {}, make("div", {}, shown, make("small", { textContent: about })), gone);
  }));
}

byId("clear").addEventListener("click", () => keep([]));
