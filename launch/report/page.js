"use strict";
const plots = JSON.parse(document.getElementById("points").textContent);
const names = JSON.parse(document.getElementById("names").textContent);
const shown = names.map(() => true);
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

document.querySelectorAll("nav button").forEach((button, run) => {
  button.addEventListener("click", () => {
    shown[run] = !shown[run];
    button.setAttribute("aria-pressed", shown[run]);
    document.querySelectorAll(".r" + run).forEach((part) => { part.style.display = shown[run] ? "" : "none"; });
  });
});

const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
function text(value) {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  return value && (size < 1e-3 || size >= 1e7) ? value.toExponential(2) : plain.format(value);
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

function point(svg, event) {
  const plot = plots[svg.id], box = svg.getBoundingClientRect(), [low, high, left, right] = plot.x;
  const share = ((event.clientX - box.left) / box.width - left) / (right - left);
  const x = low + Math.min(1, Math.max(0, share)) * (high - low);
  const rows = [];
  let at = null;
  for (const [run, [xs, ys, lows, highs]] of Object.entries(plot.runs)) {
    if (!shown[run]) continue;
    const i = nearest(xs, x);
    if (at === null || Math.abs(xs[i] - x) < Math.abs(at - x)) at = xs[i];
    rows.push([run, xs[i], text(ys[i]) + (lows ? ` (${text(lows[i])} to ${text(highs[i])})` : "")]);
  }
  if (at === null) return leave(svg);
  const line = svg.querySelector(".pointer"), width = svg.viewBox.baseVal.width;
  const place = width * (left + (at - low) / (high - low) * (right - left));
  line.setAttribute("x1", place);
  line.setAttribute("x2", place);
  line.style.visibility = "visible";
  const table = document.createElement("table");
  for (const [run, where, value] of rows) {
    const row = table.insertRow();
    const key = document.createElement("span");
    key.className = "key r" + run;
    key.style.background = "var(--run)";
    row.insertCell().append(key, names[run]);
    row.insertCell().textContent = text(Math.round(where * 100) / 100);
    row.insertCell().textContent = value;
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 12;
  tip.style.left = Math.min(room, event.clientX + 16) + scrollX + "px";
  tip.style.top = event.clientY + 18 + scrollY + "px";
}

function leave(svg) {
  svg.querySelector(".pointer").style.visibility = "hidden";
  tip.hidden = true;
}

document.querySelectorAll("svg.plot").forEach((svg) => {
  svg.addEventListener("pointermove", (event) => point(svg, event));
  svg.addEventListener("pointerleave", () => leave(svg));
});
document.querySelectorAll(".pictures img").forEach((picture) => {
  picture.addEventListener("click", () => picture.classList.toggle("whole"));
});
