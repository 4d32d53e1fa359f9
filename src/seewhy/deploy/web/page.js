// Show predictions and heatmaps of images. engine.js predicts, on the server or in the browser.
import { draw } from "./heat.js";
import { describe, predict, where } from "./engine.js";

const element = (id) => document.getElementById(id);
const percent = (share) => (share > 0.9995 && share < 1 ? "> 99.9%" : share < 0.0005 && share > 0 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`);
const readable = (name) => name.replaceAll("_", " ");
const SHOWN = 5, LARGEST = 1200, THUMBNAIL = 160; // pixels a side

let model = null; // ModelInfo
let queue = null; // a promise: the model is loaded, then images are predicted one after the other
const entries = []; // {name, image, prediction, target}
let current = null;

// ---------------------------------------------------------------- start

async function start() {
  complain("");
  element("where").textContent = where;
  try {
    model = await describe();
  } catch (error) {
    element("about").textContent = "";
    complain(error.message);
    return;
  }
  const interval = model.test_accuracy_ci95 ? ` (95% interval ${model.test_accuracy_ci95.map(percent).join(" to ")})` : "";
  element("about").textContent = `${model.classes.length} classes; accuracy ${percent(model.test_accuracy)}${interval} on ${model.test_images} test images`;
  for (const name of model.classes) element("names").append(new Option(readable(name)));
  element("all").textContent = model.classes.map(readable).join(", ");
  element("known").hidden = false;
  element("slide").hidden = element("scale").hidden = !model.heatmaps;
  document.body.dataset.ready = "yes";
}

// ---------------------------------------------------------------- input

// Queue files behind those added before.
function add(files) {
  const copy = [...files]; // before the browser empties the list
  queue = queue.then(() => predictAll(copy));
}

async function predictAll(files) {
  if (!model) await start(); // loading it has failed before
  if (!model) return;
  complain("");
  const images = files.filter((file) => file.type.startsWith("image/") || !file.type);
  if (files.length && !images.length) complain("None of these files is an image.");
  let first = true;
  for (const [n, file] of images.entries()) {
    element("state").textContent = `predicting ${file.name ?? "the image"}, ${n + 1} of ${images.length}`;
    document.body.classList.add("busy");
    try {
      const prediction = await predict(file, model);
      const entry = { name: file.name ?? "image", image: await drawing(file, LARGEST), prediction, target: ranking(prediction)[0] };
      entries.push(entry);
      document.body.classList.add("has");
      addToStrip(entry);
      if (first) show(entry, true);
      first = false;
    } catch (error) {
      complain(`${element("problem").textContent}${element("problem").textContent ? "\n" : ""}${file.name ?? "image"}: ${error.message}`);
    }
  }
  document.body.classList.remove("busy");
  element("state").textContent = "";
}

// Return a canvas of the upright image, at most `side` pixels a side; a grey one if this browser cannot decode the file.
async function drawing(file, side) {
  const canvas = document.createElement("canvas");
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // behind transparent pixels, as for the model
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
  } catch {
    canvas.width = canvas.height = 300;
    const context = canvas.getContext("2d");
    context.fillStyle = "#888";
    context.fillRect(0, 0, 300, 300);
  }
  return canvas;
}

const ranking = ({ probs }) => [...probs.keys()].sort((a, b) => probs[b] - probs[a]);

// ---------------------------------------------------------------- results

function addToStrip(entry) {
  const button = document.createElement("button");
  button.type = "button";
  const canvas = document.createElement("canvas");
  const scale = THUMBNAIL / Math.max(entry.image.width, entry.image.height);
  canvas.width = Math.max(1, Math.round(entry.image.width * scale));
  canvas.height = Math.max(1, Math.round(entry.image.height * scale));
  canvas.getContext("2d").drawImage(entry.image, 0, 0, canvas.width, canvas.height);
  const label = document.createElement("span");
  const name = readable(model.classes[ranking(entry.prediction)[0]]);
  label.textContent = entry.prediction.ood ? "unlike training" : entry.prediction.belowThreshold ? `${name}?` : name;
  button.title = entry.name;
  button.append(canvas, label);
  button.addEventListener("click", () => show(entry));
  entry.button = button;
  element("strip").append(button);
  element("strip").hidden = entries.length < 2;
}

function show(entry, focus = false) {
  current = entry;
  element("result").hidden = false;
  for (const other of entries) other.button.setAttribute("aria-pressed", other === entry);
  const order = ranking(entry.prediction), best = entry.prediction.probs[order[0]], name = readable(model.classes[order[0]]);
  const { ood, belowThreshold } = entry.prediction;
  element("verdict").textContent = ood ? "Unlike the training images" : belowThreshold ? `Not sure: perhaps ${name}` : name;
  element("remark").classList.toggle("warn", ood || belowThreshold);
  element("remark").textContent = ood
    ? `The closest class is ${name} (${percent(best)}). Do not rely on it.`
    : belowThreshold
      ? `${percent(best)} is below the threshold of ${percent(model.confidence_threshold)}${model.precision ? `, which keeps ${percent(model.precision)} of decisions correct` : ""}.`
      : `with a probability of ${percent(best)}`;
  element("search").value = "";
  bars();
  paint();
  if (focus) element("verdict").focus({ preventScroll: true });
}

// One button per class: the most probable ones, and the chosen one.
function bars() {
  const order = ranking(current.prediction), shown = order.slice(0, SHOWN);
  if (!shown.includes(current.target)) shown.push(current.target);
  element("bars").replaceChildren(...shown.map((number) => {
    const button = document.createElement("button"), fill = document.createElement("span"), name = document.createElement("span"), share = document.createElement("span");
    button.type = "button";
    button.dataset.number = number;
    button.setAttribute("aria-pressed", number === current.target);
    fill.className = "fill"; name.className = "name"; share.className = "share";
    fill.style.width = `${100 * current.prediction.probs[number]}%`;
    name.textContent = readable(model.classes[number]);
    share.textContent = percent(current.prediction.probs[number]);
    button.append(fill, name, share);
    button.addEventListener("click", () => choose(number));
    return button;
  }));
}

function choose(number) {
  const focused = document.activeElement?.dataset?.number;
  current.target = number;
  bars();
  paint();
  if (focused) element("bars").querySelector(`[data-number="${number}"]`)?.focus();
}

function paint() {
  const { image, prediction, target, name } = current, className = readable(model.classes[target]);
  let map = null;
  if (prediction.maps) {
    const [, height, width] = prediction.maps.shape, cells = height * width;
    map = { height, width, values: prediction.maps.values.subarray(target * cells, (target + 1) * cells) };
  }
  const empty = map && map.values.every((value) => value === 0);
  draw(element("image"), image, map, element("opacity").value / 100, box(image.width, image.height));
  element("caption").textContent = !map ? name : empty ? `${name}: no evidence for ${className}` : `${name}: evidence for ${className}`;
  element("image").setAttribute("aria-label", element("caption").textContent);
}

// Return the part of the image that heatmaps cover: [left, top, width, height] as shares of its sides.
function box(width, height) {
  if (model.crop_fraction === null) return [0, 0, 1, 1];
  const side = model.crop_fraction * Math.min(width, height);
  return [(width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height];
}

function complain(text) {
  element("problem").textContent = text;
}

// ---------------------------------------------------------------- camera

async function openCamera() {
  complain("");
  element("camera").disabled = true; // one stream at a time
  try {
    element("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    element("booth").showModal();
  } catch {
    element("snap").click(); // phones offer the camera in their file dialog
  }
  element("camera").disabled = false;
}

function closeCamera() {
  for (const track of element("video").srcObject?.getTracks() ?? []) track.stop();
  element("video").srcObject = null;
  element("booth").close();
}

function shoot() {
  const video = element("video"), canvas = document.createElement("canvas");
  if (!video.videoWidth) return; // no frame yet
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    closeCamera();
    add([new File([blob], "camera.jpg", { type: "image/jpeg" })]);
  }, "image/jpeg", 0.95);
}

// ---------------------------------------------------------------- events

element("choose").addEventListener("click", () => element("files").click());
element("camera").addEventListener("click", openCamera);
element("shoot").addEventListener("click", shoot);
element("leave").addEventListener("click", closeCamera);
element("booth").addEventListener("cancel", closeCamera);
element("opacity").addEventListener("input", () => current && paint());
for (const id of ["files", "snap"]) {
  element(id).addEventListener("change", (event) => {
    add([...event.target.files]);
    event.target.value = "";
  });
}
element("search").addEventListener("change", (event) => {
  if (!current) return;
  complain("");
  const number = model.classes.findIndex((name) => readable(name).toLowerCase() === event.target.value.trim().toLowerCase());
  if (number >= 0) choose(number);
  else if (event.target.value) complain(`No class is named ${event.target.value}.`);
});
document.addEventListener("paste", (event) => event.clipboardData?.files.length && add(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(event.dataTransfer.files);
});
queue = start();
