// Predict in the browser: onnxruntime-web runs model.onnx, and no image leaves the machine.
import * as ort from "./ort/ort.wasm.min.mjs";

export const where = "Images stay on this device: the classifier runs in your browser.";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency ?? 1) : 1; // threads need isolation
ort.env.logLevel = "error";

let session = null;

async function fetchFile(name) {
  const response = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!response?.ok) throw new Error(`${name} cannot be loaded; open this folder through a web server.`);
  return response;
}

export async function describe() {
  const info = await (await fetchFile("./model.json")).json();
  const content = new Uint8Array(await (await fetchFile("./model.onnx")).arrayBuffer());
  session = await ort.InferenceSession.create(content, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  return info;
}

// Return {probs: C, ood, belowThreshold, maps: {values, shape: [C, h, w]} or null} of an image file; throw Error with a message for people.
export async function predict(file, model) {
  const { data, width, height } = await pixels(file, model.min_decode_side);
  const outputs = await session.run({ images: new ort.Tensor("uint8", data, [1, height, width, 3]) });
  const probs = outputs.probabilities.data;
  return {
    probs,
    ood: model.ood_threshold !== null && Boolean(outputs.ood_score) && outputs.ood_score.data[0] > model.ood_threshold,
    belowThreshold: Math.max(...probs) < model.confidence_threshold,
    maps: outputs.heatmaps ? { values: outputs.heatmaps.data, shape: outputs.heatmaps.dims.slice(1) } : null,
  };
}

// Return RGB bytes of the upright image over white, its shorter side at most `minSide` pixels: more change no prediction.
async function pixels(file, minSide) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("this browser cannot read it as an image");
  }
  const scale = Math.min(1, minSide / Math.min(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale));
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
