"""Draw the synthetic demo set from a seed: objects of 8 classes on textured backgrounds, with masks."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from seewhy.core.files import atomic_folder, locked, remove_tree

IMAGES_PER_CLASS = 60
SEED = 101
VERSION = "2"  # part of the folder's marker: raised when the drawing or its folders change
_SUPERSAMPLE = 3

# Each object is a list of (shape, colour role, points) in a unit square, x right, y down.
# Shapes: polygon (points), ellipse (a box), ring (a box; drawn as an outline of width 0.07).
Shape = tuple[str, str, list[tuple[float, float]]]
OBJECTS: dict[str, list[Shape]] = {
    "boat": [
        ("polygon", "main", [(0.05, 0.68), (0.95, 0.68), (0.78, 0.92), (0.22, 0.92)]),
        ("polygon", "dark", [(0.47, 0.06), (0.51, 0.06), (0.51, 0.68), (0.47, 0.68)]),
        ("polygon", "light", [(0.54, 0.08), (0.9, 0.6), (0.54, 0.6)]),
        ("polygon", "accent", [(0.44, 0.2), (0.44, 0.6), (0.16, 0.6)]),
    ],
    "car": [
        ("polygon", "main", [(0.02, 0.5), (0.2, 0.48), (0.34, 0.28), (0.7, 0.28), (0.84, 0.48), (0.98, 0.54), (0.98, 0.72), (0.02, 0.72)]),
        ("polygon", "light", [(0.27, 0.47), (0.37, 0.33), (0.5, 0.33), (0.5, 0.47)]),
        ("polygon", "light", [(0.54, 0.47), (0.54, 0.33), (0.67, 0.33), (0.77, 0.47)]),
        ("ellipse", "dark", [(0.13, 0.58), (0.37, 0.82)]),
        ("ellipse", "dark", [(0.63, 0.58), (0.87, 0.82)]),
        ("ellipse", "accent", [(0.2, 0.65), (0.3, 0.75)]),
        ("ellipse", "accent", [(0.7, 0.65), (0.8, 0.75)]),
    ],
    "fish": [
        ("polygon", "accent", [(0.68, 0.5), (0.98, 0.24), (0.9, 0.5), (0.98, 0.76)]),
        ("polygon", "accent", [(0.34, 0.3), (0.5, 0.1), (0.62, 0.34)]),
        ("ellipse", "main", [(0.03, 0.25), (0.78, 0.75)]),
        ("ellipse", "light", [(0.13, 0.36), (0.27, 0.5)]),
        ("ellipse", "dark", [(0.17, 0.4), (0.24, 0.47)]),
        ("polygon", "dark", [(0.36, 0.34), (0.4, 0.34), (0.43, 0.5), (0.4, 0.66), (0.36, 0.66), (0.39, 0.5)]),
    ],
    "house": [
        ("polygon", "light", [(0.14, 0.44), (0.86, 0.44), (0.86, 0.95), (0.14, 0.95)]),
        ("polygon", "main", [(0.02, 0.46), (0.5, 0.05), (0.98, 0.46)]),
        ("polygon", "dark", [(0.42, 0.64), (0.6, 0.64), (0.6, 0.95), (0.42, 0.95)]),
        ("polygon", "accent", [(0.2, 0.54), (0.36, 0.54), (0.36, 0.7), (0.2, 0.7)]),
        ("polygon", "accent", [(0.66, 0.54), (0.8, 0.54), (0.8, 0.7), (0.66, 0.7)]),
    ],
    "mug": [
        ("ring", "main", [(0.52, 0.3), (0.96, 0.74)]),
        ("polygon", "main", [(0.1, 0.15), (0.72, 0.15), (0.68, 0.92), (0.14, 0.92)]),
        ("ellipse", "dark", [(0.1, 0.08), (0.72, 0.23)]),
        ("polygon", "accent", [(0.115, 0.42), (0.705, 0.42), (0.69, 0.6), (0.13, 0.6)]),
    ],
    "mushroom": [
        ("polygon", "light", [(0.4, 0.5), (0.6, 0.5), (0.66, 0.95), (0.34, 0.95)]),
        ("polygon", "main", [(0.04, 0.56), (0.1, 0.32), (0.26, 0.14), (0.5, 0.07), (0.74, 0.14), (0.9, 0.32), (0.96, 0.56)]),
        ("ellipse", "light", [(0.22, 0.26), (0.38, 0.42)]),
        ("ellipse", "light", [(0.5, 0.14), (0.62, 0.26)]),
        ("ellipse", "light", [(0.64, 0.32), (0.82, 0.48)]),
    ],
    "tree": [
        ("polygon", "dark", [(0.43, 0.7), (0.57, 0.7), (0.6, 0.97), (0.4, 0.97)]),
        ("polygon", "main", [(0.5, 0.42), (0.92, 0.78), (0.08, 0.78)]),
        ("polygon", "accent", [(0.5, 0.22), (0.82, 0.56), (0.18, 0.56)]),
        ("polygon", "main", [(0.5, 0.03), (0.72, 0.34), (0.28, 0.34)]),
    ],
    "umbrella": [
        ("polygon", "dark", [(0.48, 0.4), (0.52, 0.4), (0.52, 0.9), (0.48, 0.9)]),
        ("ring", "dark", [(0.32, 0.78), (0.52, 0.98)]),
        ("polygon", "main", [(0.02, 0.5), (0.1, 0.28), (0.28, 0.12), (0.5, 0.06), (0.5, 0.5)]),
        ("polygon", "accent", [(0.98, 0.5), (0.9, 0.28), (0.72, 0.12), (0.5, 0.06), (0.5, 0.5)]),
        ("polygon", "light", [(0.34, 0.5), (0.4, 0.24), (0.5, 0.06), (0.6, 0.24), (0.66, 0.5)]),
    ],
}  # fmt: skip


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * r), round(255 * g), round(255 * b)


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Two muted colours mixed by smooth noise, stripes in half of the images, and grain."""
    cells = int(rng.integers(3, 12))
    noise = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    mask = noise.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        angle, pitch = rng.uniform(0, np.pi), rng.uniform(12, 40)
        y, x = np.mgrid[0:height, 0:width]
        wave = 127 + 127 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / pitch)
        mask = Image.blend(mask, Image.fromarray(wave.astype(np.uint8)), 0.5)
    one = Image.new("RGB", (width, height), _colour(rng, (0.05, 0.45), (0.35, 0.95)))
    two = Image.new("RGB", (width, height), _colour(rng, (0.05, 0.45), (0.35, 0.95)))
    mixed = np.asarray(Image.composite(one, two, mask), dtype=np.float64)
    grain = rng.normal(0, 6, size=(height, width, 1))
    return Image.fromarray(np.clip(mixed + grain, 0, 255).astype(np.uint8))


