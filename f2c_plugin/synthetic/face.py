"""Synthetic face crops: an endless labeled dataset without a download.

An identity is a vector of independent traits in [0, 1). A picture of it is painted layer by layer with a random pose,
expression, light and occlusion. Lengths are in face pixels: picture pixels at scale 1, x to the right and y down, with
the origin near the bridge of the nose. Every shape is a signed distance in these coordinates, and its edge is softened
over about one pixel. A head turn is a smooth warp of the coordinates, done once per picture, so each feature is drawn
as if seen from the front.

The same seed gives the same bytes on every machine: drawing uses only arithmetic and square roots, which IEEE 754
rounds exactly, and no reductions.
"""

from collections.abc import Sequence
from copy import copy
from math import sqrt
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray
Number = TypeVar("Number", float, np.ndarray)
Person = SimpleNamespace  # traits, looks of the day and expression

SIZE = 112
_EYE_LINE, _SKULL_TOP = -7.0, -51.0  # y


def _colour(*levels: float) -> Array:
    """Red, green and blue in [0, 1], shaped to broadcast over (3, H, W)."""
    return np.array(levels, np.float32).reshape(3, 1, 1)


def _palette(hex_codes: str) -> list[Array]:
    return [_colour(*(level / 255.0 for level in bytes.fromhex(code))) for code in hex_codes.split()]


_WHITE, _DARK, _MOUTH_INSIDE, _BLUSH = _palette("f2ede8 140d0d 4d1214 e0615c")
_SKIN_SHADOW = _colour(0.75, 1.0, 1.1)  # light scattered under the skin keeps shadows red

# The traits of an identity: their values at 0 and at 1, or their colours from 0 to 1.
_TRAITS = {
    "skin": _palette("f5d1bd e6b894 b88561 734f3b"),
    "face_width": (33.0, 41.0), "face_length": (41.0, 51.0),  # half width at the eye line; y of the chin
    "jaw_width": (0.62, 0.98), "chin_roundness": (1.25, 0.55),  # jaw over face width; > 1 pinched, 1 oval, < 1 square
    "cheek": (0.0, 1.0),  # blush and depth of the fold beside the mouth
    "hair": _palette("171417 3d261a 704729 99451f d9ab61 ada8a6"),
    "hair_length": (-15.0, 75.0), "hair_volume": (1.0, 10.0),  # y where it ends behind the head; height above the skull
    "hairline": (-45.0, -24.0), "hair_parting": (-26.0, 26.0), "hair_curl": (0.0, 1.0),  # y at mid forehead; x
    "eye_spacing": (14.5, 19.0), "eye_width": (6.6, 9.4),  # half distance between the eyes; half width
    "eye_height": (3.0, 4.8), "eye_tilt": (-0.16, 0.24),  # half height of the opening; slope, outer corner up
    "iris": _palette("331c0f 6b421f 547040 4d80b3"),
    "brow_thickness": (1.0, 3.0), "brow_height": (7.5, 12.5),  # height above the eye
    "brow_tilt": (-0.10, 0.28), "brow_darkness": (0.35, 1.0),  # slope, outer end up; opacity
    "nose_length": (17.0, 27.0), "nose_width": (5.0, 9.5),  # eye line to tip; half width
    "mouth_height": (27.0, 34.0), "mouth_width": (10.0, 16.0), "lip_thickness": (1.4, 4.0),  # y; half width
    "lips": _palette("9e5c54 cc736e bd3d4a"),
    "ear_size": (0.7, 1.3), "beard": (-1.0, 0.9),  # opacity of the beard, none at all below 0
    "mole_x": (-0.75, 0.75), "mole_y": (2.0, 30.0),  # x over the half width at its height
    "freckles": (-0.7, 0.5),  # opacity, none at all below 0
}
IDENTITY_DIM = len(_TRAITS)

