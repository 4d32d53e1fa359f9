// Images -> answers, bars and heatmaps on the page. engine.js answers: the server does, or the browser itself.
import { draw } from "./heat.js";
import { answer, describe, where } from "./engine.js";

const element = (id) => document.getElementById(id);
const percent = (share) => (share > 0.9995 && share < 1 ? "> 99.9%" : share < 0.0005 && share > 0 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`);
const readable = (name) => name.replaceAll("_", " ");
const SHOWN = 5, LARGEST = 1200, THUMBNAIL = 160; // pixels a side

let about = null;
let queue = null; // what is being looked at; starts with the classifier itself
const given = []; // {name, image, found, target}
let current = null;

// ---------------------------------------------------------------- start

async function start() {
  complain("");
  element("where").textContent = where;
  try {
    about = await describe();
  } catch (error) {
    element("about").textContent = "";
    complain(error.message);
    return;
  }
  const interval = about.test_accuracy_ci95 ? ` (95% interval ${about.test_accuracy_ci95.map(percent).join(" to ")})` : "";
  element("about").textContent = `tells ${about.classes.length} classes apart; right on ${percent(about.test_accuracy)}${interval} of ${about.test_images} test images`;
  for (const name of about.classes) element("names").append(new Option(readable(name)));
  element("all").textContent = about.classes.map(readable).join(", ");
  element("known").hidden = false;
  element("slide").hidden = element("scale").hidden = !about.heatmaps;
  document.body.dataset.ready = "yes";
}

// ---------------------------------------------------------------- images in

// One after the other, in the order given.
function take(files) {
  const chosen = [...files]; // before the browser empties the list
  queue = queue.then(() => look(chosen));
}

async function look(files) {
  if (!about) await start(); // the last attempt failed
  if (!about) return;
  complain("");
  const kept = [...files].filter((file) => file.type.startsWith("image/") || !file.type);
  if (files.length && !kept.length) complain("None of these files is an image.");
  let first = true;
  for (const [n, file] of kept.entries()) {
    element("state").textContent = `looking at ${file.name ?? "the image"}, ${n + 1} of ${kept.length}`;
    document.body.classList.add("overloaded");
    try {
      const found = await answer(file, about);
      const entry = { name: file.name ?? "image", image: await small(file, LARGEST), found, target: top(found)[0] };
      given.push(entry);
      document.body.classList.add("has");
      addToStrip(entry);
      if (first) show(entry, true);
      first = false;
    } catch (error) {
      complain(`${element("problem").textContent}${element("problem").textContent ? "\n" : ""}${file.name ?? "image"}: ${error.message}`);
    }
  }
  document.body.classList.remove("overloaded");
  element("state").textContent = "";
}

// A canvas of the image, upright, at most `side` pixels a side; a grey one where this browser cannot show the file.
async function small(file, side) {
  const canvas = document.createElement("canvas");
  try {
    const bitmap = await createImageBitmap(file);
    const share = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
    canvas.width = Math.max(1, Math.round(bitmap.width * share));
    canvas.height = Math.max(1, Math.round(bitmap.height * share));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // what is transparent lies over white, as for the classifier
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

const top = (found) => [...found.probs.keys()].sort((a, b) => found.probs[b] - found.probs[a]);

// ---------------------------------------------------------------- answers out

function addToStrip(entry) {
  const button = document.createElement("button");
  button.type = "button";
  const canvas = document.createElement("canvas");
  const share = THUMBNAIL / Math.max(entry.image.width, entry.image.height);
  canvas.width = Math.max(1, Math.round(entry.image.width * share));
  canvas.height = Math.max(1, Math.round(entry.image.height * share));
  canvas.getContext("2d").drawImage(entry.image, 0, 0, canvas.width, canvas.height);
  const label = document.createElement("span");
  const name = readable(about.classes[top(entry.found)[0]]);
  label.textContent = entry.found.ood ? "out-of-distribution" : entry.found.belowThreshold ? `${name}?` : name;
  button.title = entry.name;
  button.append(canvas, label);
  button.addEventListener("click", () => show(entry));
  entry.button = button;
  element("strip").append(button);
  element("strip").hidden = given.length < 2;
}

function show(entry, focus = false) {
  current = entry;
  element("result").hidden = false;
  for (const other of given) other.button.setAttribute("aria-pressed", other === entry);
  const order = top(entry.found), best = entry.found.probs[order[0]], name = readable(about.classes[order[0]]);
  const { ood, belowThreshold } = entry.found;
  element("verdict").textContent = ood ? `Looks like nothing I was trained on` : belowThreshold ? `Not sure; perhaps ${name}` : name;
  element("remark").classList.toggle("warn", ood || belowThreshold);
  element("remark").textContent = ood
    ? `If it had to be one of my classes: ${name}, ${percent(best)}. Do not rely on it.`
    : belowThreshold
      ? `${percent(best)} is less than the ${percent(about.confidence_threshold)} I want before I answer${about.precision ? `, to be right in ${percent(about.precision)} of my answers` : ""}.`
      : `with a probability of ${percent(best)}`;
  element("search").value = "";
  bars();
  paint();
  if (focus) element("verdict").focus({ preventScroll: true });
}

// A button a class: the most probable ones, and the chosen one if it is none of them.
function bars() {
  const order = top(current.found), shown = order.slice(0, SHOWN);
  if (!shown.includes(current.target)) shown.push(current.target);
  element("bars").replaceChildren(...shown.map((number) => {
    const button = document.createElement("button"), fill = document.createElement("span"), name = document.createElement("span"), share = document.createElement("span");
    button.type = "button";
    button.dataset.number = number;
    button.setAttribute("aria-pressed", number === current.target);
    fill.className = "fill"; name.className = "name"; share.className = "share";
    fill.style.width = `${100 * current.found.probs[number]}%`;
    name.textContent = readable(about.classes[number]);
    share.textContent = percent(current.found.probs[number]);
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
  const { image, found, target, name } = current, class_name = readable(about.classes[target]);
  let map = null;
  if (found.maps) {
    const [, height, width] = found.maps.shape, cells = height * width;
    map = { height, width, values: found.maps.values.subarray(target * cells, (target + 1) * cells) };
  }
  const empty = map && map.values.every((value) => value === 0);
  draw(element("image"), image, map, element("opacity").value / 100, box(image.width, image.height));
  element("caption").textContent = !map ? name : empty ? `${name}: nothing in it speaks for ${class_name}` : `${name}: what glows speaks for ${class_name}`;
  element("image").setAttribute("aria-label", element("caption").textContent);
}

// What of the image its maps cover, as shares of its sides: left, top, width, height.
function box(width, height) {
  if (about.crop_fraction === null) return [0, 0, 1, 1];
  const side = about.crop_fraction * Math.min(width, height);
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
    element("snap").click(); // phones have a camera behind their file dialog
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
  if (!video.videoWidth) return; // nothing to see yet
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    closeCamera();
    take([new File([blob], "camera.jpg", { type: "image/jpeg" })]);
  }, "image/jpeg", 0.95);
}

// ---------------------------------------------------------------- doors

element("choose").addEventListener("click", () => element("files").click());
element("camera").addEventListener("click", openCamera);
element("shoot").addEventListener("click", shoot);
element("leave").addEventListener("click", closeCamera);
element("booth").addEventListener("cancel", closeCamera);
element("opacity").addEventListener("input", () => current && paint());
for (const id of ["files", "snap"]) {
  element(id).addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = "";
  });
}
element("search").addEventListener("change", (event) => {
  if (!current) return;
  complain("");
  const number = about.classes.findIndex((name) => readable(name).toLowerCase() === event.target.value.trim().toLowerCase());
  if (number >= 0) choose(number);
  else if (event.target.value) complain(`No class is named ${event.target.value}.`);
});
document.addEventListener("paste", (event) => event.clipboardData?.files.length && take(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
queue = start();
