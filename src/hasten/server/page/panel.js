// A model with its settings and its output. There are two where settings or models are compared.
const engines = new Map();
const generates = (engine) => !engine || engine.tasks.includes("generate");
const mode = () => document.querySelector("[name=mode]:checked").value;
const TOP = 5;

async function* eventsOf(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function summary(reason, began, first, tokens) {
  const end = performance.now(), seconds = (end - began) / 1000;
  const rate = first && tokens > 1 ? `, first after ${number.format(first - began)} ms, ${short(tokens / seconds)} tokens/s` : "";
  return `${reason}: ${tokens} tokens in ${seconds.toFixed(2)} s${rate}`;
}

function scores(data, labels) {
  if (Array.isArray(data[0])) return `${data.length} tokens: ${data.map((row) => scores(row, labels)).join("; ")}`;
  if (!labels.length) return `${data.length} numbers: ${data.map((value) => value.toFixed(4)).join(", ")}`;
  return data.map((value, at) => `${labels[at]} ${value.toFixed(4)}`).join(", ");
}

class Panel {
  constructor(name, settings = {}, messages = []) {
    this.element = byId("panel").content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", `Settings ${name}`);
    const part = (selector) => this.element.querySelector(selector);
    [this.text, this.said, this.error, this.name] = [".text", ".said", ".error", ".name"].map(part);
    this.fields = Object.fromEntries([...this.element.querySelectorAll("[data-name]")].map((field) => [field.dataset.name, field]));
    for (const [field, element] of Object.entries(this.fields)) {
      element.id = `${field}-${name}`;
      element.previousElementSibling.htmlFor = element.id;
    }
    for (const [field, value] of Object.entries(settings)) if (this.fields[field]) this.fields[field].value = value;
    this.wanted = settings.model;
    this.messages = messages;
    this.labelled = name;
    shownTokens(this.text);
    this.fields.model.addEventListener("change", fit);
    this.code = part(".code");
    this.code.addEventListener("toggle", () => this.showCommand());
    this.render();
  }

  get engine() { return engines.get(this.fields.model.value); }

  get settings() { return Object.fromEntries(Object.entries(this.fields).map(([name, field]) => [name, field.value])); }

  offer(ids) {
    const select = this.fields.model;
    if (select.dataset.ids === ids.join("\n")) return;
    const chosen = select.value || this.wanted;
    select.replaceChildren(...ids.map((id) => make("option", { value: id, textContent: id })));
    if (ids.includes(chosen)) select.value = chosen;
    select.dataset.ids = ids.join("\n");
  }

  fit() {
    const writes = generates(this.engine), embeds = !writes && this.engine.tasks.includes("embed");
    for (const [name, field] of Object.entries(this.fields)) field.disabled = name !== "model" && !writes;
    this.text.classList.toggle("chat", writes && mode() === "chat");
    const shown = !writes ? (embeds ? "Vector" : "Scores") : mode() === "chat" ? "Chat" : "Completion";
    this.name.textContent = panels.length > 1 ? `${shown} ${this.labelled}` : shown;
    this.text.setAttribute("aria-label", this.name.textContent);
  }

  complain(message) {
    this.error.textContent = message;
    this.error.hidden = !message;
  }

  render() {
    if (!this.messages.length) return this.text.replaceChildren(make("span", { className: "empty", textContent: "Output appears here" }));
    this.text.replaceChildren(...this.messages.map((message) => make("div", { className: message.role }, message.element || message.content)));
    this.text.scrollTop = this.text.scrollHeight;
  }

  // The path and the body of a request for what stands in the form.
  request(prompt) {
    const { model, stop, ...numbers } = this.settings, chats = mode() === "chat", system = byId("system").value.trim();
    if (!generates(this.engine)) return ["/pooling", { model, input: prompt }];
    const body = { model, ...Object.fromEntries(Object.entries(numbers).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)])) };
    if (stop) body.stop = [stop];
    if (byId("probabilities").checked) Object.assign(body, chats ? { logprobs: true, top_logprobs: TOP } : { logprobs: TOP });
    if (!chats) return ["/v1/completions", { ...body, prompt }];
    const said = this.messages.map(({ role, content }) => ({ role, content }));
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: prompt }];
    return ["/v1/chat/completions", { ...body, messages }];
  }

  showCommand() {
    if (!this.code.open) return;
    const [path, body] = this.request(byId("prompt").value), quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
    const authorized = key.value.trim() ? ` -H "authorization: Bearer $API_KEY"` : "";
    this.code.querySelector("pre").textContent = `curl ${location.origin}${path} -H 'content-type: application/json'${authorized} -d '${quoted}'`;
  }

  async run(prompt, signal) {
    const [path, body] = this.request(prompt), before = this.messages;
    this.complain("");
    this.said.textContent = generates(this.engine) ? "generating…" : "computing…";
    this.text.classList.add("busy");
    try {
      const send = (more) => fetch(path, { method: "POST", signal, headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify({ ...body, ...more }) });
      await (path === "/pooling" ? this.pool(prompt, send) : this.generate(prompt, send));
    } catch (error) {
      this.messages = before;
      this.render();
      this.said.textContent = error.name === "AbortError" ? "stopped" : "";
      if (error.name !== "AbortError") this.complain(error instanceof TypeError ? GONE : error.message || String(error));
    } finally {
      this.text.classList.remove("busy");
    }
  }

  async generate(prompt, send) {
    const began = performance.now(), answer = new TokenText();
    const asked = { role: "user", content: prompt }, made = { role: "assistant", content: "", element: answer.element };
    let first = null, usage = null, pieces = 0, reason = "the stream broke off";
    try {
      const response = await send({ stream: true, stream_options: { include_usage: true } });
      if (!response.ok) throw new Error(await explained(response));
      for await (const data of eventsOf(response)) {
        if (data === "[DONE]") break;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        usage = event.usage || usage;
        for (const choice of event.choices) {
          const text = choice.text ?? choice.delta.content ?? "", thought = choice.delta?.reasoning_content ?? "";
          if (choice.finish_reason) reason = choice.finish_reason === "length" ? "max tokens reached" : "finished";
          if (!text && !thought) continue;
          if (!first) this.messages = mode() === "chat" ? [...this.messages, asked, made] : [asked, made];
          if (!first) this.render();
          first = first || performance.now();
          pieces += 1;
          if (thought) answer.think(thought);
          if (text) answer.add(text, tokensOf(choice));
        }
        this.text.scrollTop = this.text.scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError" || !first) throw error;
      reason = "stopped";
    }
    made.content = answer.text;
    this.said.textContent = summary(reason, began, first, usage ? usage.completion_tokens : pieces);
  }

  async pool(prompt, send) {
    const began = performance.now(), response = await send({});
    if (!response.ok) throw new Error(await explained(response));
    const { data, usage } = await response.json(), labels = this.engine.labels;
    this.messages = [{ role: "user", content: prompt }, { role: "assistant", content: scores(data[0].data, labels) }];
    this.render();
    this.said.textContent = `finished: ${usage.prompt_tokens} tokens in ${((performance.now() - began) / 1000).toFixed(2)} s`;
  }
}