# The differences between pictures of one identity: largest deviations, then shares of pictures.
_VARIATION = {
    "roll": 0.16, "yaw": 0.36, "pitch": 0.22,  # sines of the angles; yaw and pitch look right up to 1.5 times as much
    "scale": 0.09, "shift": 5.0,  # relative; picture pixels on each axis
    "smile": 3.5, "mouth_open": 6.0,  # pixels the mouth corners move up or down; pixels between open lips
    "blink": 0.55, "brow_raise": 2.5, "gaze": 2.4,  # share of the eye closed; pixels; pixels
    "hair_jitter": 3.0, "skin_jitter": 0.06,  # pixels of hairline and volume; tan and make-up on each of red, green and blue
    "lip_makeup": 0.5,  # opacity of a random lip colour
    "exposure": 0.38, "side_light": 0.55,  # relative brightness; the same from centre to border
    "temperature": 0.16, "tint": 0.07,  # red gain up, blue gain down; green gain
    "tone_curve": 0.45, "desaturation": 0.35,  # curvature, from crushed to lifted midtones; share of colour lost
    "noise": 0.035, "blur_passes": 3.0,  # of full scale; passes of a 3 x 3 kernel over the pictures that are blurred
    "open_mouth_share": 0.40, "greyscale_share": 0.08, "blur_share": 0.30, "block_share": 0.08,
    "glasses_share": 0.15, "sunglasses_share": 0.05, "mask_share": 0.06, "scarf_share": 0.05,
}


class _Chance:
    """Random amounts. ``knob`` is the name of an entry of ``_VARIATION``."""

    def __init__(self, rng: np.random.Generator):
        self.uniform, self.bytes = rng.random, rng.bytes

    def around(self, knob: str) -> float:
        """Signed deviation up to the knob; large ones are rare (triangular)."""
        return _VARIATION[knob] * (self.uniform() - self.uniform())

    def upto(self, knob: str) -> float:
        return _VARIATION[knob] * self.uniform()

    def happens(self, knob: str) -> bool:
        return self.uniform() < _VARIATION[knob]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.uniform()

    def centred(self, width: float) -> float:
        return width * (self.uniform() - 0.5)

    def colour(self, low: float = 0.05, high: float = 0.95) -> Array:
        return _colour(*(self.between(low, high) for _ in range(3)))


def _cover(distance: Array, softness: float = 1.0) -> Array:
    """Opacity from a signed distance: 1 inside, 0 outside, a ramp between."""
    return (0.5 - (distance if softness == 1.0 else distance * (1.0 / softness))).clip(0.0, 1.0)


def _ellipse(x: Array, y: Array, half_w: float, half_h: float) -> Array:
    """Approximate distance to an ellipse, exact to a circle."""
    u, v = x * (1.0 / half_w), y * (1.0 / half_h)
    return (np.sqrt(u * u + v * v) - 1.0) * min(half_w, half_h)


def _lens(x: Array, y: Array, half_w: float, rise: float | Array, drop: float | Array) -> Array:
    """Distance to the area between two parabolas that meet at x = +-half_w."""
    arch = 1.0 - (x * (1.0 / half_w)) ** 2
    return np.maximum(-rise * arch - y, y - drop * arch)


def _blob(x: Array, y: Array, half_w: float, half_h: float) -> Array:
    """Opacity that fades from 1 at the centre to 0 at the ellipse."""
    return np.maximum(1.0 - (x * (1.0 / half_w)) ** 2 - (y * (1.0 / half_h)) ** 2, 0.0) ** 2


def _wave(t: Array) -> Array:
    """Smooth wave of period 1 between 0 and 1, in place of a sine."""
    t = 4.0 * (t - np.rint(t)) ** 2
    return t * (2.0 - t)


def _mix(first: Any, second: Any, t: Any) -> Any:
    return first + t * (second - first)


def _at(t: float, stops: Sequence[Any]) -> Any:
    """Number or colour at t in [0, 1] between the stops, linear from each to the next."""
    position = t * (len(stops) - 1)
    index = min(int(position), len(stops) - 2)
    return _mix(stops[index], stops[index + 1], position - index)


def _paint(rgb: Array, cover: Array, colour: Array, shade: Array | None = None) -> None:
    """Blend colour, times the brightness shade of each pixel, over the picture."""
    rgb *= 1.0 - cover
    rgb += (cover if shade is None else cover * shade) * colour


def _darken(rgb: Array, amount: Array) -> None:
    """Shade the skin; a negative amount lights it up."""
    rgb *= 1.0 - amount * _SKIN_SHADOW


