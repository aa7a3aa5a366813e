// What everything else uses: elements, numbers, the API key, and errors in words.
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const GONE = "the server cannot be reached; is it running?";
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = (value) => (value >= 100 || Number.isInteger(value) ? number.format(value) : value.toFixed(1));

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// The key is kept for as long as the tab is open, and nowhere else.
const key = byId("key");
key.value = sessionStorage.getItem("hasten-key") || "";
key.addEventListener("change", () => { sessionStorage.setItem("hasten-key", key.value.trim()); look(); });
byId("keybox").addEventListener("submit", (event) => { event.preventDefault(); key.blur(); });
const headers = () => (key.value.trim() ? { authorization: "Bearer " + key.value.trim() } : {});

async function explained(response) {
  let said = `The server answered ${response.status}`;
  try {
    const body = await response.json();
    const error = body.error && body.error.message ? body.error.message : body.error;
    if (error) said = `${error} (${response.status})`;
  } catch { /* no JSON: the status must do */ }
  const wait = response.headers.get("retry-after");
  if (response.status === 401) return `The server asks for an API key (401); ${key.value ? "it does not know this one" : "enter it at the top"}`;
  return wait ? `${said}; try again in ${wait} s` : said;
}
