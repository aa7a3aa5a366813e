// Text that grows token by token; with log-probabilities, each token shows what it was chosen from.
const OF_PROBABILITY = [[0.9, "p4"], [0.5, "p3"], [0.2, "p2"], [0, "p1"]];
const percent = (logprob) => 100 * Math.exp(logprob);
const percents = (logprob) => `${percent(logprob).toFixed(percent(logprob) < 10 ? 1 : 0)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

// A choice's tokens as [text, logprob, [[text, logprob], …]], of either API; null where they do not add up to its text.
function tokensOf(choice) {
  const found = choice.logprobs, text = choice.text ?? (choice.delta && choice.delta.content) ?? "";
  if (!found) return null;
  const tokens = found.content
    ? found.content.map((token) => [token.token, token.logprob, token.top_logprobs.map((top) => [top.token, top.logprob])])
    : found.tokens.map((token, at) => [token, found.token_logprobs[at], Object.entries(found.top_logprobs[at] || {})]);
  return tokens.map(([part]) => part).join("") === text ? tokens : null;
}

class TokenText {
  constructor() {
    this.element = make("span");
    this.text = "";
  }
  // Reasoning stands above the answer, may be folded, and is no part of the text.
  think(text) {
    if (!this.thoughts) {
      this.thoughts = make("span");
      this.element.prepend(make("details", { className: "reasoning", open: true }, make("summary", { textContent: "Reasoning" }), this.thoughts));
    }
    this.thoughts.append(text);
  }
  add(text, tokens) {
    this.text += text;
    if (!tokens) return this.element.append(text);
    for (const [part, logprob, top] of tokens) {
      const bucket = OF_PROBABILITY.find(([least]) => Math.exp(logprob) >= least)[1];
      this.element.append(Object.assign(make("span", { className: `token ${bucket}`, textContent: part }), { chosen: [part, logprob, top] }));
    }
  }
}

const tip = byId("tip");
function showTip(token) {
  document.querySelector(".token.at")?.classList.remove("at");
  tip.hidden = !token;
  if (!token) return;
  token.classList.add("at");
  const [part, logprob, top] = token.chosen;
  const rows = top.some(([other]) => other === part) ? top : [[part, logprob], ...top];
  rows.sort((one, other) => other[1] - one[1]);
  tip.replaceChildren(...rows.map(([text, value]) => make("div", { className: text === part ? "chosen" : "" },
    make("span", { textContent: visible(text) }), make("meter", { max: 100, value: percent(value) }), make("span", { textContent: percents(value) }))));
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + scrollX}px`;
  tip.style.top = `${(box.bottom + tip.offsetHeight + 8 < innerHeight ? box.bottom + 4 : box.top - tip.offsetHeight - 4) + scrollY}px`;
  return rows.map(([text, value]) => `${visible(text)} ${percents(value)}`).join(", ");
}

// Arrow keys walk through the tokens of the output that has the focus.
function walk(event) {
  const tokens = [...event.currentTarget.querySelectorAll(".token")], at = tokens.findIndex((token) => token.classList.contains("at"));
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !tokens.length) return;
  event.preventDefault();
  const next = tokens[at < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.max(0, Math.min(tokens.length - 1, at + step))];
  next.scrollIntoView({ block: "nearest" });
  byId("spoken").textContent = showTip(next);
}

function shownTokens(element) {
  element.addEventListener("pointerover", (event) => showTip(event.target.closest(".token")));
  element.addEventListener("pointerleave", () => showTip(null));
  element.addEventListener("blur", () => showTip(null));
  element.addEventListener("keydown", walk);
}
