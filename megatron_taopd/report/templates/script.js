"use strict";
// Values under the pointer, and steps by the arrow keys. All that is shown is in the page without this script.
(() => {
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");

  const put = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const place = (x, y) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    const top = y + 18 + box.height > innerHeight ? y - 14 - box.height : y + 18;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };
  const hide = () => { tip.hidden = true; };
  const show = (value, percent) => {
    if (value === null) return "–";
    if (percent) return `${(value * 100).toPrecision(4).replace(/\.?0+$/, "")} %`;
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return (size >= 1e7 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)))).replace("-", "−");
  };

  for (const figure of document.querySelectorAll("figure[tabindex]")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg");
    const cross = svg.querySelector(".cross");
    const left = Number(cross.dataset.left), right = Number(cross.dataset.right);
    const scale = (v) => (data.log ? Math.log(v) : v);
    const pixel = (v) => left + (scale(v) - scale(data.low)) / (scale(data.high) - scale(data.low)) * (right - left);
    const pixels = data.x.map(pixel);
    let at = -1;
    const point = (index) => {
      at = Math.max(0, Math.min(data.x.length - 1, index));
      cross.setAttribute("x1", pixels[at]);
      cross.setAttribute("x2", pixels[at]);
      cross.classList.add("on");
      tip.replaceChildren(put("b", `${data.label} ${show(data.x[at], false)}`));
      const table = put("table");
      for (const one of data.series) {
        const row = put("tr"), name = put("th");
        name.append(put("span", undefined, `swatch ${one.colour}`), one.name);
        row.append(name, put("td", show(one.y[at], data.percent)));
        if (one.low) row.append(put("td", `${show(one.low[at], data.percent)} to ${show(one.high[at], data.percent)}`));
        table.append(row);
      }
      tip.append(table);
    };
    const leave = () => { cross.classList.remove("on"); hide(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      let best = 0;
      pixels.forEach((p, i) => { if (Math.abs(p - x) < Math.abs(pixels[best] - x)) best = i; });
      point(best);
      place(event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", leave);
    figure.addEventListener("blur", leave);
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") leave();
      if (!step) return;
      event.preventDefault();
      point(at < 0 ? 0 : at + step);
      const box = svg.getBoundingClientRect();
      place(box.left + pixels[at] / svg.viewBox.baseVal.width * box.width, box.top + 20);
      said.textContent = tip.innerText;
    });
  }

  let current = null;
  const look = (token) => {
    if (current) current.classList.remove("on");
    current = token;
    if (!token) return hide();
    if (token.title) { token.dataset.title = token.title; token.removeAttribute("title"); }
    token.classList.add("on");
    tip.replaceChildren(put("b", `“${token.textContent}” ${token.localName === "b" ? "kept" : "not kept"}`));
    tip.append(put("br"), token.dataset.title);
    const box = token.getBoundingClientRect();
    place(box.left - 12, box.bottom - 8);
  };
  for (const text of document.querySelectorAll(".tokens")) {
    text.addEventListener("pointerover", (event) => look(event.target.closest("i, b")));
    text.addEventListener("pointerleave", () => look(null));
    text.addEventListener("blur", () => look(null));
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") look(null);
      if (!step) return;
      event.preventDefault();
      const tokens = [...text.querySelectorAll("i, b")];
      const next = current ? tokens.indexOf(current) + step : 0;
      look(tokens[Math.max(0, Math.min(tokens.length - 1, next))]);
      said.textContent = tip.innerText;
    });
  }
  addEventListener("scroll", hide, { passive: true });

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));
})();
