// Plots of the last minute.
const SPAN = 60;
class Plot {
  constructor(title, unit, names = [], fixed = 0) {
    this.unit = unit;
    this.fixed = fixed;
    this.samples = [];
    this.now = make("span", { className: "now" });
    this.most = make("span");
    this.svg = draw("svg", { viewBox: `0 0 ${SPAN} 64`, preserveAspectRatio: "none", role: "img", "aria-label": title });
    for (const y of [1, 32, 63]) this.svg.append(draw("line", { class: "grid", x1: 0, x2: SPAN, y1: y, y2: y, "vector-effect": "non-scaling-stroke" }));
    this.area = draw("path", { class: "area" });
    this.lines = [draw("path", { class: "line" })];
    if (names.length > 1) this.lines.push(draw("path", { class: "line second" }));
    this.hair = draw("line", { class: "hair", y1: 0, y2: 64, visibility: "hidden" });
    this.svg.append(this.area, ...this.lines, this.hair);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => { this.at = null; this.show(); });
    const keys = names.map((name, place) => make("span", { className: place ? "key second" : "key", textContent: name }));
    this.element = make("div", {},
      make("div", { className: "plot-head" }, make("h3", { textContent: title }), ...keys, this.now),
      this.svg,
      make("div", { className: "scale" }, make("span", { textContent: `${SPAN} s ago` }), this.most, make("span", { textContent: "now" })));
  }
  add(time, ...values) {
    this.samples.push([time, ...values]);
    while (this.samples.length && this.samples[0][0] < time - SPAN) this.samples.shift();
    this.show();
  }
  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.at = ((event.clientX - box.left) / box.width) * SPAN;
    this.show();
  }
  show() {
    if (!this.samples.length) return;
    const end = this.samples[this.samples.length - 1][0];
    const most = this.fixed || nice(Math.max(1, ...this.samples.flatMap((sample) => sample.slice(1))));
    const x = (sample) => SPAN - (end - sample[0]), y = (value) => 63 - (62 * Math.min(value, most)) / most;
    this.lines.forEach((line, place) => {
      line.setAttribute("d", "M" + this.samples.map((sample) => `${x(sample).toFixed(2)} ${y(sample[place + 1]).toFixed(2)}`).join("L"));
    });
    const last = this.samples[this.samples.length - 1];
    this.area.setAttribute("d", `${this.lines[0].getAttribute("d")}L${SPAN} 63L${x(this.samples[0]).toFixed(2)} 63Z`);
    const near = (best, sample) => (Math.abs(x(sample) - this.at) < Math.abs(x(best) - this.at) ? sample : best);
    const shown = this.at == null ? last : this.samples.reduce(near);
    this.hair.setAttribute("visibility", this.at == null ? "hidden" : "visible");
    for (const end_ of ["x1", "x2"]) this.hair.setAttribute(end_, x(shown));
    const ago = this.at == null ? "" : `, ${Math.round(end - shown[0])} s ago`;
    this.now.replaceChildren(shown.slice(1).map(short).join(" / "), make("small", { textContent: ` ${this.unit}${ago}` }));
    const idle = !this.fixed && this.samples.every((sample) => sample.slice(1).every((value) => value === 0));
    this.most.textContent = idle ? "idle" : `0 to ${short(most)}${this.fixed ? " " + this.unit : ""}`;
    this.svg.setAttribute("aria-label", `${this.element.querySelector("h3").textContent}: ${last.slice(1).map(short).join(" and ")} ${this.unit}`);
  }
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