class _Frame:
    """A picture, rgb (3, SIZE, SIZE), and the face coordinates x and y (SIZE, SIZE) of its pixels in one pose."""

    def __init__(self, chance: _Chance):
        self.rgb = np.empty((3, SIZE, SIZE), np.float32)
        self.sin = chance.around("roll")
        self.cos = sqrt(1.0 - self.sin * self.sin)
        self.scale = 0.97 * (1.0 + chance.around("scale"))
        self.centre_x, self.centre_y = 0.5 * SIZE + chance.around("shift"), 0.5 * SIZE + chance.around("shift")
        self.yaw = self.pitch = 0.0
        pixels = np.arange(SIZE, dtype=np.float32)
        column, row = (pixels - self.centre_x) / self.scale, (pixels[:, None] - self.centre_y) / self.scale
        self.x, self.y = self.cos * column + self.sin * row, self.cos * row - self.sin * column

    def turned(self, yaw: float, pitch: float) -> "_Frame":
        """The same picture in coordinates that turn with the head (sines)."""
        frame, depth = copy(self), _depth(self.x, self.y)
        frame.yaw, frame.pitch = yaw, pitch
        frame.x = sqrt(1.0 - yaw * yaw) * self.x - yaw * depth
        frame.y = sqrt(1.0 - pitch * pitch) * self.y - pitch * depth
        return frame

    def box(self, x: float, y: float, half_w: float, half_h: float) -> tuple[slice, slice]:
        """Rows and columns that hold a box around (x, y). A wide box gets whole rows, which are contiguous and so faster."""
        flat_x, flat_y = x, y
        for _ in range(2):  # fixed point of the warp in turned()
            depth = _depth(flat_x, flat_y)
            flat_x, flat_y = x + self.yaw * depth, y + self.pitch * depth
        row = self.centre_y + self.scale * (self.cos * flat_y + self.sin * flat_x)
        column = self.centre_x + self.scale * (self.cos * flat_x - self.sin * flat_y)
        up = self.scale * 1.15 * (half_h + abs(self.sin) * half_w) + 2.0
        aside = self.scale * 1.25 * (half_w + abs(self.sin) * half_h) + 2.0
        rows = slice(max(int(row - up), 0), max(int(row + up), 0))
        columns = slice(max(int(column - aside), 0), max(int(column + aside), 0))
        return rows, slice(None) if aside > 0.25 * SIZE else columns

    def patch(self, x: float, y: float, half_w: float, half_h: float) -> tuple[Array, Array, Array]:
        """(rgb, x, y) of the box, with coordinates relative to its centre."""
        rows, columns = self.box(x, y, half_w, half_h)
        return self.rgb[:, rows, columns], self.x[rows, columns] - x, self.y[rows, columns] - y


def _depth(x: Number, y: Number) -> Number:
    """Height of the face: a paraboloid, which continues smoothly beyond the head, unlike a sphere."""
    return 24.0 - x * x * (24.0 / 46.0**2) - y * y * (24.0 / 80.0**2)


def _paint_background(body: _Frame, chance: _Chance) -> None:
    """Two colours, mixed by a gradient and two soft blobs."""
    mix = chance.centred(0.012) * body.x + chance.centred(0.012) * body.y + 0.5
    for _ in range(2):
        x, y = chance.centred(120.0), chance.centred(120.0)
        half_w, half_h = chance.between(8.0, 24.0), chance.between(8.0, 24.0)
        box = body.box(x, y, half_w, half_h)
        mix[box] += chance.between(-0.7, 0.7) * _cover(_ellipse(body.x[box] - x, body.y[box] - y, half_w, half_h), 5.0)
    body.rgb[:] = _mix(chance.colour(), chance.colour(), mix)


def _paint_body(body: _Frame, person: Person, chance: _Chance) -> None:
    """Hair behind the head, neck and clothes."""
    if person.hair_length >= 0.0:
        rgb, x, y = body.patch(0.0, 10.0, 60.0, 85.0)
        volume = 0.7 * person.hair_volume
        half_w = person.face_width + volume + min(0.3 * person.hair_length - 6.0, 2.0)  # short hair stays close
        shape = _ellipse(x, np.minimum(y + 14.0, 0.0), half_w, 46.0 + volume)
        shape = np.maximum(shape, 0.8 * (y + 10.0 - person.hair_length)) + (3.0 * person.hair_curl) * _wave(0.07 * y)
        _paint(rgb, _cover(shape, 1.5), 0.72 * person.hair, _hair_texture(x, y, person))
    rgb, x, y = body.patch(0.0, 44.0, 60.0, 18.0)
    _paint(rgb, _cover(abs(x) - 0.52 * person.face_width), person.skin, 0.9 - 0.3 * _cover(y - 6.0, 30.0))
    shoulders, neckline = 5.0 + 0.006 * x * x, chance.between(5.0, 17.0) - 0.03 * x * x
    _paint(rgb, _cover(np.maximum(shoulders, neckline) - y, 1.5), chance.colour())


