// The trace viewer: a text by how its tokens came about, and the token tree of a chosen step.
"use strict";

(() => {
  const data = document.getElementById("trace-data");
  const root = document.getElementById("trace-viewer");
  if (!data || !root) return;
  const traces = JSON.parse(data.textContent);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const SVG = "http://www.w3.org/2000/svg";
  const NODE = { width: 112, height: 50, across: 30, below: 22, along: 14 };
  const WORDS = {
    accepted: "accepted",
    bonus: "bonus",
    corrected: "corrected",
    plain: "nothing drafted",
    rejected: "rejected",
    unreached: "below a rejected node",
    root: "last known token",
  };
  const FATES = { accepted: "✓", rejected: "✗", bonus: "+", corrected: "≠", plain: "·" };
  let trace = traces[0];
  let step = 0;

  // ---- Words and numbers

  const visible = (text) =>
    text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "→") || "∅";
  const quoted = (text) => `“${text.trim().replace(/\n/g, "↵") || visible(text)}”`;
  const percent = (p) => {
    if (p === null || p === undefined) return "–";
    if (p === 0) return "0";
    if (p < 0.001) return "<.001";
    return p >= 0.9995 ? "1.00" : p < 0.1 ? p.toFixed(3).slice(1) : p.toFixed(2).replace(/^0/, "");
  };
  const short = (text, length) => {
    const letters = [...text];
    return letters.length > length ? letters.slice(0, length - 1).join("") + "…" : text;
  };
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  function make(name, attributes = {}, ...children) {
    const drawn = ["svg", "g", "rect", "path", "text", "title", "line"].includes(name);
    const element = drawn ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  // ---- A step as a tree: its nodes, and the next token as one more

  function nodesOf(drawn) {
    const onPath = new Set(drawn.path);
    const depths = [];
    const paths = [];
    const nodes = drawn.tokens.map((token, index) => {
      const parent = drawn.parents[index];
      depths[index] = parent < 0 ? 0 : depths[parent] + 1;
      paths[index] = parent < 0 ? 1 : paths[parent] * drawn.target[index];
      let fate = "unreached";
      if (parent < 0) fate = "root";
      else if (onPath.has(index)) fate = "accepted";
      else if (onPath.has(parent)) fate = "rejected";
      return {
        index,
        token,
        parent,
        fate,
        text: drawn.texts[index],
        depth: depths[index],
        target: drawn.target[index],
        draft: drawn.draft[index],
        path: paths[index],
        cut: fate === "accepted" && depths[index] > drawn.emitted,
      };
    });
    const last = drawn.path.at(-1);
    nodes.push({
      index: nodes.length,
      token: drawn.next_token,
      parent: last,
      fate: drawn.next_origin,
      text: drawn.next_text,
      depth: depths[last] + 1,
      target: drawn.next_probability,
      draft: null,
      path: paths[last] * drawn.next_probability,
      cut: drawn.path.length > drawn.emitted,
    });
    return nodes;
  }

  // ---- The picture of a tree

  function place(nodes) {
    const children = nodes.map(() => []);
    for (const node of nodes.slice(1)) children[node.parent].push(node.index);
    let leaves = 0;
    const breadth = [];
    // Parents precede children, so going backwards every child is placed before its parent; but
    // leaves are numbered in reading order, which takes a walk.
    const stack = [0];
    const order = [];
    while (stack.length) {
      const index = stack.pop();
      order.push(index);
      if (!children[index].length) breadth[index] = leaves++;
      stack.push(...[...children[index]].reverse());
    }
    for (const index of order.reverse()) {
      const below = children[index];
      if (below.length) breadth[index] = (breadth[below[0]] + breadth[below.at(-1)]) / 2;
    }
    return { breadth, leaves, levels: Math.max(...nodes.map((node) => node.depth)) + 1 };
  }

  function picture(nodes, room) {
    const { breadth, leaves, levels } = place(nodes);
    const { width, height, across, below, along } = NODE;
    const sideways = levels * (width + across) - across;
    const downwards = leaves * (width + along) - along;
    // To the right where that fits or nothing does better; else from the top down.
    const right = sideways <= room || sideways <= downwards;
    const at = (node) =>
      right
        ? [node.depth * (width + across), breadth[node.index] * (height + along)]
        : [breadth[node.index] * (width + along), node.depth * (height + below)];
    const size = right
      ? [sideways, leaves * (height + along) - along]
      : [downwards, levels * (height + below) - below];
    const svg = make("svg", {
      role: "img",
      width: size[0] + 8,
      height: size[1] + 8,
      viewBox: `-4 -4 ${size[0] + 8} ${size[1] + 8}`,
      "aria-label": `Token tree of step ${step + 1}; the table below says the same in words.`,
    });
    const edges = make("g");
    svg.append(edges);
    for (const node of nodes) {
      const [x, y] = at(node);
      if (node.parent >= 0) edges.append(edge(at(nodes[node.parent]), [x, y], node, right));
      svg.append(box(node, x, y));
    }
    return svg;
  }

  function edge([x0, y0], [x1, y1], node, right) {
    const { width, height } = NODE;
    let d;
    if (right) {
      const [a, b, c, e] = [x0 + width, y0 + height / 2, x1, y1 + height / 2];
      d = `M${a} ${b}C${(a + c) / 2} ${b} ${(a + c) / 2} ${e} ${c} ${e}`;
    } else {
      const [a, b, c, e] = [x0 + width / 2, y0 + height, x1 + width / 2, y1];
      d = `M${a} ${b}C${a} ${(b + e) / 2} ${c} ${(b + e) / 2} ${c} ${e}`;
    }
    return make("path", { d, class: `edge ${node.fate}` });
  }

  function box(node, x, y) {
    const { width, height } = NODE;
    const group = make("g", {
      class: `node ${node.fate}${node.cut ? " cut" : ""}`,
      transform: `translate(${x} ${y})`,
    });
    const inner = width - 16;
    group.append(
      make("title", {}, `${quoted(node.text)} (id ${node.token}), ${describe(node)}`),
      make("rect", { class: "box", width, height, rx: 8 }),
      make("text", { class: "token-text", x: 8, y: 18 }, short(visible(node.text), 11)),
    );
    if (FATES[node.fate])
      group.append(make("text", { class: "fate", x: width - 8, y: 18 }, FATES[node.fate]));
    if (node.target === null) {
      group.append(make("text", { class: "numbers", x: 8, y: 34 }, "root"));
      return group;
    }
    const numbers =
      node.draft === null ? `t ${percent(node.target)}` : `t ${percent(node.target)} d ${percent(node.draft)}`;
    group.append(
      make("text", { class: "numbers", x: 8, y: 34 }, numbers),
      make("rect", { class: "track", x: 8, y: 40, width: inner, height: 4, rx: 2 }),
      make("rect", { class: "target", x: 8, y: 40, width: inner * node.target, height: 4, rx: 2 }),
    );
    if (node.draft !== null) {
      const end = 8 + inner * Math.min(1, node.draft);
      group.append(make("line", { class: "draft", x1: end, x2: end, y1: 37, y2: 47 }));
    }
    return group;
  }

  function describe(node) {
    const words = [WORDS[node.fate]];
    if (node.target !== null) {
      words.push(`target ${percent(node.target)}`);
      if (node.draft !== null) words.push(`draft ${percent(node.draft)}`);
      words.push(`path ${percent(node.path)}`);
    }
    if (node.cut) words.push("behind the end of the text");
    return words.join(", ");
  }

  // ---- The parts of the page

  function drawText() {
    const tokens = trace.tokens.map((token, index) => {
      const span = make("span", {
        class: `token ${token.origin}`,
        "data-step": token.step,
        "data-mark": { accepted: token.depth, bonus: "+", corrected: "≠", plain: "" }[token.origin],
        style: `--depth: ${token.depth}`,
        title: `${quoted(token.text)}, ${WORDS[token.origin]}${
          token.origin === "accepted" ? ` at depth ${token.depth}` : ""
        }, step ${token.step + 1}, target ${percent(token.probability)}`,
      });
      // The mark stands before a line break, not behind it.
      const breaks = token.text.match(/\n*$/)[0];
      span.textContent = token.text.slice(0, token.text.length - breaks.length) + (breaks ? "↵" : "");
      return breaks ? [span, breaks] : [span];
    });
    part("answer").replaceChildren(...tokens.flat());
  }

  function drawStrip() {
    const strip = part("strip");
    const most = Math.max(...trace.steps.map((each) => each.emitted));
    const [width, height] = [1000, 56];
    const slot = width / trace.steps.length;
    strip.setAttribute("viewBox", `0 0 ${width} ${height}`);
    strip.setAttribute("preserveAspectRatio", "none");
    strip.replaceChildren(
      ...trace.steps.map((each, index) => {
        const unit = (height - 6) / most;
        const accepted = Math.min(each.path.length - 1, each.emitted);
        const gap = Math.min(3, slot / 5);
        const bar = { x: index * slot + gap / 2, width: slot - gap };
        const top = height - 3 - each.emitted * unit;
        return make(
          "g",
          { "data-step": index },
          make("rect", { class: "next", ...bar, y: top, height: (each.emitted - accepted) * unit }),
          make("rect", {
            class: "accepted",
            ...bar,
            y: height - 3 - accepted * unit,
            height: accepted * unit,
          }),
          make("rect", { class: "hit", x: index * slot, y: 0.5, width: slot, height: height - 1 }),
        );
      }),
    );
  }

  function drawStep() {
    const drawn = trace.steps[step];
    const nodes = nodesOf(drawn);
    const canvas = part("canvas");
    canvas.replaceChildren(picture(nodes, canvas.clientWidth - 34));
    const rows = nodes.map((node) => {
      const words = make("td", { class: "words" }, WORDS[node.fate] + (node.cut ? ", not used" : ""));
      const cells = [percent(node.target), percent(node.draft), percent(node.path), node.depth];
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, visible(node.text)),
        words,
        ...cells.map((cell) => make("td", {}, String(cell))),
        make("td", {}, node.parent < 0 ? "–" : visible(nodes[node.parent].text)),
      );
    });
    part("nodes").replaceChildren(...rows);
    const drafted = drawn.tokens.length - 1;
    const accepted = drawn.path.length - 1;
    const kept = drawn.path.slice(1).map((node) => drawn.texts[node]).join("");
    const said = [
      `Step ${step + 1} of ${trace.steps.length}: `,
      drafted ? `${drafted} drafted, ${accepted} accepted` : "nothing drafted",
      accepted ? ` (${quoted(kept)})` : "",
      `, then ${drawn.next_origin === "plain" ? "the target’s" : drawn.next_origin} ${quoted(drawn.next_text)}.`,
      drawn.emitted <= accepted ? ` The text ended after ${plural(drawn.emitted, "token")}.` : "",
    ];
    part("told").textContent = said.join("");
    part("slider").value = step + 1;
    for (const name of ["first", "previous"]) part(name).disabled = step === 0;
    for (const name of ["next", "last"]) part(name).disabled = step === trace.steps.length - 1;
    for (const element of root.querySelectorAll("[data-step]"))
      element.classList.toggle("here", Number(element.dataset.step) === step);
  }

  function drawAbout() {
    const { about, stats } = trace;
    const facts = {
      Model: about.model,
      Drafter: `${about.drafter}, up to ${about.nodes} nodes`,
      Rule: about.rule,
      Options: Object.entries(about.options)
        .filter(([name]) => name !== "return_dict_in_generate")
        .map(([name, value]) => `${name} ${value}`)
        .join(", "),
      Run: `${stats.tokens} tokens${
        stats.first_tokens ? ", the first with the prompt, the others" : ""
      } in ${stats.steps} steps, ${stats.tokens_per_step.toFixed(2)} tokens per step; ${
        stats.accepted
      } of ${stats.drafted} drafted nodes accepted`,
      Recorded: `${about.recorded}, ${about.device}, ${about.dtype}, specdec ${about.specdec}, torch ${about.torch}, transformers ${about.transformers}`,
    };
    part("about").replaceChildren(
      ...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
    );
    part("prompt").textContent = trace.prompt;
    part("prompt-length").textContent = plural(trace.prompt_tokens, "token");
    const gives = trace.steps.some((each) => each.draft.some((p) => p !== null));
    part("no-draft").hidden = gives;
  }

  function show(next) {
    step = Math.min(Math.max(next, 0), trace.steps.length - 1);
    drawStep();
  }

  function open(index) {
    trace = traces[index];
    part("slider").max = trace.steps.length;
    drawAbout();
    drawText();
    drawStrip();
    show(0);
  }

  part("first").addEventListener("click", () => show(0));
  part("previous").addEventListener("click", () => show(step - 1));
  part("next").addEventListener("click", () => show(step + 1));
  part("last").addEventListener("click", () => show(trace.steps.length - 1));
  part("slider").addEventListener("input", (event) => show(Number(event.target.value) - 1));
  root.addEventListener("click", (event) => {
    const chosen = event.target.closest("[data-step]");
    if (chosen) show(Number(chosen.dataset.step));
  });
  part("steps").addEventListener("keydown", (event) => {
    // The slider has keys of its own, which mean the same.
    const moves = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: trace.steps.length - 1 };
    if (event.target === part("slider") || !(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey)
      return;
    event.preventDefault();
    show(moves[event.key]);
  });
  const choice = part("choice");
  if (choice) choice.addEventListener("change", () => open(Number(choice.value)));
  new ResizeObserver(() => {
    const nodes = nodesOf(trace.steps[step]);
    part("canvas").replaceChildren(picture(nodes, part("canvas").clientWidth - 34));
  }).observe(part("canvas"));
  open(0);
})();
