"""The page of common/play.py: one HTML file that needs nothing from elsewhere."""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nightjax: play</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: dark; --ground: #14161c; --panel: #1e212b; --line: #343947; --edge: #4a5063; --text: #e8eaf0;
    --dim: #a3a9ba; --lit: #ffc83c; }
  * { box-sizing: border-box; }
  body { margin: 0; padding: 16px 20px; background: var(--ground); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
  h1 { font-size: 18px; margin: 0 0 12px; } h1 small { color: var(--dim); font-weight: normal; font-size: 14px; margin-left: 8px; }
  h2 { font-size: 14px; margin: 0 0 8px; color: var(--dim); font-weight: 600; }
  main { display: grid; grid-template-columns: minmax(0, 1fr) 360px; gap: 16px; max-width: 1120px; }
  @media (max-width: 900px) { main { grid-template-columns: 1fr; } }
  section { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin-bottom: 14px; }
  .row { display: flex; flex-wrap: wrap; gap: 8px 10px; align-items: center; margin-bottom: 8px; }
  .row:last-child { margin-bottom: 0; }
  canvas { image-rendering: pixelated; background: #000; display: block; }
  figure { margin: 0; } figcaption { color: var(--dim); font-size: 13px; margin: 3px 0; min-height: 1.45em; }
  #screens { display: grid; grid-template-columns: minmax(0, 2.12fr) minmax(0, 1fr); gap: 16px; max-width: 664px; }
  #screens canvas { width: 100%; border-radius: 4px; }
  .dream { position: relative; grid-row: span 2; }
  #overlay { position: absolute; inset: 0 0 auto 0; background: none; pointer-events: none; }
  button, input { font: inherit; color: inherit; background: #2a2e3b; border: 1px solid var(--edge); border-radius: 6px; }
  button, input { padding: 4px 9px; }
  button { cursor: pointer; } button:hover:enabled { background: #363b4b; } button:disabled { opacity: .45; cursor: default; }
  button[aria-pressed=true], .code.now { border-color: var(--lit); box-shadow: inset 0 0 0 1px var(--lit); }
  :focus-visible { outline: 3px solid #6fb3ff; outline-offset: 2px; }
  input[type=number] { width: 92px; } input[type=range] { padding: 0; width: 130px; }
  input[type=file] { width: 100%; min-width: 0; }
  label { display: inline-flex; gap: 6px; align-items: center; }
  #codes { display: grid; grid-template-columns: repeat(auto-fill, minmax(98px, 1fr)); gap: 8px; }
  .code { display: flex; flex-direction: column; align-items: center; gap: 3px; padding: 8px 4px; }
  .code { touch-action: none; user-select: none; }
  .code canvas { width: 76px; height: auto; border-radius: 3px; pointer-events: none; }
  .code .arrow { font-size: 20px; line-height: 1; } .code small { color: var(--dim); font-size: 12px; }
  kbd { background: #11131a; border: 1px solid var(--edge); border-radius: 4px; padding: 0 6px; font: 13px monospace; }
  .slot { display: flex; flex-direction: column; gap: 4px; }
  .slot > button:last-child { font-size: 12px; padding: 1px 4px; color: var(--dim); }
  #message { margin: 0 0 12px; padding: 8px 12px; border-radius: 6px; max-width: 1120px; }
  #message { background: #4a1d24; border: 1px solid #b84a5a; }
  #message:empty { display: none; } #message.note { background: #1d3350; border-color: #4a7fb8; }
  #sketch { width: 240px; height: auto; cursor: crosshair; border: 1px solid var(--line); touch-action: none; }
  .swatch { width: 26px; height: 26px; padding: 0; } details summary { cursor: pointer; } p { margin: 4px 0; color: var(--dim); }
  a { color: #8cc4ff; }
</style>
</head>
<body>
<h1><span id="title">A world to play</span> <small id="subtitle"></small></h1>
<div id="message" role="alert"></div>
<main>
<div>
  <section>
    <div id="screens">
      <figure><div class="dream"><canvas id="frame"></canvas><canvas id="overlay"></canvas></div>
        <figcaption id="under">the model's world</figcaption></figure>
      <div><figure><canvas id="true"></canvas><figcaption id="word">the true game</figcaption></figure>
        <figure><canvas id="apart"></canvas><figcaption>where they differ</figcaption></figure></div>
    </div>
    <div class="row" style="margin-top:10px">
      <span id="numbers" aria-live="off"></span>
      <label><input type="checkbox" id="unsure"> mark tokens that the model is unsure of</label>
    </div>
  </section>
  <section>
    <h2 id="legend">What each latent action does</h2>
    <div id="codes"></div>
    <div class="row" style="margin-top:10px"><button id="hold">Hold each from here</button>
      <span style="color:var(--dim)" id="legendwords"></span></div>
  </section>
</div>
<div>
  <section>
    <h2>Play</h2>
    <div class="row" role="group" aria-label="how time passes" id="modes">
      <button data-mode="step" aria-pressed="true" title="one frame a key press">Step</button>
      <button data-mode="hold" aria-pressed="false" title="frames as long as a key is down">Hold</button>
      <button data-mode="free" aria-pressed="false" title="frames all the time, the last code goes on">Free run</button>
    </div>
    <div class="row">
      <button id="pause" disabled>Pause <kbd>space</kbd></button>
      <button id="undo">Undo <kbd>z</kbd></button>
      <button id="reset">Reset <kbd>r</kbd></button>
    </div>
    <div class="row">
      <button id="follow" title="the codes that the model infers from the real film">Follow the real film</button>
      <button id="random" title="one random code">Random <kbd>x</kbd></button>
    </div>
    <div class="row">
      <label>at most <input type="number" id="fps" min="1" max="60" value="8" style="width:70px"> frames a second</label>
    </div>
  </section>
  <section>
    <h2>Drawing tokens</h2>
    <div class="row"><label>temperature <input type="range" id="temperature" min="0" max="3" step="0.1"></label>
      <output id="shown">1</output></div>
    <div class="row"><label>MaskGIT steps <input type="number" id="steps" min="1" max="100" style="width:74px"></label>
      <label>seed <input type="number" id="seed" min="0" max="2147483647"></label></div>
    <p>Temperature 0 takes the likeliest token. The same seed and codes give the same world.</p>
  </section>
  <section>
    <h2>Begin from</h2>
    <div class="row">
      <label><span id="films">held-out level</span> <input type="number" id="number" min="0" value="0" style="width:78px"></label>
      <button id="go">Begin</button>
    </div>
    <div class="row"><label style="width:100%"><span style="white-space:nowrap">a picture</span>
      <input type="file" id="file" accept="image/*"></label></div>
    <details id="drawing"><summary>a sketch</summary>
      <canvas id="sketch" aria-label="sketch: draw with the pointer" style="margin-top:8px"></canvas>
      <div class="row" id="swatches" style="margin-top:8px" role="group" aria-label="colours"></div>
      <div class="row">
        <label>brush <input type="range" id="brush" min="1" max="16" value="4" style="width:90px"></label>
        <input type="color" id="colour" value="#e04040" aria-label="a colour of your own" style="padding:1px;width:40px">
      </div>
      <div class="row">
        <button id="fill">Fill</button><button id="copy">Copy this frame</button><button id="draw">Begin from it</button>
      </div>
    </details>
  </section>
  <section>
    <h2>Keep</h2>
    <div class="row">
      <a href="/played.gif" download>film (GIF)</a> <a href="/played.npz" download>frames, codes and seed (npz)</a>
    </div>
  </section>
</div>
</main>
<script>
"use strict";
const $ = id => document.getElementById(id);
let about, now, mode = "step", busy = false, paused = false, running = false, following = false;
let held = [], last = null, keys = {}, binding = null, films = [], times = [];

// --- talking to the program

function say(words, note) { $("message").textContent = words || ""; $("message").className = note ? "note" : ""; }

async function ask(path, options) {
  let answer;
  try { answer = await fetch(path, options); }
  catch { throw new Error("the program does not answer: is it still running?"); }
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

async function request(path, body, kind) {
  while (busy) await sleep(10);
  busy = true;
  try { show(await ask(path, {method: "POST", headers: {"Content-Type": kind}, body})); say(""); return true; }
  catch (error) { say(error.message); halt(); return false; }
  finally { busy = false; }
}

const act = value => request("/do", JSON.stringify(value), "application/json");

async function upload(blob) {
  await idle();
  if (blob.size > about.max_upload)
    return say(`the file has ${Math.round(blob.size / 2 ** 20)} MB: at most ${about.max_upload >> 20} MB are taken`);
  if (await request("/picture", blob, "application/octet-stream")) legend();
}

const sleep = ms => new Promise(done => setTimeout(done, ms));
async function idle() { halt(); while (busy || running) await sleep(10); }

// --- showing

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

function paint(canvas, rgb) {
  if (canvas.width !== about.width) canvas.width = about.width;
  if (canvas.height !== about.height) canvas.height = about.height;
  const image = new ImageData(about.width, about.height);
  for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
    image.data[j] = rgb[i]; image.data[j + 1] = rgb[i + 1]; image.data[j + 2] = rgb[i + 2]; image.data[j + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function show(state) {
  now = state;
  const frame = bytes(state.frame), real = state.true && bytes(state.true);
  paint($("frame"), frame);
  paint($("true"), real || new Uint8Array(frame.length));
  paint($("apart"), real ? frame.map((x, i) => Math.abs(x - real[i])) : new Uint8Array(frame.length));
  $("word").textContent = !real ? "nothing true to compare with" : state.word || (about.game ? "the true game" : "the real film");
  $("under").textContent = `${state.prompt}, frame ${state.time}` + (state.code === null ? "" : `, code ${state.code}`);
  for (const [i, slot] of [...$("codes").children].entries()) slot.firstChild.classList.toggle("now", i === state.code);
  $("undo").disabled = !state.can_undo;
  $("follow").disabled = !state.to_follow;
  $("temperature").value = state.temperature;
  $("shown").textContent = state.temperature ? state.temperature.toFixed(1) : "0 (likeliest)";
  for (const name of ["steps", "seed"]) if (document.activeElement !== $(name)) $(name).value = state[name];
  if (state.number !== null && document.activeElement !== $("number")) $("number").value = state.number;
  if (state.held) hold_films(state.held);
  overlay();
}

function overlay() {
  const canvas = $("overlay"), sure = $("unsure").checked && now.sure;
  canvas.width = sure ? sure[0].length : 1; canvas.height = sure ? sure.length : 1;
  canvas.style.aspectRatio = `${about.width} / ${about.height}`;
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const mark = (p, x, y) => { pen.fillStyle = `rgba(255, 0, 120, ${0.75 * (1 - p)})`; pen.fillRect(x, y, 1, 1); };
  if (sure) sure.forEach((row, y) => row.forEach((p, x) => mark(p, x, y)));
}

function clock(ms) {
  times = [...times, performance.now()].slice(-12);
  const rate = times.length > 2 ? (times.length - 1) * 1000 / (times.at(-1) - times[0]) : 0;
  $("numbers").textContent = `${ms.toFixed(0)} ms a frame` + (rate ? `, ${rate.toFixed(1)} frames a second` : "");
}

// --- the codes

function hold_films(texts) { films = texts.map(film => film.map(bytes)); tick_films(); }

let turn = 0;
function tick_films() {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const canvas = i => $("codes").children[i].querySelector("canvas");
  films.forEach((film, i) => paint(canvas(i), film[still ? film.length - 1 : turn % film.length]));
}
setInterval(() => { turn += 1; tick_films(); }, 400);

const names = {" ": "space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓"};
function label_keys() {
  for (let i = 0; i < about.codes; i++) {
    const own = Object.keys(keys).filter(key => keys[key] === i).map(key => names[key] || key);
    $("codes").children[i].querySelector("kbd").textContent = own.join(" ") || "no key";
  }
}

function make_codes() {
  for (let i = 0; i < about.codes; i++) {
    const slot = document.createElement("div"), button = document.createElement("button"), bind = document.createElement("button");
    slot.className = "slot"; button.className = "code"; bind.textContent = "change key";
    button.setAttribute("aria-label", `code ${i}: ${about.words[i]}`);
    const arrow = document.createElement("span"), words = document.createElement("small"), kbd = document.createElement("kbd");
    arrow.className = "arrow"; arrow.textContent = about.arrows[i]; words.textContent = about.words[i];
    button.append(document.createElement("canvas"), arrow, words, kbd); slot.append(button, bind); $("codes").append(slot);
    button.addEventListener("pointerdown", event => { if (event.button === 0) press(i); });
    for (const end of ["pointerup", "pointerleave", "pointercancel"]) button.addEventListener(end, () => release(i));
    button.addEventListener("keydown", event => { if (event.key === "Enter" && !event.repeat) press(i); });
    button.addEventListener("keyup", event => { if (event.key === "Enter") release(i); });
    bind.addEventListener("click", () => { binding = i; say(`press the new key of code ${i} (Escape: leave it)`, true); });
    if (i < 9) keys[String(i + 1)] = i;
  }
  for (const [key, arrow] of [["ArrowLeft", "←"], ["ArrowRight", "→"], ["ArrowUp", "↑"], ["ArrowDown", "↓"]]) {
    const i = about.arrows.indexOf(arrow);
    if (i >= 0) keys[key] = i;
  }
  label_keys();
}

async function legend() {
  if (!await act({do: "hold"})) return;
  $("legendwords").textContent = `films: each held for ${films[0].length} frames from frame ${now.time}. ${about.legend}`;
}

// --- time

function press(code) {
  last = code; following = false;
  if (!held.includes(code)) held.push(code);
  if (mode === "free") { pause(false); run(); } else if (mode === "hold") run(); else one(code);
}
function release(code) { held = held.filter(other => other !== code); }
function halt() { held = []; following = false; if (mode === "free") pause(true); }
function pause(on) {
  paused = on; $("pause").disabled = mode !== "free"; $("pause").firstChild.textContent = on ? "Run " : "Pause ";
}

async function one(code) { if (await act({do: "step", code})) clock(now.ms); }

function next() {
  if (following) return now.to_follow ? {do: "replay"} : null;
  if (held.length) return {do: "step", code: held.at(-1)};
  return mode === "free" && !paused && last !== null ? {do: "step", code: last} : null;
}

async function run() {
  if (running) return;
  running = true; times = [];
  for (let value = next(); value; value = next()) {
    const began = performance.now();
    if (await act(value)) clock(now.ms);
    const wait = 1000 / Math.max(1, Number($("fps").value) || 8) - (performance.now() - began);
    await sleep(Math.max(0, wait));
  }
  running = false; following = false;
}

$("modes").addEventListener("click", event => {
  if (!event.target.dataset.mode) return;
  mode = event.target.dataset.mode; held = [];
  for (const button of $("modes").children) button.setAttribute("aria-pressed", button === event.target);
  pause(false);
  if (mode === "free") run();
});

// --- keys

const typing = target => target.matches("input:not([type=checkbox]):not([type=range]), select, textarea");
const others = {" ": "pause", z: "undo", r: "reset", x: "random"};

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  if (binding !== null) {
    event.preventDefault();
    if (event.key !== "Escape") { keys[event.key] = binding; label_keys(); }
    binding = null; return say("");
  }
  if (event.key === " " && event.target.matches("button, summary, input") && !$("pause").disabled) event.preventDefault();
  else if (event.key === " " && event.target.matches("button, summary, input")) return;
  const code = keys[event.key];
  if (code !== undefined) { event.preventDefault(); if (!event.repeat) press(code); }
  else if (others[event.key] && !event.repeat) { event.preventDefault(); $(others[event.key]).click(); }
});
addEventListener("keyup", event => { if (keys[event.key] !== undefined) release(keys[event.key]); });
addEventListener("blur", () => { held = []; });

$("pause").addEventListener("click", () => { pause(!paused); run(); });
$("undo").addEventListener("click", async () => { await idle(); act({do: "undo"}); });
$("reset").addEventListener("click", async () => { await idle(); act({do: "reset"}); });
$("hold").addEventListener("click", async () => { await idle(); legend(); });
$("random").addEventListener("click", () => { last = Math.floor(Math.random() * about.codes); following = false; one(last); });
$("follow").addEventListener("click", () => { following = true; run(); });
for (const name of ["temperature", "steps", "seed"])
  $(name).addEventListener("change", async () => {
    await idle();
    if (!await act({do: "set", [name]: Number($(name).value)})) $(name).value = now[name];
  });
$("go").addEventListener("click", async () => {
  await idle();
  if (await act({do: "film", number: Number($("number").value)})) legend();
});
$("number").addEventListener("keydown", event => { if (event.key === "Enter") $("go").click(); });
$("file").addEventListener("change", async () => {
  if ($("file").files.length) await upload($("file").files[0]);
  $("file").value = "";
});
$("unsure").addEventListener("change", overlay);

// --- the sketch

function make_sketch() {
  const canvas = $("sketch"), pen = canvas.getContext("2d");
  canvas.width = about.width; canvas.height = about.height;
  const fill = () => { pen.fillStyle = $("colour").value; pen.fillRect(0, 0, canvas.width, canvas.height); };
  for (const colour of ["#7fb8e8", "#7a5a3c", "#62ba48", "#e04040", "#ffcd3c", "#f4f4f4", "#24222e"]) {
    const button = document.createElement("button");
    button.className = "swatch"; button.style.background = colour; button.setAttribute("aria-label", colour);
    button.addEventListener("click", () => { $("colour").value = colour; });
    $("swatches").append(button);
  }
  let from = null;
  const draw = event => {
    const size = Number($("brush").value), box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * canvas.width / box.width, y = (event.clientY - box.top) * canvas.height / box.height;
    const [x0, y0] = from || [x, y], steps = 1 + Math.ceil(Math.hypot(x - x0, y - y0));
    pen.fillStyle = $("colour").value;
    for (let i = 1; i <= steps; i++) {
      const at = (a, b) => Math.round(a + (b - a) * i / steps - size / 2);
      pen.fillRect(at(x0, x), at(y0, y), size, size);
    }
    from = [x, y];
  };
  canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); from = null; draw(event); });
  canvas.addEventListener("pointermove", event => { if (event.buttons) draw(event); });
  $("fill").addEventListener("click", fill);
  $("copy").addEventListener("click", () => paint(canvas, bytes(now.frame)));
  $("draw").addEventListener("click", () => canvas.toBlob(blob => upload(blob), "image/png"));
  $("colour").value = "#7fb8e8"; fill(); $("colour").value = "#e04040";
}

(async () => {
  try {
    about = await ask("/about");
    $("title").textContent = about.title; $("subtitle").textContent = about.subtitle;
    $("films").textContent = about.game ? "held-out level" : "held-out film"; $("number").max = about.films - 1;
    make_codes(); make_sketch(); show(await ask("/state")); await legend();
    document.body.dataset.ready = "yes";
  } catch (error) { say(error.message); }
})();
</script>
</body>
</html>
"""
