// A heatmap laid over an image; heat.py draws the same colours on the server.
const STOPS = [0, 0.25, 0.5, 0.75, 1];
const COLOURS = [[70, 20, 90, 0], [150, 35, 90, 90], [225, 80, 45, 160], [250, 165, 20, 200], [252, 245, 120, 225]];

function colour(value) {
  let k = 1;
  while (k < STOPS.length - 1 && value > STOPS[k]) k += 1;
  const share = Math.min(1, Math.max(0, (value - STOPS[k - 1]) / (STOPS[k] - STOPS[k - 1])));
  return COLOURS[k].map((high, channel) => COLOURS[k - 1][channel] + share * (high - COLOURS[k - 1][channel]));
}

// Value of a map (height x width, values 0 to 1) at a place given in shares of its sides, bilinear between the cells' centres.
function valueAt(map, x, y) {
  const column = Math.min(map.width - 1, Math.max(0, x * map.width - 0.5)), row = Math.min(map.height - 1, Math.max(0, y * map.height - 0.5));
  const left = Math.floor(column), top = Math.floor(row), right = Math.min(map.width - 1, left + 1), low = Math.min(map.height - 1, top + 1);
  const across = column - left, down = row - top, at = (r, c) => map.values[r * map.width + c];
  return (1 - down) * ((1 - across) * at(top, left) + across * at(top, right)) + down * ((1 - across) * at(low, left) + across * at(low, right));
}

// Draws the image, and over it the map (or null) with this opacity, into the canvas. box: what of the image the map covers,
// as shares of its sides: left, top, width, height.
export function draw(canvas, image, map, opacity, box = [0, 0, 1, 1]) {
  canvas.width = image.width;
  canvas.height = image.height;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  if (!map || opacity === 0) return;
  const side = 160, layer = new OffscreenCanvas(side, side), pixels = new ImageData(side, side);
  for (let y = 0; y < side; y += 1) {
    for (let x = 0; x < side; x += 1) pixels.data.set(colour(valueAt(map, (x + 0.5) / side, (y + 0.5) / side)), 4 * (y * side + x));
  }
  layer.getContext("2d").putImageData(pixels, 0, 0);
  context.globalAlpha = opacity;
  context.imageSmoothingQuality = "high";
  context.drawImage(layer, box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height);
  context.globalAlpha = 1;
}
