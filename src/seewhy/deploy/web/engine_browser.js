// Answers by the browser itself: onnxruntime-web runs model.onnx, and no image leaves the machine.
import * as ort from "./ort/ort.wasm.min.mjs";

export const where = "Images stay on this device: the classifier runs in your browser.";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency ?? 1) : 1; // threads need isolation
ort.env.logLevel = "error";

let session = null;

async function fetched(name) {
  const response = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!response?.ok) throw new Error(`${name} cannot be loaded; a folder like this has to be opened through a web server.`);
  return response;
}

export async function describe() {
  const about = await (await fetched("./model.json")).json();
  const model = new Uint8Array(await (await fetched("./model.onnx")).arrayBuffer());
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  return about;
}

// An image file -> {probs, ood, belowThreshold, maps: {values, shape: [C, h, w]} or null}; throws Error with a sentence.
export async function answer(file, about) {
  const { data, width, height } = await pixels(file, about.min_decode_side);
  const found = await session.run({ images: new ort.Tensor("uint8", data, [1, height, width, 3]) });
  const probs = found.probabilities.data;
  return {
    probs,
    ood: about.ood_threshold !== null && Boolean(found.ood_score) && found.ood_score.data[0] > about.ood_threshold,
    belowThreshold: Math.max(...probs) < about.confidence_threshold,
    maps: found.heatmaps ? { values: found.heatmaps.data, shape: found.heatmaps.dims.slice(1) } : null,
  };
}

// RGB bytes of the upright image over white, its shorter side at most `min_decode_side` pixels: more of them show in no square.
async function pixels(file, min_decode_side) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("this browser cannot read it as an image");
  }
  const share = Math.min(1, min_decode_side / Math.min(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * share)), height = Math.max(1, Math.round(bitmap.height * share));
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data, data = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
  }
  return { data, width, height };
}
