// The server's live state: a card per engine, and the models that have none.
const EVERY = 1000;
const cards = new Map();
class Card {
  constructor(model) {
    this.dot = make("span", { className: "dot" });
    this.about = make("span", { className: "about" });
    this.rate = new Plot("Tokens/s", generates(model) ? "out" : "in", []);
    this.queue = new Plot("Requests", "", ["running", "waiting"]);
    this.cache = new Plot("KV cache in use", "%", [], 100);
    this.facts = {};
    const facts = ["Tokens in", "Tokens out", "Prefix hits", "Preemptions", "Steps", "Cache blocks"].map((name) => {
      this.facts[name] = make("dd", { textContent: "–" });
      return make("div", {}, make("dt", { textContent: name }), this.facts[name]);
    });
    this.element = make("article", { className: "card" },
      make("div", { className: "model-head" }, this.dot, make("h2", { textContent: model.id }), this.about),
      make("div", { className: "plots" }, this.rate.element, this.queue.element, this.cache.element),
      make("dl", {}, ...facts));
  }
  take(time, model) {
    const before = this.before, done = generates(model) ? model.generation_tokens : model.prompt_tokens;
    this.dot.className = "dot " + (model.ready ? "good" : "bad");
    this.about.textContent = model.ready ? `${model.type}, ${model.dtype} on ${model.device}, up to ${number.format(model.max_model_len)} tokens${model.replicas > 1 ? `, ${model.replicas_ready} of ${model.replicas} replicas` : ""}` : "restarting…";
    if (before && time > before.time) {
      this.rate.add(time, Math.max(0, (done - before.done) / (time - before.time)));
    } else if (!before) {
      this.rate.add(time, 0);
    }
    this.before = { time, done };
    this.queue.add(time, model.running, model.waiting);
    this.cache.add(time, model.num_blocks ? (100 * model.used_blocks) / model.num_blocks : 0);
    const hits = model.prefix_query_tokens ? `${short((100 * model.prefix_hit_tokens) / model.prefix_query_tokens)} %` : "–";
    const facts = [number.format(model.prompt_tokens), number.format(model.generation_tokens), hits,
      number.format(model.preemptions), number.format(model.steps), `${number.format(model.used_blocks)} of ${number.format(model.num_blocks)}`];
    Object.values(this.facts).forEach((fact, place) => { fact.textContent = facts[place]; });
  }
}

function forgetState() {
  for (const card of cards.values()) {
    card.dot.className = "dot";
    card.about.textContent = "its state is not known now";
  }
  for (const dot of byId("others").querySelectorAll(".dot")) dot.className = "dot";
  for (const why of byId("others").querySelectorAll(".why")) why.textContent = "not known now";
}

function showState(state) {
  const present = new Set(state.engines.map((engine) => engine.id));
  engines.clear();
  for (const engine of state.engines) engines.set(engine.id, engine);
  for (const [id, card] of cards) if (!present.has(id)) { card.element.remove(); cards.delete(id); }
  for (const engine of state.engines) {
    if (!cards.has(engine.id)) {
      cards.set(engine.id, new Card(engine));
      byId("models").append(cards.get(engine.id).element);
    }
    cards.get(engine.id).take(state.time, engine);
  }
  fit();
  byId("others-card").hidden = !state.others.length;
  byId("others-card").style.marginTop = cards.size ? "18px" : "0";
  byId("others").replaceChildren(...state.others.map((model) => make("li", {},
    make("span", { className: "dot " + (model.state === "READY" ? "good" : model.state === "UNAVAILABLE" ? "bad" : "") }),
    make("span", { textContent: `${model.name}${model.version ? " " + model.version : ""}` }),
    make("span", { className: "why", textContent: [model.state.toLowerCase() || "not loaded", model.reason].filter(Boolean).join(": ") }))));
}

function serverIs(kind, text) {
  byId("server-dot").className = "dot " + kind;
  if (byId("server-text").textContent !== text) byId("server-text").textContent = text;
}

async function look() {
  try {
    const response = await fetch("/state", { headers: headers(), cache: "no-store" });
    if (!response.ok) forgetState();
    if (!response.ok) return serverIs("bad", response.status === 401 ? "an API key is needed" : await explained(response));
    const state = await response.json();
    showState(state);
    const ready = state.engines.filter((engine) => engine.ready).length;
    if (!state.engines.length) serverIs("", "no model is loaded");
    else if (ready === state.engines.length) serverIs("good", ready === 1 ? "ready" : `${ready} models ready`);
    else serverIs("bad", `${ready} of ${state.engines.length} models ready`);
  } catch {
    forgetState();
    serverIs("bad", GONE);
  }
}

setPanels([new Panel("A")]);
const open = kept().find((entry) => entry.id === sessionStorage.getItem(OPEN));
if (open) restore(open);
list();
look();
setInterval(() => { if (!document.hidden) look(); }, EVERY);
