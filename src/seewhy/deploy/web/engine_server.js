// Predict on the server that this page comes from.
export const where = "Images are sent to the server this page comes from; nothing is stored.";

const TRIES = 30; // of an overloaded server, a second apart
let key = sessionStorage.getItem("seewhy-key") ?? "";

async function request(address, options = {}, tries = 0) {
  let response;
  try {
    response = await fetch(address, { ...options, headers: key ? { "X-API-Key": key } : {} });
  } catch {
    throw new Error("The server does not respond; is it still running?");
  }
  if (response.status === 401) {
    key = prompt("This server requires an API key:") ?? "";
    if (!key) throw new Error("The server requires an API key.");
    sessionStorage.setItem("seewhy-key", key);
    return request(address, options, tries);
  }
  if (response.status === 503 && tries < TRIES) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * (Number(response.headers.get("Retry-After")) || 1)));
    return request(address, options, tries + 1);
  }
  const body = await response.json().catch(() => null); // a proxy may send a page of its own
  if (!body?.error && !(response.ok && body)) throw new Error(`The server sent status ${response.status} and no valid JSON.`);
  if (!response.ok) throw new Error(body.error.message.replace(`${options.name}: `, ""));
  return body;
}

export const describe = () => request("model");

// Return {probs: C, ood, belowThreshold, maps: {values, shape: [C, h, w]} or null} of an image file; throw Error with a message for people.
export async function predict(file, model) {
  const form = new FormData();
  form.append("files", file, file.name ?? "image");
  const body = await request(`predict?top_k=${model.classes.length}${model.heatmaps ? "&heatmap=all" : ""}`, { method: "POST", body: form, name: file.name });
  const [prediction] = body.answers;
  const indexOf = new Map(model.classes.map((name, c) => [name, c]));
  const probs = new Float32Array(model.classes.length);
  for (const { class_name, prob } of prediction.top) probs[indexOf.get(class_name)] = prob;
  const maps = prediction.heatmap && { shape: prediction.heatmap.shape, values: Float32Array.from(atob(prediction.heatmap.bytes), (c) => c.charCodeAt(0) / 255) };
  return { probs, ood: prediction.ood, belowThreshold: prediction.below_threshold, maps: maps ?? null };
}
