// Answers by the server that this page comes from.
export const where = "Images are sent to the server this page comes from; it answers and keeps nothing.";

const TRIES = 30; // of a busy server, a second each
let key = sessionStorage.getItem("seewhy-key") ?? "";

async function ask(address, options = {}, tries = 0) {
  let response;
  try {
    response = await fetch(address, { ...options, headers: key ? { "X-API-Key": key } : {} });
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  if (response.status === 401) {
    key = prompt("This server wants a key:") ?? "";
    if (!key) throw new Error("The server wants a key.");
    sessionStorage.setItem("seewhy-key", key);
    return ask(address, options, tries);
  }
  if (response.status === 503 && tries < TRIES) {
    await new Promise((wake) => setTimeout(wake, 1000 * (Number(response.headers.get("Retry-After")) || 1)));
    return ask(address, options, tries + 1);
  }
  const body = await response.json().catch(() => null); // a proxy in between may answer with a page of its own
  if (!body?.error && !(response.ok && body)) throw new Error(`The server answers with status ${response.status}, and nothing this page understands.`);
  if (!response.ok) throw new Error(body.error.message.replace(`${options.name}: `, ""));
  return body;
}

export const describe = () => ask("classes");

// An image file -> {probs, ood, belowThreshold, maps: {values, shape: [C, h, w]} or null}; throws Error with a sentence.
export async function answer(file, about) {
  const form = new FormData();
  form.append("files", file, file.name ?? "image");
  const body = await ask(`predict?top_k=${about.classes.length}${about.heatmaps ? "&heatmap=all" : ""}`, { method: "POST", body: form, name: file.name });
  const [found] = body.answers;
  const number = new Map(about.classes.map((name, n) => [name, n]));
  const probs = new Float32Array(about.classes.length);
  for (const choice of found.top) probs[number.get(choice.class_name)] = choice.prob;
  const maps = found.heatmap && { shape: found.heatmap.shape, values: Float32Array.from(atob(found.heatmap.bytes), (c) => c.charCodeAt(0) / 255) };
  return { probs, ood: found.ood, belowThreshold: found.below_threshold, maps: maps ?? null };
}