def _hair_texture(x: Array, y: Array, person: Person) -> Array:
    """Brightness of strands that run along y, wavier with curl."""
    return 0.8 + 0.3 * _wave(0.2 * x + person.hair_curl * _wave(0.05 * y))


def _head_outline(head: _Frame, person: Person) -> Array:
    """Distance to the outline of skull and jaw, which meet at the eye line."""
    below = np.maximum(head.y - _EYE_LINE, 0.0) * (1.0 / (person.face_length - _EYE_LINE))
    above = np.minimum(head.y - _EYE_LINE, 0.0) * (1.0 / (_EYE_LINE - _SKULL_TOP))
    width = person.face_width * (1.0 - (1.0 - person.jaw_width) * below * below)
    u, v = (head.x / width) ** 2, (above + below) ** 2
    return (np.sqrt(np.sqrt(u * u + v * v + (2.0 * person.chin_roundness) * u * v)) - 1.0) * person.face_width


def _paint_skin(head: _Frame, outline: Array, person: Person) -> None:
    """Ears, face, blush, freckles, beard, mole and the folds beside the mouth."""
    rgb, x, y = head.patch(0.0, 1.0, person.face_width + 8.0, 13.0)
    x = abs(x) - (person.face_width + 1.5) + 0.15 * y
    half_w, half_h = 4.6 * person.ear_size, 9.5 * person.ear_size
    _paint(rgb, _cover(_ellipse(x, y, half_w, half_h)), person.skin)
    _darken(rgb, 0.3 * _blob(x, y, 0.9 * half_w, 0.9 * half_h))

    radius = (outline * (1.0 / person.face_width) + 1.0) ** 2
    _paint(head.rgb, _cover(outline), person.skin, 1.05 - 0.27 * radius * radius)  # darker where it turns away
    rgb, x, y = head.patch(0.0, 15.0, 34.0, 10.0)
    _paint(rgb, (0.1 + 0.3 * person.cheek) * _blob(abs(x) - 21.0, y, 12.0, 9.0), person.skin * _BLUSH)

    if person.freckles > 0.0:  # one dot in each cell of a grid whose rows and columns are shifted unevenly
        rgb, x, y = head.patch(0.0, 9.0, 32.0, 10.0)
        row = np.rint(0.2 * y)
        x_in_row = x + 2.3 * row * row
        column = np.rint(0.18 * x_in_row)
        x_in_cell = x_in_row - column * (1.0 / 0.18)
        y_in_cell = y - 5.0 * row + 3.0 * _wave(0.38 * column + 0.2 * row) - 1.5
        dots = (1.0 - 0.7 * (x_in_cell * x_in_cell + y_in_cell * y_in_cell)).clip(0.0, 1.0)
        _darken(rgb, person.freckles * dots * _cover(_ellipse(x, y, 30.0, 10.0), 4.0))
    if person.beard > 0.0:  # below a line from the ears to under the nose
        rows, _ = head.box(0.0, 25.0, person.face_width, 30.0)
        across = (head.x[rows] * (1.0 / person.face_width)) ** 2
        line = _EYE_LINE + person.nose_length + 5.0 - 24.0 * across * across
        cover = _cover(line - head.y[rows], 5.0) * _cover(outline[rows] + 0.5)
        _paint(head.rgb[:, rows], person.beard * cover, 0.9 * person.hair)
    narrowing = person.face_width * (1.0 - 0.02 * person.mole_y)
    rgb, x, y = head.patch(person.mole_x * narrowing, person.mole_y, 2.0, 2.0)
    _paint(rgb, 0.85 * _cover(_ellipse(x, y, 1.3, 1.3)), 0.35 * person.skin)

    strength = 0.1 + 0.06 * (1.0 + person.cheek) * max(person.smile, 0.0)
    rgb, x, y = head.patch(0.0, person.mouth_height - 6.0, person.mouth_width + 9.0, 9.0)
    x = abs(x) - person.mouth_width - 3.5
    _darken(rgb, strength * _cover(abs(x - y * (0.35 - 0.03 * y)) - 0.4, 2.0) * _blob(x, y, 8.0, 10.0))


