"use strict";
(() => {
  const parsed = id => JSON.parse(document.getElementById(id).textContent);
  const {modules, groups, sizes, threshold, units, words, hasEffects} = parsed("data");
  const count = units.module.length, hasGroups = groups.length > 1;
  // Okabe and Ito's colours, which colour-blind people tell apart.
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#7f7f7f"];
  const colour = group => COLOURS[group % COLOURS.length];
  const PER_PAGE = 50;
  const byId = id => document.getElementById(id);

  function el(tag, attributes, ...children) {
    const svg = ["svg", "g", "rect", "line", "text", "circle", "title"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "onclick") element.addEventListener("click", value);
      else if (name === "style") element.style.cssText = value;
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter(child => child !== null));
    return element;
  }

  const percent = share => share === 0 ? "0" : share < 0.001 ? `${(share * 100).toPrecision(1)} %` :
    share < 0.1 ? `${(share * 100).toFixed(2)} %` : share < 0.9995 ? `${(share * 100).toFixed(1)} %` : "100 %";
  const short = number => number === null ? "–" : Math.abs(number) >= 1e5 ? number.toExponential(1) :
    String(Number(number.toPrecision(3))).replace("-", "−");
  const signed = number => (number > 0 ? "+" : "") + short(Number(number.toPrecision(2)));
  const visible = token => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "∅";
  const nameOf = unit => `${modules[units.module[unit]]}:${units.index[unit]}`;
  const chip = group => el("span", {class: "chip", style: `--colour: ${colour(group)}`}, groups[group]);
  const tokenOf = word => word < 0 ? "–" : el("span", {class: "token", title: words[word]}, visible(words[word]));
  const layerOf = module => {
    const found = modules[module].match(/(?:^|\.)(\d+)(?:\.|$)/);
    return found ? Number(found[1]) : null;
  };
  const kindOf = module => modules[module].split(".").filter(part => !/^\d+$/.test(part)).join(".") || modules[module];
  const kinds = [...new Set(modules.map((_, module) => kindOf(module)))];
  const isBeyond = unit => units.z[unit] > threshold;

  // ---- the head, and the pictures of all units

  byId("groups").append(...groups.flatMap((group, i) => [chip(i), `${sizes[i]} texts `]));

  function densities() {
    const lowest = -6, perDecade = 4;
    const bins = new Array(-lowest * perDecade).fill(0);
    let dead = 0;
    for (const density of units.density) {
      if (density === 0) dead += 1;
      else bins[Math.max(0, Math.min(bins.length - 1, Math.floor((Math.log10(density) - lowest) * perDecade)))] += 1;
    }
    const most = Math.max(1, dead, ...bins), height = 190, bottom = 150, left = 56;
    const width = Math.min(420, byId("densities").clientWidth);
    const step = (width - left - 4) / bins.length;
    const bar = (x, w, value, fill, title) => {
      const h = value ? Math.max(1.5, value / most * (bottom - 24)) : 0;
      return el("rect", {x, y: bottom - h, width: w, height: h, fill}, el("title", {}, title));
    };
    const svg = el("svg", {viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${dead} of ${count} units are dead; the others by density`});
    svg.append(bar(8, 28, dead, "#d55e00", `${dead} dead`),
      el("text", {x: 22, y: bottom + 16, "text-anchor": "middle"}, "dead"),
      el("text", {x: 22, y: bottom - Math.max(1.5, dead / most * (bottom - 24)) - 4, "text-anchor": "middle"},
        String(dead)));
    bins.forEach((value, i) => {
      const from = 10 ** (lowest + i / perDecade), to = 10 ** (lowest + (i + 1) / perDecade);
      svg.append(bar(left + i * step + .5, step - 1, value, "#0072b2", `${value} from ${percent(from)} to ${percent(to)}`));
    });
    svg.append(el("line", {x1: left, x2: width - 4, y1: bottom, y2: bottom, stroke: "#57606a"}));
    for (let decade = lowest; decade <= 0; decade += 2) {
      const label = {"-6": "≤ 0.0001 %", "-4": "0.01 %", "-2": "1 %", "0": "100 %"}[decade];
      svg.append(el("text", {x: left + (decade - lowest) * perDecade * step, y: bottom + 16,
        "text-anchor": decade === lowest ? "start" : decade === 0 ? "end" : "middle"}, label));
    }
    svg.append(el("text", {x: (left + width) / 2, y: bottom + 34, "text-anchor": "middle", class: "axis"},
      "density"), el("text", {x: left, y: 14, class: "axis"}, `units, ${most} at most`));
    byId("densities").replaceChildren(svg);
  }

  const firstOf = [];  // the number of each module's first unit
  units.module.forEach((module, unit) => { if (firstOf[module] === undefined) firstOf[module] = unit; });
  firstOf.push(count);

  function map() {
    const canvas = byId("map"), context = canvas.getContext("2d");
    const rows = [...new Set(modules.map((_, module) => layerOf(module)))].sort((a, b) => (a ?? 1e9) - (b ?? 1e9));
    const left = 34, top = 20, gap = 8, rowHeight = rows.length > 16 ? 16 : 22;
    const most = Math.max(...modules.map((_, module) => firstOf[module + 1] - firstOf[module]));
    const lines = most > 16 ? 2 : 1;
    const room = Math.max(64, (canvas.closest("figure").clientWidth - left - 4) / kinds.length - gap);
    const across = Math.min(Math.ceil(most / lines), Math.max(8, Math.floor(room / 4)));
    const cell = Math.min(22, Math.max(4, Math.floor(room / across)));
    const column = Math.max(across * cell + gap, 64);
    const width = left + kinds.length * column, height = top + rows.length * rowHeight + 4;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    context.scale(ratio, ratio);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    const places = [];
    kinds.forEach((kind, i) => {
      context.fillStyle = "#1b1f24";
      context.fillText(kind.split(".").pop(), left + i * column, 10, column - 4);
    });
    rows.forEach((layer, i) => {
      context.fillStyle = "#57606a";
      if (rows.length <= 16 || i % 5 === 0) context.fillText(layer ?? "–", 4, top + (i + .5) * rowHeight);
    });
    modules.forEach((_, module) => {
      const first = firstOf[module], size = firstOf[module + 1] - first;
      const slots = Math.min(size, across * lines), perLine = Math.ceil(slots / lines);
      const h = Math.floor((rowHeight - 4) / lines);
      const x0 = left + kinds.indexOf(kindOf(module)) * column;
      const y0 = top + rows.indexOf(layerOf(module)) * rowHeight + 2;
      const best = new Array(slots).fill(-1);
      for (let i = 0; i < size; i++) {
        const slot = Math.floor(i * slots / size), unit = first + i, other = best[slot];
        if (units.density[unit] && (other < 0 || worth(unit) > worth(other))) best[slot] = unit;
      }
      best.forEach((unit, slot) => {
        const x = x0 + slot % perLine * cell, y = y0 + Math.floor(slot / perLine) * h;
        context.globalAlpha = 1;
        context.fillStyle = unit < 0 ? "#fff" : "#e4e8ec";
        context.fillRect(x, y, cell - 1, h - 1);
        if (unit < 0) {
          context.strokeStyle = "#c4cbd2"; context.lineWidth = 1;
          context.strokeRect(x + .5, y + .5, cell - 2, h - 2);
        } else if (!hasGroups || isBeyond(unit)) {
          context.globalAlpha = .15 + .85 * (hasGroups ? units.selectivity[unit] : units.density[unit]);
          context.fillStyle = colour(units.group[unit]);
          context.fillRect(x, y, cell - 1, h - 1);
        }
        if (unit >= 0) places.push([x, y, unit]);
      });
      context.globalAlpha = 1;
    });
    const at = event => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      const height = Math.floor((rowHeight - 4) / lines);
      const found = places.find(([left, top]) => x >= left && x < left + cell && y >= top && y < top + height);
      return found ? found[2] : null;
    };
    canvas.onclick = event => { const unit = at(event); if (unit !== null) show(unit, true); };
    canvas.onmousemove = event => {
      const unit = at(event);
      canvas.title = unit === null ? "" : !hasGroups ? `${nameOf(unit)}: density ${percent(units.density[unit])}` :
        `${nameOf(unit)}: prefers ${groups[units.group[unit]]}, selectivity ${units.selectivity[unit].toFixed(2)}` +
        (isBeyond(unit) ? "" : " (not beyond chance)");
    };
    const merged = most > across * lines ? ` A square stands for several units and shows the ${hasGroups ? "most selective" : "densest"}.` : "";
    const preferring = new Array(groups.length).fill(0);
    for (let unit = 0; unit < count; unit++) if (isBeyond(unit)) preferring[units.group[unit]] += 1;
    const shades = hasGroups ? [...groups.flatMap((_, i) => [chip(i), ` ${preferring[i].toLocaleString("en")} units, `]),
      el("span", {class: "chip", style: "--colour: #e4e8ec"}, "not beyond chance"), " "] : [];
    byId("legend").replaceChildren("Layers from top to bottom, a square for each unit, the darker the ",
      hasGroups ? "more selective: " : "denser; ", ...shades, el("span", {class: "chip"}, "dead"),
      `.${merged} Choose one to open it.`);
  }
  const worth = unit => hasGroups ? (isBeyond(unit) ? 1 : 0) + units.selectivity[unit] : units.density[unit];

  // ---- the list

  const COLUMNS = [
    ["Unit", "module", "left"],
    ...(hasGroups ? [["Selectivity", "selectivity"], ["Prefers", "group", "left"]] : []),
    ["Strongest on", "token", "left"], ["Density", "density"],
    ...(hasEffects ? [["Effect", "effect"]] : []), ["Raises", "raises", "left"],
    ...(hasGroups ? [["z", "z"]] : []), ["Largest", "largest"], ["‖sb‖", "norm"],
  ];
  const state = {by: hasGroups ? "selectivity" : "density", down: true, page: 0, rows: [], chosen: null};

  function value(unit, by) {
    if (by === "module") return unit;
    if (by === "selectivity") return worth(unit);
    if (by === "effect") return units.effect[unit] === null ? -1 : Math.abs(units.effect[unit]);
    if (by === "token" || by === "raises") return units[by][unit] < 0 ? "" : words[units[by][unit]].trim().toLowerCase();
    return units[by][unit];
  }

  function select() {
    const wanted = byId("search").value.trim().toLowerCase(), kind = byId("kind").value;
    const group = byId("prefers").value, beyond = byId("beyond").checked, dead = byId("dead").checked;
    const has = new Uint8Array(words.length);
    if (wanted) words.forEach((word, i) => { has[i] = word.toLowerCase().includes(wanted) ? 1 : 0; });
    const rows = [];
    for (let unit = 0; unit < count; unit++) {
      if (!dead && units.density[unit] === 0) continue;
      if (beyond && !isBeyond(unit)) continue;
      if (group !== "" && units.group[unit] !== Number(group)) continue;
      if (kind !== "" && kindOf(units.module[unit]) !== kind) continue;
      if (wanted && !has[units.token[unit]] && !has[units.raises[unit]] &&
          !nameOf(unit).toLowerCase().includes(wanted)) continue;
      rows.push(unit);
    }
    const keys = new Map(rows.map(unit => [unit, value(unit, state.by)]));
    const sign = state.down ? -1 : 1;
    rows.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      return x === y ? units.z[b] - units.z[a] || a - b : sign * (x < y ? -1 : 1);
    });
    state.rows = rows;
    state.page = 0;
    list();
  }

  function list() {
    const pages = Math.max(1, Math.ceil(state.rows.length / PER_PAGE));
    const shown = state.rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    const dead = units.density.reduce((sum, density) => sum + (density === 0), 0);
    byId("count").textContent = `${state.rows.length.toLocaleString("en")} of ${count.toLocaleString("en")} units` +
      ` (${dead.toLocaleString("en")} dead)`;
    byId("page").textContent = `Page ${state.page + 1} of ${pages}`;
    byId("back").disabled = state.page === 0;
    byId("forth").disabled = state.page >= pages - 1;
    byId("units").tHead.replaceChildren(el("tr", {}, ...COLUMNS.map(([title, by, side]) => el("th", {
      class: side || null, scope: "col", "aria-sort": state.by !== by ? null : state.down ? "descending" : "ascending",
    }, el("button", {type: "button", onclick: () => {
      state.down = state.by === by ? !state.down : side !== "left";
      state.by = by;
      select();
    }}, title + (state.by !== by ? "" : state.down ? " ▾" : " ▴"))))));
    byId("units").tBodies[0].replaceChildren(...shown.map(row));
  }

  function row(unit) {
    const cells = {
      module: () => el("button", {type: "button", class: "name"}, nameOf(unit)),
      token: () => tokenOf(units.token[unit]),
      density: () => percent(units.density[unit]),
      group: () => units.group[unit] < 0 ? "–" : chip(units.group[unit]),
      selectivity: () => units.density[unit] === 0 ? "–" : units.selectivity[unit].toFixed(2) + (isBeyond(unit) ? "" : " (chance)"),
      z: () => units.density[unit] === 0 ? "–" : units.z[unit].toFixed(1),
      effect: () => units.effect[unit] === null ? "–" : signed(units.effect[unit] * 1000),
      raises: () => tokenOf(units.raises[unit]),
      largest: () => short(units.largest[unit]),
      norm: () => short(units.norm[unit]),
    };
    return el("tr", {"aria-current": state.chosen === unit ? "true" : null, onclick: () => show(unit, true)},
      ...COLUMNS.map(([, by, side]) => el("td", {class: side || null}, cells[by]())));
  }

  // ---- the panel of a unit

  const details = [];  // by module, parsed when first asked for
  let texts = null;

  function show(unit, scroll) {
    state.chosen = unit;
    history.replaceState(null, "", `#${encodeURIComponent(nameOf(unit))}`);
    const module = units.module[unit];
    details[module] ||= parsed(`details-${module}`);
    texts ||= parsed("texts");
    const panel = byId("panel"), place = state.rows.indexOf(unit);
    const step = (title, by) => {
      const other = place < 0 ? undefined : state.rows[place + by];
      return el("button", {type: "button", disabled: other === undefined, onclick: () => show(other, false)}, title);
    };
    panel.replaceChildren(
      el("h2", {}, nameOf(unit)),
      el("div", {class: "steps"}, step("◂ in the list", -1), step("▸ in the list", 1),
        el("button", {type: "button", onclick: () => byId("list").scrollIntoView()}, "List")),
      el("dl", {class: "numbers"}, ...[
        ["density", percent(units.density[unit])],
        ...(hasGroups ? [["selectivity", units.selectivity[unit].toFixed(2)], ["z", units.z[unit].toFixed(1)]] : []),
        ["largest latent", short(units.largest[unit])], ["norm of s b", short(units.norm[unit])],
      ].map(([title, number]) => el("div", {}, el("dt", {}, title), el("dd", {}, number)))),
    );
    const found = details[module][unit - firstOf[module]];
    if (units.density[unit] === 0) {
      panel.append(el("p", {class: "note"}, "This unit is dead here: it fires on no token of these texts."));
    }
    if (found === null) {
      panel.append(el("p", {class: "note"}, "Its panel is left out to keep this page small; units.jsonl has it."));
    } else {
      filled(panel, unit, found);
    }
    list();
    if (place >= 0 && Math.floor(place / PER_PAGE) !== state.page) {
      state.page = Math.floor(place / PER_PAGE);
      list();
    }
    panel.scrollTop = 0;
    if (scroll && getComputedStyle(panel).position !== "sticky") panel.scrollIntoView();
    if (scroll) panel.focus({preventScroll: true});
  }

  function filled(panel, unit, found) {
    const [histogram, rates, chance, lens, writes, ablation, provenance, near, [strongest, drawn]] = found;
    if (provenance) {
      panel.append(el("p", {}, el("strong", {}, "Made by rows "),
        provenance.map(([name]) => name).join(", "), " of the training data, counted from 0, the strongest first."));
    }
    panel.append(el("h3", {}, hasGroups ? "Groups beside chance" : "How often it fires"), forest(rates, chance));
    if (ablation) panel.append(effects(ablation));
    if (units.density[unit] !== 0) {
      panel.append(el("h3", {}, "Examples where it is strongest"),
        ...strongest.map(example => exampleOf(unit, example)));
      if (drawn.length) {
        panel.append(el("h3", {}, "Drawn from all texts in which it fires"),
          ...drawn.map(example => exampleOf(unit, example)));
      }
      panel.append(el("h3", {}, "Strength on the tokens where it fires"), bars(histogram));
    }
    panel.append(el("h3", {}, "What it writes"));
    if (lens) panel.append(el("div", {class: "pair"}, logits("Raises", lens[0], "#0072b2"), logits("Lowers", lens[1], "#d55e00")));
    else panel.append(el("p", {class: "soft"}, writes ? "Nothing here: it never fires, or the model's unembedding was not found." :
      "Logits: not applicable, as the layer's output is not added to the residual stream."));
    panel.append(el("h3", {}, "Alike"), el("div", {class: "pair"}, alike("Reads alike (A)", near[0]), alike("Writes alike (B)", near[1])));
  }

  function forest(rates, chance) {
    const parts = [["texts", 0, chance[0]], ["tokens", 3, chance[1]]];
    return el("div", {class: "pair pictures"}, ...parts.map(([what, at, expected]) => {
      const rowHeight = 26, width = 290, left = 92, right = 58, height = groups.length * rowHeight + 24;
      const most = Math.max(expected, ...rates.map(rate => rate[at + 2]));
      const end = [.001, .002, .005, .01, .02, .05, .1, .2, .5].find(share => share >= most) || 1;
      const x = share => left + share / end * (width - left - right);
      const svg = el("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": groups.map((group, i) =>
        `${group}: fires on ${percent(rates[i][at])} of ${what}`).join("; ") + `; chance ${percent(expected)}`});
      rates.forEach((rate, i) => {
        const y = i * rowHeight + 15, [middle, low, high] = rate.slice(at, at + 3);
        const name = groups[i].length > 14 ? `${groups[i].slice(0, 13)}…` : groups[i];
        svg.append(el("text", {x: 0, y: y + 4}, name, el("title", {}, groups[i])),
          el("line", {x1: x(0), x2: x(end), y1: y, y2: y, stroke: "#d0d7de"}),
          el("line", {x1: x(low), x2: x(high), y1: y, y2: y, stroke: colour(i), "stroke-width": 4},
            el("title", {}, `95 % interval: ${percent(low)} to ${percent(high)}`)),
          el("circle", {cx: x(middle), cy: y, r: 4.5, fill: colour(i)}),
          el("text", {x: width, y: y + 4, "text-anchor": "end"}, percent(middle)));
      });
      svg.append(el("line", {x1: x(expected), x2: x(expected), y1: 2, y2: height - 20, stroke: "#1b1f24", "stroke-dasharray": "3 2"}),
        el("text", {x: left, y: height - 4, class: "axis"}, "0"),
        el("text", {x: x(end), y: height - 4, "text-anchor": "end", class: "axis"}, `${Number((end * 100).toPrecision(2))} %`));
      return el("div", {}, el("h4", {}, `Share of ${what} ${what === "texts" ? "in" : "on"} which it fires`), svg,
        el("p", {class: "soft"}, `Chance: ${percent(expected)}`));
    }));
  }

  function effects(ablation) {
    const body = ablation.map((effect, i) => el("tr", {}, el("td", {class: "left"}, chip(i)),
      el("td", {}, effect ? signed(effect[0] * 1000) : "–"),
      el("td", {}, effect ? `${signed(effect[1] * 1000)} to ${signed(effect[2] * 1000)}` : "–")));
    return el("div", {}, el("h3", {}, "Switched off: change of the loss, millinats a token"), el("div", {class: "wide"},
      el("table", {}, el("thead", {}, el("tr", {}, el("th", {class: "left"}, "Group"), el("th", {}, "Change"),
        el("th", {}, "95 % interval"))), el("tbody", {}, ...body))));
  }

  function exampleOf(unit, [number, first, peak, letters]) {
    const [group, file, line, tokens] = texts[number], largest = units.largest[unit];
    const strength = letter => letter === "." ? 0 : letter < "a" ? -(letter.charCodeAt(0) - 64) : letter.charCodeAt(0) - 96;
    const shaded = (word, i) => {
      const level = strength(letters[i]);
      const hue = level < 0 ? "213,94,0" : "0,114,178";
      return el("span", {
        class: i === peak ? "peak" : null, title: level ? `about ${short(level / 26 * largest)}` : "0",
        style: level ? `background: rgba(${hue},${(.08 + .47 * Math.abs(level) / 26).toFixed(2)})` : null,
      }, words[word].replace(/\n/g, "⏎\n"));
    };
    const end = first + letters.length;
    const text = el("div", {class: "text"}, first > 0 ? "… " : "", ...tokens.slice(first, end).map(shaded),
      end < tokens.length ? " …" : "");
    const whole = el("button", {type: "button", onclick: () => {
      const plain = part => el("span", {class: "outside"}, part.map(word => words[word]).join(""));
      text.replaceChildren(plain(tokens.slice(0, first)), ...tokens.slice(first, end).map(shaded), plain(tokens.slice(end)));
      whole.remove();
    }}, "whole text");
    const is_part = first > 0 || end < tokens.length;
    return el("div", {class: "example"}, el("p", {class: "soft"}, chip(group), ` ${file}, row ${line}; latent about `,
      short(strength(letters[peak]) / 26 * largest), " on ", tokenOf(tokens[first + peak]), " ", is_part ? whole : null), text);
  }

  function bars([bin, counts]) {
    const used = counts.reduce((last, value, i) => value ? i + 1 : last, 1), most = Math.max(...counts);
    const width = 320, bottom = 96, step = (width - 8) / used;
    const svg = el("svg", {class: "small", viewBox: `0 0 ${width} 118`, role: "img", "aria-label": "Histogram of the latent's strength"});
    counts.slice(0, used).forEach((value, i) => {
      const h = value ? Math.max(1.5, value / most * 76) : 0;
      svg.append(el("rect", {x: 4 + i * step + .5, y: bottom - h, width: Math.max(1, step - 1), height: h, fill: "#0072b2"},
        el("title", {}, `${value} tokens from ${short(i * bin)} to ${short((i + 1) * bin)}`)));
    });
    svg.append(el("line", {x1: 4, x2: width - 4, y1: bottom, y2: bottom, stroke: "#57606a"}),
      el("text", {x: 4, y: 112}, "0"), el("text", {x: width - 4, y: 112, "text-anchor": "end"}, short(used * bin)),
      el("text", {x: 4, y: 14, class: "axis"}, `tokens, ${most.toLocaleString("en")} at most`));
    return svg;
  }

  function logits(title, pairs, fill) {
    const most = Math.max(...pairs.map(([, change]) => Math.abs(change)), 1e-30);
    return el("div", {}, el("h4", {}, title), el("table", {}, el("tbody", {}, ...pairs.map(([word, change]) => el("tr", {},
      el("td", {}, tokenOf(word)), el("td", {}, el("span", {class: "bar", style:
        `background: ${fill}; width: ${(Math.abs(change) / most * 60).toFixed(0)}px`})), el("td", {}, signed(change)))))));
  }

  function alike(title, pairs) {
    if (!pairs.length) return el("div", {}, el("h4", {}, title), el("p", {class: "soft"}, "No other unit to compare with."));
    return el("div", {}, el("h4", {}, title), el("table", {}, el("tbody", {}, ...pairs.map(([other, cosine]) => el("tr", {},
      el("td", {}, el("button", {type: "button", class: "name", onclick: () => show(other, false)}, nameOf(other))),
      el("td", {}, cosine.toFixed(2)))))));
  }

  // ---- start

  byId("kind").append(el("option", {value: ""}, "all"), ...kinds.map(kind => el("option", {value: kind}, kind)));
  byId("prefers").append(el("option", {value: ""}, "any group"), ...groups.map((group, i) => el("option", {value: i}, group)));
  for (const id of ["kind", "prefers", "beyond", "dead"]) byId(id).addEventListener("change", select);
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(select, 150); });
  byId("back").addEventListener("click", () => { state.page -= 1; list(); });
  byId("forth").addEventListener("click", () => { state.page += 1; list(); });
  const pictures = () => { densities(); map(); };
  window.addEventListener("resize", pictures);
  pictures();
  select();
  const asked = decodeURIComponent(location.hash.slice(1));
  const linked = asked ? units.module.findIndex((_, unit) => nameOf(unit) === asked) : -1;
  if (linked >= 0) show(linked, true);
  else if (state.rows.length) { show(state.rows[0], false); history.replaceState(null, "", location.pathname + location.search); }
})();
