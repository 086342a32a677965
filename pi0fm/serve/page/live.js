// Draws /live/data every PERIOD milliseconds. What a robot sent is only ever text: nothing of it becomes markup.
"use strict";
const PERIOD = 500;
const $ = (id) => document.getElementById(id);
let chosen = null;

function made(tag, text, parent, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  if (parent) parent.append(element);
  return element;
}

const number = (value) => (value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toString() : String(+(+value).toPrecision(3)));

function tiles(parent, values) {
  parent.replaceChildren();
  for (const [name, value, bad] of values) {
    const tile = made("div", undefined, parent, bad ? "tile bad" : "tile");
    made("b", value, tile);
    made("span", name, tile);
  }
}

// lines: [{values, colour, dash, from}], drawn over one axis of x; marks: horizontal lines
function draw(canvas, lines, marks = []) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, height = +canvas.getAttribute("height");
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d"), colours = getComputedStyle(document.documentElement);
  pen.scale(scale, scale);
  const known = lines.flatMap((line) => line.values).filter((value) => value !== null);
  if (!known.length) return;
  let low = Math.min(...known), high = Math.max(...known);
  const near = marks.filter((mark) => mark > low - 2 * (high - low) - 1e-9 && mark < high + 2 * (high - low) + 1e-9);
  low = Math.min(low, ...near);
  high = Math.max(high, ...near);
  if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
  const steps = Math.max(2, ...lines.map((line) => (line.from || 0) + line.values.length)), left = 46, below = 6;
  const x = (step) => left + ((width - left - 4) * step) / (steps - 1);
  const y = (value) => height - below - ((height - 2 * below) * (value - low)) / (high - low);
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = colours.getPropertyValue("--soft");
  pen.textAlign = "right";
  pen.fillText(number(high), left - 6, below + 8);
  pen.fillText(number(low), left - 6, height - below);
  const stroke = (points, colour, dash) => {
    pen.strokeStyle = colours.getPropertyValue(colour);
    pen.setLineDash(dash || []);
    pen.lineWidth = 1.5;
    pen.beginPath();
    points.forEach(([at, value], index) => (index ? pen.lineTo(x(at), y(value)) : pen.moveTo(x(at), y(value))));
    pen.stroke();
  };
  for (const mark of near) stroke([[0, mark], [steps - 1, mark]], "--bad", [4, 4]);
  for (const line of lines) {
    stroke(line.values.map((value, step) => [step + (line.from || 0), value]).filter((point) => point[1] !== null), line.colour, line.dash);
  }
}

function figures(parent, names, label) {
  if (parent.dataset.names === names.join("|")) return;
  parent.dataset.names = names.join("|");
  parent.replaceChildren();
  for (const name of names) {
    const figure = made("figure", undefined, parent);
    made("figcaption", label(name), figure);
    const inside = made(parent.id === "cameras" ? "img" : "canvas", undefined, figure);
    if (parent.id === "cameras") inside.alt = `picture of ${name}`;
    else inside.setAttribute("height", "110");
  }
}

function show(data) {
  const server = data.server, robots = data.robots;
  $("policy").textContent = data.policy.name;
  $("identity").textContent = data.policy.identity ? `identity ${data.policy.identity.slice(0, 12)}` : "";
  $("state").textContent = server.fault || "serving";
  $("state").className = server.fault ? "lost" : "";
  const refused = Object.entries(server.refused);
  tiles($("tiles"), [
    ["robots connected", `${server.connections} of ${server.max_connections}`],
    ["requests waiting", `${server.waiting} of ${server.max_queue}`, server.waiting > server.max_queue / 2],
    ["answers", number(server.answers)],
    ["mean batch", `${number(server.mean_batch)} of ${server.max_batch_size}`],
    ["late answers", number(server.late), server.late > 0],
    ...refused.map(([why, count]) => [`refused: ${why}`, number(count), true]),
  ]);
  const list = robots.map((robot) => robot.robot).join();
  const nav = $("robots");
  if (nav.dataset.list !== list) {
    nav.dataset.list = list;
    nav.replaceChildren();
    for (const robot of robots) {
      const button = made("button", undefined, nav);
      button.dataset.robot = robot.robot;
      made("b", robot.name, button);
      made("br", undefined, button);
      made("small", "", button);
      button.onclick = () => { chosen = robot.robot; refresh(); };
    }
  }
  for (const button of nav.children) {
    const robot = robots.find((each) => each.robot === +button.dataset.robot);
    button.querySelector("small").textContent = `${number(robot.answers_per_second)} answers/s, p50 ${number(robot.latency_ms.p50)} ms, p95 ${number(robot.latency_ms.p95)} ms`;
    button.setAttribute("aria-pressed", data.chosen && data.chosen.robot === robot.robot);
  }
  $("robot").hidden = !data.chosen;
  if (data.chosen) one(data.chosen, robots.find((each) => each.robot === data.chosen.robot), data.policy);
}

function one(robot, line, { limits, action_names, units }) {
  $("prompt").textContent = `“${line.prompt}”`;
  figures($("cameras"), robot.cameras, (name) => `${name}, as the model sees it`);
  [...$("cameras").querySelectorAll("img")].forEach((image, index) => {
    image.src = `/live/picture?robot=${robot.robot}&camera=${encodeURIComponent(robot.cameras[index])}&at=${Date.now()}`;
  });
  const counts = Object.entries(line.counts);
  tiles($("counts"), [
    ["seconds since it asked", line.seconds_ago.toFixed(1), line.seconds_ago > 2],
    ...counts.map(([name, count]) => [name.replaceAll("_", " "), number(count), count > 0 && !["steps", "skipped_rows"].includes(name)]),
  ]);
  draw($("latency"), [{ values: robot.latency_ms, colour: "--told" }]);
  $("spread").hidden = robot.uncertainty.every((value) => value === null);
  if (!$("spread").hidden) draw($("uncertainty"), [{ values: robot.uncertainty, colour: "--told" }]);
  const dims = robot.upcoming[0].map((_, dim) => dim), column = (rows, dim) => rows.map((row) => row[dim]);
  const unit = (name) => (Object.hasOwn(units, name) ? `${name} (${units[name]})` : name);
  figures($("actions"), dims.map(String), (dim) => (action_names.length > dim ? unit(action_names[dim]) : `action ${dim}`));
  [...$("actions").querySelectorAll("canvas")].forEach((canvas, dim) => {
    const marks = ["low", "high"].map((side) => limits[side]).map((bound) => (Array.isArray(bound) ? bound[dim] : bound));
    draw(canvas, [
      { values: column(robot.predicted, dim), colour: "--told" },
      { values: column(robot.executed, dim), colour: "--done" },
      { values: column(robot.upcoming, dim), colour: "--told", dash: [2, 3], from: robot.predicted.length },
    ], marks.filter((mark) => typeof mark === "number"));
  });
}

async function refresh() {
  try {
    const answer = await fetch(`/live/data${chosen === null ? "" : `?robot=${chosen}`}`);
    if (!answer.ok) throw new Error(await answer.text());
    show(await answer.json());
  } catch (error) {
    $("state").textContent = "the server does not answer";
    $("state").className = "lost";
  }
}

async function loop() {
  if (!document.hidden) await refresh();
  setTimeout(loop, PERIOD);
}
loop();