def _paint_nose(head: _Frame, person: Person) -> None:
    tip_x, tip_y = 10.0 * head.yaw, 10.0 * head.pitch  # the tip stands out, so a head turn moves it further
    half_w, length = person.nose_width, person.nose_length
    rgb, x, y = head.patch(tip_x, _EYE_LINE + length + tip_y, half_w + 5.0, length + 4.0)
    up = (y * (-1.0 / length)).clip(0.0, 1.0)
    outwards = abs(x)
    edge = abs(abs(x + tip_x * up) - 2.0 - (half_w - 2.5) * (1.0 - up) ** 2)
    sides = 0.24 * (1.0 - up) * _cover(edge - 0.5, 4.0) * _cover(y - 2.0, 3.0)
    underside = 0.28 * _cover(_lens(x, y - 2.6, half_w, 0.6, 1.6), 2.0)
    wing = abs(_ellipse(outwards - 0.62 * half_w, y, 0.4 * half_w, 3.6))
    wings = 0.35 * _cover(wing - 0.2, 1.2) * _cover(0.7 * half_w - outwards, 2.0)
    nostrils = 0.6 * _cover(_ellipse(outwards - 0.45 * half_w, y - 2.2, 0.24 * half_w, 1.1))
    highlight = 0.12 * _blob(x, y + 1.5, 0.6 * half_w, 6.0)
    _darken(rgb, sides + underside + wings + nostrils - highlight)


def _paint_mouth(head: _Frame, person: Person) -> None:
    half_w = person.mouth_width + 0.5 * person.smile - 0.25 * person.mouth_open
    gap, lip = person.mouth_open, person.lip_thickness
    rgb, x, y = head.patch(0.0, person.mouth_height, half_w + 5.0, gap + 9.0)
    across = (x * (1.0 / half_w)) ** 2
    y = y + person.smile * (across - 0.4)
    _darken(rgb, 0.2 * _blob(x, y - gap - 1.6 * lip - 2.0, 0.6 * half_w, 3.0))
    cupid = 0.9 * np.maximum(1.0 - 18.0 * across, 0.0)  # the notch of the upper lip
    upper = _cover(_lens(x, y - cupid, half_w, lip + 0.3 * gap, 0.5))
    lower = _cover(_lens(x, y, half_w - 1.0, 0.3 * gap, 1.3 * lip + gap))
    light = 0.15 * _blob(x, y - gap - 0.6 * lip, 0.5 * half_w, 0.5 * lip + 0.5)
    _paint(rgb, 0.85 * np.maximum(upper, lower), person.lips, 1.0 - 0.14 * upper + light)
    inside = _lens(x, y, half_w - 0.5, 0.3 * gap + 0.3, gap + 0.3)
    _paint(rgb, 0.9 * _cover(inside), _MOUTH_INSIDE)
    if gap > 0.0:
        _paint(rgb, _cover(np.maximum(inside + 0.8, y - 0.35 * gap)), _WHITE)  # teeth


