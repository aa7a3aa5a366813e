// The playground: one prompt for one or two panels.
let panels = [], running = null;

function setPanels(made) {
  panels = made;
  byId("panels").replaceChildren(...panels.map((panel) => panel.element));
  document.body.classList.toggle("compares", panels.length > 1);
  byId("compare").setAttribute("aria-pressed", String(panels.length > 1));
  fit();
}

function fit() {
  const chats = mode() === "chat", ids = [...engines.keys()];
  const can = ids.filter((id) => engines.get(id).chat).length > 0;
  document.querySelector("[name=mode][value=chat]").disabled = !can;
  document.querySelector("#modes").title = ids.length && !can ? "no model here has a chat template" : "";
  for (const panel of panels) {
    panel.offer(ids);
    panel.fit();
  }
  const writes = generates(panels[0].engine), embeds = !writes && panels[0].engine.tasks.includes("embed");
  byId("go").textContent = !writes ? (embeds ? "Embed" : "Classify") : chats ? "Send" : "Generate";
  byId("prompt-label").textContent = writes && chats ? "Message" : "Prompt";
  byId("system-box").hidden = !chats;
}

function fresh() {
  sessionStorage.removeItem(OPEN);
  setPanels(panels.map((panel, at) => new Panel("AB"[at], panel.settings)));
  list();
}

function busy(controller) {
  running = controller;
  byId("go").disabled = byId("new").disabled = byId("compare").disabled = byId("modes").disabled = controller !== null;
  byId("stop").disabled = controller === null;
}

async function run() {
  const prompt = byId("prompt").value, chats = mode() === "chat", asked = panels;
  if (!chats) sessionStorage.removeItem(OPEN); // each completion is an entry of its own
  busy(new AbortController());
  await Promise.all(asked.map((panel) => panel.run(prompt, running.signal)));
  busy(null);
  if (chats && asked.every((panel) => panel.error.hidden)) byId("prompt").value = "";
  remember();
}

byId("play").addEventListener("submit", (event) => { event.preventDefault(); if (!running) run(); });
byId("play").addEventListener("input", () => panels.forEach((panel) => panel.showCommand()));
byId("stop").addEventListener("click", () => running && running.abort());
byId("new").addEventListener("click", fresh);
byId("compare").addEventListener("click", () => {
  sessionStorage.removeItem(OPEN);
  setPanels(panels.length > 1 ? panels.slice(0, 1) : [...panels, new Panel("B", panels[0].settings)]);
});
byId("modes").addEventListener("change", fresh);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("play").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  showTip(null);
  if (running) running.abort();
});
