"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const id = (name) => document.getElementById(name);
  const LOW_LOGPROB = [-2.3, -4.6]; // below 10 % and below 1 %

  /* Every text enters the page through here, as text: nothing from a run is ever parsed as HTML. */
  function el(tag, options, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(options || {})) {
      if (key === "text") node.textContent = value;
      else if (key === "class") node.className = value;
      else if (key === "on") node.addEventListener(value[0], value[1]);
      else node.setAttribute(key, value);
    }
    for (const child of children) if (child !== null) node.append(child);
    return node;
  }

  /* The same rule as svg.fmt. */
  function fmt(value) {
    if (value === null || value === undefined) return "-";
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e9) return Number((value / 1e9).toPrecision(4)) + "G";
    if (size >= 1e6) return Number((value / 1e6).toPrecision(4)) + "M";
    if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
    if (size !== 1 && Math.abs(size - 1) < 5e-4) return value.toFixed(6).replace(/\.?0+$/, "");
    const digits = size >= 100 ? 1 : size >= 10 ? 2 : size < 0.1 ? 4 : 3;
    return value.toFixed(digits).replace(/\.?0+$/, "");
  }
  const signed = (value) => (value === null ? "-" : (value > 0 ? "+" : "") + fmt(value));
  const score = (value) => (value === null || value === undefined ? "-" : value.toFixed(3));
  const advantage = (value) => (value > 0 ? "+" : "") + score(value);
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const words = (name) => String(name).replace(/_/g, " ");

  /* ---- curves: the legend shows the last step, the one pointed at or chosen by arrow keys ---- */
  for (const figure of document.querySelectorAll(".chart")) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const svg = figure.querySelector("svg");
    const cursor = figure.querySelector(".cursor");
    const at = figure.querySelector(".at");
    const shown = figure.querySelectorAll(".legend b");
    const first = chart.steps[0], last = chart.steps[chart.steps.length - 1];
    const [left, right] = chart.px;
    const scale = first === last ? 0 : (right - left) / (last - first);
    const pixel = (step) => left + (step - first) * scale;
    let index = chart.steps.length - 1;
    const show = (i, marked) => {
      index = i;
      at.textContent = "step " + chart.steps[i];
      shown.forEach((node, k) => { node.textContent = fmt(chart.values[k][i]); });
      cursor.setAttribute("visibility", marked ? "visible" : "hidden");
      cursor.setAttribute("x1", pixel(chart.steps[i]));
      cursor.setAttribute("x2", pixel(chart.steps[i]));
    };
    const reset = () => show(chart.steps.length - 1, false);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.width;
      let best = 0;
      chart.steps.forEach((step, i) => {
        if (Math.abs(pixel(step) - x) < Math.abs(pixel(chart.steps[best]) - x)) best = i;
      });
      show(best, true);
    });
    svg.addEventListener("pointerleave", reset);
    figure.addEventListener("blur", reset);
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      show(Math.min(chart.steps.length - 1, Math.max(0, index + move)), true);
    });
  }

  /* ---- dialogues ---- */
  const steps = data.steps.filter((step) => step.groups.length);
  for (const step of steps) for (const group of step.groups) group.scoring = step.scoring;
  if (!steps.length) return;
  const pickStep = id("pick-step"), pickGroup = id("pick-group");
  let reply = 0;

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const rewards = (group) => group.replies.map((r) => r.reward).filter((r) => r !== null);

  function rewardText(group) {
    const all = rewards(group);
    if (!all.length) return "no reply";
    if (all.length === 1) return `reward ${score(all[0])}`;
    const range = `${score(Math.min(...all))} to ${score(Math.max(...all))}`;
    return `mean reward ${score(mean(all))} (${range})`;
  }

  function fillSteps() {
    const kinds = { eval: "Held-out evaluation (greedy)", train: "Training" };
    for (const [kind, label] of Object.entries(kinds)) {
      const list = el("optgroup", { label });
      steps.forEach(({ kind: own, step, groups, total }, i) => {
        if (own !== kind) return;
        const name = `${kind === "eval" ? "evaluation, step" : "step"} ${step}`;
        const part = groups.length < total ? ` (${groups.length} of ${total} groups)` : "";
        list.append(el("option", { value: i, text: name + part }));
      });
      if (list.children.length) pickStep.append(list);
    }
  }

  function fillGroups() {
    const name = (group) => `${group.case}, turn ${group.turns + 1}: ${rewardText(group)}`;
    pickGroup.replaceChildren(...steps[Number(pickStep.value)].groups.map(
      (group, i) => el("option", { value: i, text: `${i + 1}. ${name(group)}` })));
  }

  /* A patient's state is whatever the simulator recorded: shown by shape, not by name. */
  const yes = (value) => (value === true ? "yes" : value === false ? "no" : String(value));
  function flat(value) {
    if (value === null) return "none";
    if (Array.isArray(value)) return value.map(flat).join(", ") || "none";
    return typeof value === "object" ? JSON.stringify(value) : yes(value);
  }
  function stateValue(value) {
    if (Array.isArray(value) && value.length) {
      return el("dd", {}, ...value.map((v) => el("span", { class: "chip", text: words(flat(v)) })));
    }
    if (value === null || Array.isArray(value) || typeof value !== "object") {
      return el("dd", { text: flat(value) });
    }
    const pairs = Object.entries(value).map(([k, v]) => `${words(k)}: ${flat(v)}`);
    return el("dd", { text: pairs.join("; ") || "none" });
  }

  function stateList(state) {
    const order = ["gate", "affective", "factual"];
    const rank = (name) => (order.indexOf(name) + 1 || 9);
    const list = el("dl", { class: "state" });
    for (const key of Object.keys(state).sort((a, b) => rank(a) - rank(b))) {
      list.append(el("dt", { text: words(key) }), stateValue(state[key]));
    }
    return list;
  }

  /* Built when opened: a page full of token spans would be slow. */
  function tokenDetails(gen) {
    const summary = `${plural(gen.ids.length, "token")} and weight version`;
    const box = el("details", {}, el("summary", { text: summary }));
    box.addEventListener("toggle", () => {
      if (box.children.length > 1) return;
      for (const [version, start, end] of gen.spans) {
        box.append(el("p", { text: `Tokens ${start} to ${end - 1}: weight version ${version}` }));
      }
      const end = gen.end === "stop" ? "the end token" : "the token limit";
      box.append(el("p", { text: `Sampling seed ${gen.seed}; ended by ${end}. Token ids; colour: ` +
        "sampled with a probability below 10 % and below 1 %." }));
      box.append(el("div", { class: "tokens" }, ...gen.ids.map((token, i) => {
        const low = LOW_LOGPROB.filter((bound) => gen.lp[i] !== null && gen.lp[i] < bound).length;
        return el("span", { class: `p${low}`, title: `log-prob ${fmt(gen.lp[i])}`, text: token });
      })));
    });
    return box;
  }

  const NAMES = { doctor: "Doctor (policy)", patient: "Patient", system: "System" };
  function turnNode(turn) {
    const text = turn.text.trim();
    return el("div", { class: `turn ${turn.role}` },
      el("div", { class: "who", text: NAMES[turn.role] }),
      el("div", { class: text ? "said" : "said none", text: text || "(empty)" }),
      turn.state ? stateList(turn.state) : null,
      turn.gen ? tokenDetails(turn.gen) : null);
  }

  const ENDS = {
    gate: "the patient's gate",
    max_turns: "the turn limit",
    max_tokens: "the context limit",
  };

  function showDialogue(step, group) {
    const dialogue = step.dialogues[group.dialogue];
    const turns = group.context || (dialogue ? dialogue.turns.slice(0, group.turns) : []);
    const later = dialogue ? dialogue.turns.slice(group.turns) : [];
    const size = `${plural(turns.length, "turn")}, prompt of ${plural(group.prompt, "token")}`;
    const box = id("dialogue");
    box.replaceChildren(
      el("h3", { text: "Dialogue so far" }),
      el("p", { class: "meta", text: `Case ${group.case}, ${size}, weights ${step.version}` }),
      ...turns.map(turnNode));
    if (!dialogue) return;
    const end = `ended by ${ENDS[dialogue.end] || dialogue.end}`;
    if (later.length) {
      const text = `How the rollout went on: ${plural(later.length, "turn")}, ${end}`;
      box.append(el("details", { class: "rest" }, el("summary", { text }), ...later.map(turnNode)));
    } else {
      box.append(el("p", { class: "meta rest", text: `The rollout was ${end}.` }));
    }
  }

  /* An item with a negative weight is a fault: meeting it costs points. */
  const MARK = { met: "\u2713", unmet: "\u00b7", unknown: "?" };
  const FAULT = { met: "met: penalty", unmet: "avoided", unknown: "unknown" };
  function tone(mark, weight) {
    if (mark === "unknown") return "unknown";
    if (weight < 0) return mark === "met" ? "bad" : "good";
    return mark === "met" ? "good" : "";
  }
  const verdict = (mark, weight, text) =>
    el("span", { class: `verdict ${tone(mark, weight)}`, text, title: mark });
  const heading = (text, kind) => el("th", { scope: "col", class: kind || "", text });

  function rubricTable(group, chosen) {
    const body = el("tbody");
    let points = 0, top = 0, bottom = 0, sure = true;
    group.rubrics.forEach(([dimension, text, weight, check], i) => {
      const [mark, why] = chosen.marks[i] || ["unknown", "no verdict recorded"];
      const got = mark === "met" ? weight : 0;
      points += got;
      top += Math.max(0, weight);
      bottom += Math.min(0, weight);
      sure = sure && mark !== "unknown";
      body.append(el("tr", {},
        el("td", {},
          el("span", { class: "dim", text: words(dimension), title: `check: ${check}` }),
          text,
          el("span", { class: "why", text: why })),
        el("td", { class: "num", text: signed(weight) }),
        el("td", {}, verdict(mark, weight, weight < 0 ? FAULT[mark] : mark)),
        el("td", { class: "num", text: mark === "unknown" ? "?" : signed(got) })));
    });
    const rules = {
      healthbench: `points / ${top}, kept within 0 and 1`,
      minmax: bottom ? `(points + ${-bottom}) / ${top - bottom}` : `points / ${top}`,
    };
    const rule = sure && rules[group.scoring] ? `; rubric reward = ${rules[group.scoring]}` : "";
    return el("table", {},
      el("thead", {}, el("tr", {}, heading("Criterion, and why"), heading("Weight", "num"),
        heading("Verdict"), heading("Points", "num"))),
      body,
      el("tfoot", {}, el("tr", {},
        el("td", { colspan: 3, text: `Points, of ${bottom} to ${top}${rule}` }),
        el("td", { class: "num", text: signed(points) }))));
  }

  function matrix(group) {
    const on = (i) => (i === reply ? "on" : "");
    const rows = group.rubrics.map(([, text, weight], k) => el("tr", {},
      el("td", { text: `${text} (${signed(weight)})` }),
      ...group.replies.map((r, i) => {
        const [mark] = r.marks[k] || ["unknown"];
        return el("td", { class: on(i) }, verdict(mark, weight, MARK[mark]));
      })));
    const head = el("tr", {}, heading("Criterion (weight)"),
      ...group.replies.map((_, i) => heading(i + 1, on(i))));
    return el("details", { class: "all" },
      el("summary", { text: "All replies against all criteria" }),
      el("table", { class: "matrix" }, el("thead", {}, head), el("tbody", {}, ...rows)));
  }

  function replyButton(group, i) {
    const r = group.replies[i];
    const meter = el("i");
    meter.style.width = Math.max(0, Math.min(1, r.reward || 0)) * 100 + "%";
    const choose = () => {
      const all = id("replies").querySelector("details.all");
      reply = i;
      showReplies(group, all.open);
      id("replies").querySelectorAll(".strip button")[i].focus();
    };
    return el("button", {
        type: "button", "aria-pressed": i === reply, on: ["click", choose],
        "aria-label": `Reply ${i + 1}, reward ${score(r.reward)}`,
      },
      el("span", { text: `reply ${i + 1}` }),
      el("b", { text: score(r.reward) }),
      el("span", { text: `adv. ${advantage(r.adv)}` }),
      el("div", { class: "meter" }, meter));
  }

  function showReplies(group, matrixOpen) {
    const box = id("replies");
    const count = group.replies.length, single = count === 1;
    box.replaceChildren(
      el("h3", { text: single ? "Reply and its grade" : `${count} replies and their grades` }),
      el("p", { class: "meta", text: `${rewardText(group)}; group ${group.uid}` }));
    const chosen = group.replies[reply];
    if (!chosen) return;
    if (!single) {
      const buttons = group.replies.map((_, i) => replyButton(group, i));
      box.append(el("div", { class: "strip" }, ...buttons));
    }
    const value = (number) => el("b", { text: number });
    const sum = el("p", { class: "sum" }, "Reward ", value(score(chosen.reward)), " = rubric ",
      value(score(chosen.rubric)), " + length ", value(score(chosen.length)));
    if (!single) sum.append("; advantage ", value(advantage(chosen.adv)));
    if (chosen.gen.end === "length") sum.append("; cut off at the token limit");
    const text = chosen.text.trim() || "(no visible text)";
    box.append(el("div", { class: "answer", text }), sum, rubricTable(group, chosen),
      tokenDetails(chosen.gen));
    if (!single) {
      box.append(matrix(group));
      box.lastChild.open = Boolean(matrixOpen);
    }
  }

  /* An evaluation asks the same cases every time: offer the same one at the other steps. */
  function showElsewhere(step, group) {
    const box = id("elsewhere");
    box.replaceChildren();
    if (step.kind !== "eval") return;
    const twin = (g) => g.case === group.case && g.turns === group.turns;
    const same = steps
      .map((other, s) => [other, s, other.kind === "eval" ? other.groups.findIndex(twin) : -1])
      .filter(([, , g]) => g >= 0);
    if (same.length < 2) return;
    box.append(`${group.case}, turn ${group.turns + 1}, in each evaluation:`);
    for (const [other, s, g] of same) {
      const text = `step ${other.step}: ${rewardText(other.groups[g])}`;
      const button = el("button", { type: "button", text, on: ["click", () => choose(s, g)] });
      button.disabled = other === step;
      box.append(button);
    }
  }

  function show(s, g) {
    const step = steps[s], group = step.groups[g];
    if (pickStep.value !== String(s) || !pickGroup.options.length) {
      pickStep.value = s;
      fillGroups();
    }
    pickGroup.value = g;
    reply = 0;
    showDialogue(step, group);
    showReplies(group, false);
    showElsewhere(step, group);
    id("prev").disabled = s === 0 && g === 0;
    id("next").disabled = s === steps.length - 1 && g === step.groups.length - 1;
  }

  /* As show, and the address bar gets a link to it. */
  function choose(s, g) {
    show(s, g);
    try {
      history.replaceState(null, "", `#${steps[s].kind}-${steps[s].step}-${g + 1}`);
    } catch (error) {
      console.info("the address bar cannot be updated here", error);
    }
  }

  function move(by) {
    const s = Number(pickStep.value), g = Number(pickGroup.value) + by;
    if (g < 0) choose(s - 1, steps[s - 1].groups.length - 1);
    else if (g >= steps[s].groups.length) choose(s + 1, 0);
    else choose(s, g);
  }

  /* A link such as report.html#train-12-3 opens that step and group. */
  function openLink() {
    const link = /^#(eval|train)-(\d+)-(\d+)$/.exec(location.hash);
    if (!link) return false;
    const s = steps.findIndex(({ kind, step }) => kind === link[1] && step === Number(link[2]));
    const g = Number(link[3]) - 1;
    if (s < 0 || !steps[s].groups[g]) return false;
    show(s, g);
    id("dialogues").scrollIntoView();
    return true;
  }

  fillSteps();
  pickStep.addEventListener("change", () => {
    fillGroups();
    choose(Number(pickStep.value), 0);
  });
  pickGroup.addEventListener("change", () => move(0));
  id("prev").addEventListener("click", () => move(-1));
  id("next").addEventListener("click", () => move(1));
  id("browser").hidden = false;
  if (!openLink()) show(0, 0);
})();