def _add_distractors(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw 4 to 9 bright bars, discs and triangles."""
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 10))):
        colour = _colour(rng, (0.3, 1.0), (0.3, 1.0))
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        r = rng.uniform(6, 22)
        kind = int(rng.integers(3))
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            corners = 3 if kind == 1 else 4
            turns = np.sort(rng.uniform(0, 2 * np.pi, corners))
            draw.polygon([(x + r * np.cos(t), y + r * np.sin(t)) for t in turns], fill=colour)


def _draw_object(rng: np.random.Generator, shapes: list[Shape], side: int) -> Image.Image:
    """The object as RGBA, in random colours, mirrored half of the time, rotated by up to 20 degrees."""
    roles = {
        "main": _colour(rng, (0.6, 1.0), (0.55, 1.0)),
        "accent": _colour(rng, (0.5, 1.0), (0.5, 1.0)),
        "light": _colour(rng, (0.0, 0.25), (0.85, 1.0)),
        "dark": _colour(rng, (0.1, 0.6), (0.1, 0.35)),
    }
    big = side * _SUPERSAMPLE
    layer = Image.new("RGBA", (big, big))
    draw = ImageDraw.Draw(layer)
    for kind, role, points in shapes:
        scaled = [(x * big, y * big) for x, y in points]
        if kind == "polygon":
            draw.polygon(scaled, fill=roles[role])
        elif kind == "ellipse":
            draw.ellipse([*scaled[0], *scaled[1]], fill=roles[role])
        else:
            draw.ellipse([*scaled[0], *scaled[1]], outline=roles[role], width=round(0.07 * big))
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    return layer.resize((layer.width // _SUPERSAMPLE, layer.height // _SUPERSAMPLE), Image.Resampling.LANCZOS)


def draw_scene(name: str, number: int, seed: int = SEED) -> tuple[Image.Image, Image.Image]:
    """Draw image `number` of class `name` (RGB) and its mask (L, 255 on the object) of the same size."""
    rng = np.random.default_rng([seed, sorted(OBJECTS).index(name), number])
    width, height = (int(v) for v in rng.integers(240, 300, size=2))
    image = _background(rng, width, height)
    _add_distractors(rng, image)
    thing = _draw_object(rng, OBJECTS[name], int(rng.uniform(0.3, 0.6) * min(width, height)))
    # Inside the evaluation view, the centred 7/8.
    edge = min(width, height) / 16
    side_x, side_y = (width - min(width, height)) / 2 + edge, (height - min(width, height)) / 2 + edge
    left = round(rng.uniform(side_x, max(side_x, width - side_x - thing.width)))
    top = round(rng.uniform(side_y, max(side_y, height - side_y - thing.height)))
    alpha = Image.new("L", image.size)
    alpha.paste(thing.getchannel("A"), (left, top))
    shadow = ImageChops.offset(alpha, 3, 4).filter(ImageFilter.GaussianBlur(4)).point(lambda v: v * 0.4)
    image.paste((0, 0, 0), mask=shadow)
    image.paste(thing.convert("RGB"), (left, top), thing.getchannel("A"))
    return image, alpha.point(lambda v: 255 * (v > 127))


def draw_scenes(root: Path, per_class: int = IMAGES_PER_CLASS) -> Path:
    """Draw the set into root/images/CLASS/NNN.jpg and root/masks/CLASS/NNN.png unless it is there. Returns root."""
    marker, content = root / "complete.txt", f"scenes {VERSION}, seed {SEED}, {per_class} a class"

    def is_complete() -> bool:
        return marker.is_file() and marker.read_text() == content

    if is_complete():
        return root
    advice = "set SEEWHY_CACHE to a writable folder"
    with locked(root, advice, wait_s=-1):
        if not is_complete():  # another process may have drawn it
            remove_tree(root)
            with atomic_folder(root, advice, durable=False) as work:  # a thousand small files
                for name in OBJECTS:
                    for folder in ("images", "masks"):
                        (work / folder / name).mkdir(parents=True)
                    for number in range(per_class):
                        image, mask = draw_scene(name, number)
                        image.save(work / "images" / name / f"{number:03d}.jpg", quality=92)
                        mask.save(work / "masks" / name / f"{number:03d}.png")
                (work / marker.name).write_text(content)
    return root