def _paint_eyes_and_brows(head: _Frame, person: Person) -> None:
    half_w = person.eye_width
    rgb, x, y = head.patch(0.0, _EYE_LINE, person.eye_spacing + half_w + 4.0, 8.0)
    across = abs(x) - person.eye_spacing
    to_iris_x, to_iris_y = across - np.copysign(person.gaze_x, x), y - person.gaze_y + 0.4
    to_iris = np.sqrt(to_iris_x * to_iris_x + to_iris_y * to_iris_y)
    socket = 0.22 * _blob(across, y + 1.0, half_w + 4.0, 8.0)
    y = y + person.eye_tilt * across
    rise = person.eye_height * max(1.0 - person.blink, 0.0)
    crease = 0.25 * _cover(_lens(across, y + 2.0, half_w, rise + 0.9, -rise), 1.5)
    lower_lid = 0.3 * _cover(_lens(across, y, half_w, -0.75 * rise, 0.75 * rise + 1.0))
    _darken(rgb, socket + crease + lower_lid)
    opening = _cover(_lens(across, y, half_w, rise, 0.75 * rise))
    _paint(rgb, opening, _WHITE)
    _paint(rgb, opening * _cover(to_iris - 4.0), person.iris, 1.0 - 0.9 * _cover(to_iris - 1.7))  # with the pupil
    _paint(rgb, opening * _blob(to_iris_x + np.copysign(1.2, x), to_iris_y + 1.3, 1.5, 1.5), _WHITE)
    _paint(rgb, 0.85 * _cover(_lens(across, y, half_w + 1.0, rise + 1.0, 0.5 - rise)), _DARK)

    half_w = person.eye_width + 2.5
    rgb, x, y = head.patch(0.0, _EYE_LINE - person.brow_height - person.brow_raise, person.eye_spacing + half_w + 1.0, 6.0)
    x = abs(x) - person.eye_spacing - 0.5
    y = y + x * (person.brow_tilt - 0.02 * x)
    thickness = person.brow_thickness * (1.0 - 0.04 * x).clip(0.3, 1.5)
    _paint(rgb, person.brow_darkness * _cover(_lens(x, y, half_w, thickness, 0.6 * thickness), 1.5), 0.8 * person.hair)


def _paint_front_hair(head: _Frame, outline: Array, person: Person) -> None:
    """Hair on top of the skull, down to the hairline and the temples."""
    rows, _ = head.box(0.0, -20.0, person.face_width, 45.0)
    x, y = head.x[rows], head.y[rows]
    from_parting = x - person.hair_parting
    across = (x * (1.0 / person.face_width)) ** 2
    temples = (36.0 + 0.2 * max(person.hair_length, 0.0)) * across * across
    hairline = person.hairline + temples - (7.0 - 0.5 * abs(from_parting)).clip(0.0, 7.0)
    height = person.hair_volume * (0.3 - 0.03 * y).clip(0.1, 1.0)
    curls = (2.5 * person.hair_curl) * _wave(0.07 * (abs(x) + y))
    cover = np.minimum(_cover(outline[rows] - height + curls, 1.5), _cover(y - hairline, 2.0))
    fan = from_parting * (45.0 / (y + 100.0))  # strands spread from the parting
    _paint(head.rgb[:, rows], cover, person.hair, _hair_texture(fan, y, person))


def _occlude(body: _Frame, head: _Frame, outline: Array, person: Person, chance: _Chance) -> None:
    """Mask, glasses, scarf and a block."""
    if chance.happens("mask_share"):
        x, y, colour = head.x, head.y, chance.colour(0.3, 1.0)
        top = chance.between(8.0, 14.0) + 0.006 * x * x
        _paint(head.rgb, _cover(np.maximum(outline - 1.5, top - y)), colour, 0.9 + 0.1 * _wave(0.14 * y))  # with pleats
        strap = abs(y - top + 0.2 * abs(x) - 2.0) - 0.6
        _paint(head.rgb, _cover(np.maximum(outline, strap)), colour)
    dark = chance.happens("sunglasses_share")
    if dark or chance.happens("glasses_share"):
        frame_colour, lens_colour = chance.colour(0.0, 0.4), chance.colour(0.0, 0.2)
        half_w, half_h = chance.between(10.0, 13.0), chance.between(7.0, 11.0)
        rgb, x, y = head.patch(0.0, _EYE_LINE + 1.0, person.face_width, 12.0)
        x = abs(x)
        rim = _ellipse(x - person.eye_spacing, y, half_w, half_h)
        _paint(rgb, (0.9 if dark else 0.12) * _cover(rim), lens_colour)
        beside_lens = np.minimum(x - person.eye_spacing + half_w, person.eye_spacing + half_w - x)
        bridge_and_temples = abs(y + 2.0) + np.maximum(beside_lens, 0.0)
        wire = np.minimum(abs(rim), bridge_and_temples) - 0.7
        _paint(rgb, _cover(np.maximum(wire, x - person.face_width - 1.0)), frame_colour)
    if chance.happens("scarf_share"):
        rgb, x, y = body.patch(0.0, 58.0, 80.0, 42.0)
        top = chance.between(-34.0, -20.0) + chance.centred(0.3) * x + 0.004 * x * x
        stripes = _wave(chance.between(0.02, 0.08) * (y + 0.4 * x))
        _paint(rgb, _cover(top - y, 1.5), _mix(chance.colour(), chance.colour(), stripes))
    if chance.happens("block_share"):
        half_w, half_h = chance.between(8.0, 22.0), chance.between(8.0, 22.0)
        rgb, x, y = body.patch(chance.centred(90.0), chance.centred(90.0), half_w, half_h)
        _paint(rgb, _cover(np.maximum(abs(x) - half_w, abs(y) - half_h)), chance.colour())


def _photograph(scene: _Frame, chance: _Chance) -> Array:
    """Light, tone curve, loss of colour, blur and noise. Returns uint8 (SIZE, SIZE, 3)."""
    rgb = scene.rgb
    across, down = chance.around("side_light") / 50.0, chance.around("side_light") / 50.0
    exposure, warm, green = chance.around("exposure"), chance.around("temperature"), chance.around("tint")
    rgb *= np.maximum(across * scene.x + down * scene.y + 1.0, 0.2) * (1.0 + exposure)
    rgb *= _colour(1.0 + warm, 1.0 + green, 1.0 - warm)

    rgb.clip(0.0, 1.0, out=rgb)
    curvature = chance.around("tone_curve")
    rgb *= (1.0 + curvature) - curvature * rgb  # stays in [0, 1]
    faded = 1.0 if chance.happens("greyscale_share") else chance.upto("desaturation")
    rgb += faded * (0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2] - rgb)

    if chance.happens("blur_share"):
        for _ in range(1 + int(chance.upto("blur_passes"))):
            for planes in rgb, rgb.transpose(0, 2, 1):  # the kernel (1, 2, 1) / 4 along each axis; the border stays
                pairs = planes[:, :-1] + planes[:, 1:]
                planes[:, 1:-1] = 0.25 * (pairs[:, :-1] + pairs[:, 1:])

    noise = np.frombuffer(chance.bytes(SIZE * SIZE), np.int8).reshape(SIZE, SIZE) * np.float32(2.0 * chance.upto("noise"))
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    for channel, plane in enumerate(rgb):
        picture[:, :, channel] = (255.0 * plane + noise).clip(0.0, 255.0)
    return picture


def _person(identity: Array, chance: _Chance) -> Person:
    person = Person(**{name: _at(t, stops) for (name, stops), t in zip(_TRAITS.items(), identity.tolist(), strict=True)})
    person.hairline += chance.around("hair_jitter")
    person.hair_volume = max(person.hair_volume + chance.around("hair_jitter"), 0.5)
    person.skin *= _colour(*(1.0 + chance.around("skin_jitter") for _ in range(3)))
    makeup = _colour(chance.between(0.5, 0.9), 0.2, chance.between(0.25, 0.45))
    person.lips = _mix(0.4 * person.skin + 0.6 * person.lips, makeup, chance.upto("lip_makeup"))
    person.smile = 2.0 + chance.around("smile")
    person.mouth_open = chance.upto("mouth_open") if chance.happens("open_mouth_share") else 0.0
    person.blink = chance.upto("blink") * chance.uniform()
    person.brow_raise = chance.around("brow_raise")
    person.gaze_x, person.gaze_y = chance.around("gaze"), 0.4 * chance.around("gaze")
    return person


def draw_identity(rng: np.random.Generator) -> np.ndarray:
    """Draw an identity: float64 (IDENTITY_DIM,), independent and uniform in [0, 1)."""
    return rng.random(IDENTITY_DIM)


def draw_face(identity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one picture of an identity from draw_identity: uint8 (SIZE, SIZE, 3), RGB. rng draws everything else."""
    chance = _Chance(rng)
    person = _person(identity, chance)
    body = _Frame(chance)
    head = body.turned(chance.around("yaw"), chance.around("pitch"))
    outline = _head_outline(head, person)

    _paint_background(body, chance)
    _paint_body(body, person, chance)
    _paint_skin(head, outline, person)
    _paint_nose(head, person)
    _paint_mouth(head, person)
    _paint_eyes_and_brows(head, person)
    _paint_front_hair(head, outline, person)
    _occlude(body, head, outline, person, chance)
    return _photograph(body, chance)
