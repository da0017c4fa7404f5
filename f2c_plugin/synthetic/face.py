"""Synthetic face crops: an endless labeled dataset without a download.

An identity is a vector of independent traits in [0, 1). A picture of it is painted
layer by layer with a random pose, expression, light and occlusion.

Lengths are in face pixels: picture pixels at scale 1, x to the right and y
down, with the origin near the bridge of the nose. Every shape is a signed
distance in these coordinates, and its edge is softened over about one pixel.
A head turn is a smooth warp of the coordinates, done once per picture, so each
feature is drawn as if seen from the front.

The same seed gives the same bytes on every machine: drawing uses only
arithmetic and square roots, which IEEE 754 rounds exactly, and no reductions.
"""

from copy import copy
from math import sqrt
from types import SimpleNamespace
from typing import TypeVar

import numpy as np

Array = np.ndarray
Expression = SimpleNamespace
Person = SimpleNamespace
Number = TypeVar("Number", float, np.ndarray)

SIZE = 112

# The traits of an identity: their values at 0 and at 1.
_TRAITS = {
    "skin_tone": (0.0, 1.0),  # position on _SKIN
    "face_width": (33.0, 41.0),  # half width at the eye line
    "face_length": (41.0, 51.0),  # y of the chin
    "jaw_width": (0.62, 0.98),  # jaw over face width
    "chin_roundness": (1.25, 0.55),  # > 1 pinched, 1 oval, < 1 square
    "cheek": (0.0, 1.0),  # blush and depth of the fold beside the mouth
    "hair_colour": (0.0, 1.0),  # position on _HAIR
    "hair_length": (-15.0, 75.0),  # y where the hair behind the head ends
    "hair_volume": (1.0, 10.0),  # height of the hair above the skull
    "hairline": (-45.0, -24.0),  # y at the middle of the forehead
    "hair_parting": (-26.0, 26.0),  # x
    "hair_curl": (0.0, 1.0),
    "eye_spacing": (14.5, 19.0),  # half distance between the eyes
    "eye_width": (6.6, 9.4),  # half width
    "eye_height": (3.0, 4.8),  # half height of the opening
    "eye_tilt": (-0.16, 0.24),  # slope, outer corner up
    "iris_colour": (0.0, 1.0),  # position on _IRIS
    "brow_thickness": (1.0, 3.0),
    "brow_height": (7.5, 12.5),  # above the eye
    "brow_tilt": (-0.10, 0.28),  # slope, outer end up
    "brow_darkness": (0.35, 1.0),
    "nose_length": (17.0, 27.0),  # eye line to tip
    "nose_width": (5.0, 9.5),  # half width
    "mouth_height": (27.0, 34.0),  # y
    "mouth_width": (10.0, 16.0),  # half width
    "lip_thickness": (1.4, 4.0),
    "lip_colour": (0.0, 1.0),  # position on _LIPS
    "ear_size": (0.7, 1.3),
    "beard": (-1.0, 0.9),  # opacity; none at all below 0
    "mole_x": (-0.75, 0.75),  # over the half width at its height
    "mole_y": (2.0, 30.0),
    "freckles": (-0.7, 0.5),  # opacity; none at all below 0
}
IDENTITY_DIM = len(_TRAITS)

# The differences between pictures of one identity. _DIFFICULTY scales every entry;
# turned heads look right up to about 1.5.
_DIFFICULTY = 1.0
_VARIATION = {
    # Pose: largest deviations.
    "roll": 0.16,  # sine of the angle
    "yaw": 0.36,  # sine of the angle
    "pitch": 0.22,  # sine of the angle
    "scale": 0.09,  # relative
    "shift": 5.0,  # picture pixels, each axis
    # Expression: largest deviations.
    "smile": 3.5,  # px the mouth corners move up or down
    "mouth_open": 6.0,  # px between the lips, when open
    "blink": 0.55,  # share of the eye closed
    "brow_raise": 2.5,  # px
    "gaze": 2.4,  # px
    # Looks that change from day to day: largest deviations.
    "hair_jitter": 3.0,  # px of hairline and volume
    "skin_jitter": 0.06,  # on each of red, green and blue: tan, make-up
    "lip_makeup": 0.5,  # opacity of a random lip colour
    # Light and camera: largest deviations.
    "exposure": 0.38,  # relative
    "side_light": 0.55,  # relative brightness from centre to border
    "temperature": 0.16,  # red gain up, blue gain down
    "tint": 0.07,  # green gain
    "tone_curve": 0.45,  # curvature: crushed to lifted midtones
    "desaturation": 0.35,  # share of colour lost in any picture
    "noise": 0.035,  # of full scale
    "blur_passes": 3.0,  # of a 3 x 3 kernel, in the pictures that are blurred
    # Events: the share of pictures with them.
    "open_mouth_share": 0.40,
    "greyscale_share": 0.08,
    "blur_share": 0.30,
    "glasses_share": 0.15,
    "sunglasses_share": 0.05,
    "mask_share": 0.06,
    "scarf_share": 0.05,
    "block_share": 0.08,
}


def _colour(*levels: float) -> Array:
    """Red, green and blue in [0, 1], shaped to broadcast over (3, H, W)."""
    return np.array(levels, np.float32).reshape(3, 1, 1)


def _palette(hex_codes: str) -> list[Array]:
    return [_colour(*(level / 255.0 for level in bytes.fromhex(code))) for code in hex_codes.split()]


_SKIN = _palette("f5d1bd e6b894 b88561 734f3b")
_HAIR = _palette("171417 3d261a 704729 99451f d9ab61 ada8a6")
_IRIS = _palette("331c0f 6b421f 547040 4d80b3")
_LIPS = _palette("9e5c54 cc736e bd3d4a")
_WHITE, _DARK, _MOUTH_INSIDE, _BLUSH = _palette("f2ede8 140d0d 4d1214 e0615c")
_SKIN_SHADOW = _colour(0.75, 1.0, 1.1)  # light scattered under the skin keeps shadows red

_EYE_LINE = -7.0  # y
_SKULL_TOP = -51.0  # y


# --- Chance -----------------------------------------------------------------


class _Chance:
    """Draws the amounts in ``_VARIATION``. ``knob`` is the name of an entry."""

    def __init__(self, rng: np.random.Generator):
        self.uniform = rng.random
        self.bytes = rng.bytes

    def around(self, knob: str) -> float:
        """Signed deviation up to the knob; large ones are rare (triangular)."""
        return _DIFFICULTY * _VARIATION[knob] * (self.uniform() - self.uniform())

    def upto(self, knob: str) -> float:
        """Amount between none and the knob."""
        return _DIFFICULTY * _VARIATION[knob] * self.uniform()

    def happens(self, knob: str) -> bool:
        """Whether the event takes place; the knob is its share of pictures."""
        return self.uniform() < _DIFFICULTY * _VARIATION[knob]

    def colour(self, low: float = 0.05, high: float = 0.95) -> Array:
        return _colour(*(low + (high - low) * self.uniform() for _ in range(3)))


def _draw_expression(chance: _Chance) -> Expression:
    return Expression(
        smile=2.0 + chance.around("smile"),
        mouth_open=chance.upto("mouth_open") if chance.happens("open_mouth_share") else 0.0,
        blink=chance.upto("blink") * chance.uniform(),
        brow_raise=chance.around("brow_raise"),
        gaze_x=chance.around("gaze"),
        gaze_y=0.4 * chance.around("gaze"),
    )


# --- Shapes and paint -------------------------------------------------------


def _cover(distance: Array, softness: float | None = None) -> Array:
    """Opacity from a signed distance: 1 inside, 0 outside, a ramp between."""
    if softness is not None:
        distance = distance * (1.0 / softness)
    return (0.5 - distance).clip(0.0, 1.0)


def _ellipse(x: Array, y: Array, half_w: float, half_h: float) -> Array:
    """Approximate distance to an ellipse, exact to a circle."""
    u, v = x * (1.0 / half_w), y * (1.0 / half_h)
    return (np.sqrt(u * u + v * v) - 1.0) * min(half_w, half_h)


def _lens(x: Array, y: Array, half_w: float, rise: float, drop: float) -> Array:
    """Distance to the area between two parabolas that meet at x = +-half_w."""
    arch = 1.0 - (x * (1.0 / half_w)) ** 2
    return np.maximum(-rise * arch - y, y - drop * arch)


def _blob(x: Array, y: Array, half_w: float, half_h: float) -> Array:
    """Opacity that fades from 1 at the centre to 0 at the ellipse."""
    fade = np.maximum(1.0 - (x * (1.0 / half_w)) ** 2 - (y * (1.0 / half_h)) ** 2, 0.0)
    return fade * fade


def _wave(t: Array) -> Array:
    """Smooth wave of period 1 between 0 and 1, in place of a sine."""
    t = t - np.rint(t)
    t = 4.0 * t * t
    return t * (2.0 - t)


def _ramp(stops: list[Array], t: float) -> Array:
    """Colour at t in [0, 1] on a piecewise linear scale of colours."""
    position = t * (len(stops) - 1)
    index = min(int(position), len(stops) - 2)
    return stops[index] + (position - index) * (stops[index + 1] - stops[index])


def _paint(rgb: Array, cover: Array, colour: Array, shade: Array | None = None) -> None:
    """Blend colour, times the brightness shade of each pixel, over the picture."""
    rgb *= 1.0 - cover
    rgb += (cover if shade is None else cover * shade) * colour


def _darken(rgb: Array, amount: Array) -> None:
    """Shade the skin; a negative amount lights it up."""
    rgb *= 1.0 - amount * _SKIN_SHADOW


# --- Pose -------------------------------------------------------------------


class _Frame:
    """A picture and the face coordinates of its pixels in one pose.

    rgb is (3, SIZE, SIZE); x and y are (SIZE, SIZE).
    """

    def __init__(self, chance: _Chance):
        self.rgb = np.empty((3, SIZE, SIZE), np.float32)
        self.sin = chance.around("roll")
        self.cos = sqrt(1.0 - self.sin * self.sin)
        self.scale = 0.97 * (1.0 + chance.around("scale"))
        self.centre_x = 0.5 * SIZE + chance.around("shift")
        self.centre_y = 0.5 * SIZE + chance.around("shift")
        self.yaw = self.pitch = 0.0
        pixels = np.arange(SIZE, dtype=np.float32)
        column = (pixels - self.centre_x) / self.scale
        row = (pixels[:, None] - self.centre_y) / self.scale
        self.x = self.cos * column + self.sin * row
        self.y = self.cos * row - self.sin * column

    def turned(self, yaw: float, pitch: float) -> "_Frame":
        """The same picture in coordinates that turn with the head (sines)."""
        frame = copy(self)
        frame.yaw, frame.pitch = yaw, pitch
        depth = _depth(self.x, self.y)
        frame.x = sqrt(1.0 - yaw * yaw) * self.x - yaw * depth
        frame.y = sqrt(1.0 - pitch * pitch) * self.y - pitch * depth
        return frame

    def box(self, x: float, y: float, half_w: float, half_h: float) -> tuple[slice, slice]:
        """Rows and columns of the picture that hold a box around (x, y).

        A wide box gets whole rows, which are contiguous and therefore faster.
        """
        flat_x, flat_y = x, y
        for _ in range(2):  # fixed point of the warp in turned()
            depth = _depth(flat_x, flat_y)
            flat_x, flat_y = x + self.yaw * depth, y + self.pitch * depth
        row = self.centre_y + self.scale * (self.cos * flat_y + self.sin * flat_x)
        reach = self.scale * 1.15 * (half_h + abs(self.sin) * half_w) + 2.0
        rows = slice(max(int(row - reach), 0), max(int(row + reach), 0))
        column = self.centre_x + self.scale * (self.cos * flat_x - self.sin * flat_y)
        reach = self.scale * 1.25 * (half_w + abs(self.sin) * half_h) + 2.0
        if reach > 0.25 * SIZE:
            return rows, slice(None)
        return rows, slice(max(int(column - reach), 0), max(int(column + reach), 0))

    def patch(self, x: float, y: float, half_w: float, half_h: float) -> tuple[Array, Array, Array]:
        """(rgb, x, y) of the box, with coordinates relative to its centre."""
        rows, columns = self.box(x, y, half_w, half_h)
        return self.rgb[:, rows, columns], self.x[rows, columns] - x, self.y[rows, columns] - y


def _depth(x: Number, y: Number) -> Number:
    """Height of the face above the picture plane.

    Unlike a sphere, a paraboloid continues smoothly beyond the head, so the warp
    is defined everywhere.
    """
    return 24.0 - x * x * (24.0 / 46.0**2) - y * y * (24.0 / 80.0**2)


def _head_distance(x: Array, y: Array, person: Person) -> Array:
    """Distance to the outline of skull and jaw, which meet at the eye line."""
    below = np.maximum(y - _EYE_LINE, 0.0) * (1.0 / (person.face_length - _EYE_LINE))
    above = np.minimum(y - _EYE_LINE, 0.0) * (1.0 / (_EYE_LINE - _SKULL_TOP))
    width = person.face_width * (1.0 - (1.0 - person.jaw_width) * below * below)
    u, v = (x / width) ** 2, (above + below) ** 2
    radius = np.sqrt(np.sqrt(u * u + v * v + (2.0 * person.chin_roundness) * u * v))
    return (radius - 1.0) * person.face_width


# --- Layers, from back to front ---------------------------------------------


def _paint_background(frame: _Frame, chance: _Chance) -> None:
    """Two colours, mixed by a gradient and a few soft blobs."""
    tilt_x, tilt_y = 0.012 * (chance.uniform() - 0.5), 0.012 * (chance.uniform() - 0.5)
    mix = tilt_x * frame.x + tilt_y * frame.y + 0.5
    for _ in range(2):
        x, y = 120.0 * (chance.uniform() - 0.5), 120.0 * (chance.uniform() - 0.5)
        half_w, half_h = 8.0 + 16.0 * chance.uniform(), 8.0 + 16.0 * chance.uniform()
        box = frame.box(x, y, half_w, half_h)
        shape = _ellipse(frame.x[box] - x, frame.y[box] - y, half_w, half_h)
        mix[box] += (1.4 * chance.uniform() - 0.7) * _cover(shape, 5.0)
    first, second = chance.colour(), chance.colour()
    np.multiply(mix, second - first, out=frame.rgb)
    frame.rgb += first


def _hair_texture(x: Array, y: Array, person: Person) -> Array:
    """Brightness of strands that run along y, wavier with curl."""
    return 0.8 + 0.3 * _wave(0.2 * x + person.hair_curl * _wave(0.05 * y))


def _paint_back_hair(frame: _Frame, person: Person) -> None:
    if person.hair_length < 0.0:
        return
    volume = 0.7 * person.hair_volume
    rgb, x, y = frame.patch(0.0, 10.0, 60.0, 85.0)
    half_w = person.face_width + volume + min(0.3 * person.hair_length - 6.0, 2.0)  # short hair stays close
    shape = _ellipse(x, np.minimum(y + 14.0, 0.0), half_w, 46.0 + volume)
    shape = np.maximum(shape, 0.8 * (y + 10.0 - person.hair_length))
    shape = shape + (3.0 * person.hair_curl) * _wave(0.07 * y)
    _paint(rgb, _cover(shape, 1.5), 0.72 * person.hair, _hair_texture(x, y, person))


def _paint_neck_and_clothes(frame: _Frame, person: Person, chance: _Chance) -> None:
    rgb, x, y = frame.patch(0.0, 44.0, 60.0, 18.0)
    neck = np.abs(x) - 0.52 * person.face_width
    _paint(rgb, _cover(neck), person.skin, 0.9 - 0.3 * _cover(y - 6.0, 30.0))
    shoulders = 5.0 + 0.006 * x * x
    neckline = 5.0 + 12.0 * chance.uniform() - 0.03 * x * x
    _paint(rgb, _cover(np.maximum(shoulders, neckline) - y, 1.5), chance.colour())


def _paint_ears(head: _Frame, person: Person) -> None:
    rgb, x, y = head.patch(0.0, 1.0, person.face_width + 8.0, 13.0)
    x = np.abs(x) - (person.face_width + 1.5) + 0.15 * y
    half_w, half_h = 4.6 * person.ear_size, 9.5 * person.ear_size
    _paint(rgb, _cover(_ellipse(x, y, half_w, half_h)), person.skin)
    _darken(rgb, 0.3 * _blob(x, y, 0.9 * half_w, 0.9 * half_h))


def _paint_skin(head: _Frame, distance: Array, person: Person) -> None:
    """Skin of the face, darker towards the outline, where it turns away."""
    radius = (distance * (1.0 / person.face_width) + 1.0) ** 2
    _paint(head.rgb, _cover(distance), person.skin, 1.05 - 0.27 * radius * radius)


def _paint_cheeks(head: _Frame, person: Person) -> None:
    rgb, x, y = head.patch(0.0, 15.0, 34.0, 10.0)
    blush = (0.1 + 0.3 * person.cheek) * _blob(np.abs(x) - 21.0, y, 12.0, 9.0)
    _paint(rgb, blush, person.skin * _BLUSH)


def _paint_freckles(head: _Frame, person: Person) -> None:
    """One dot in each cell of a grid whose rows and columns are shifted unevenly."""
    if person.freckles <= 0.0:
        return
    rgb, x, y = head.patch(0.0, 9.0, 32.0, 10.0)
    row = np.rint(0.2 * y)
    x_in_row = x + 2.3 * row * row
    column = np.rint(0.18 * x_in_row)
    y_in_cell = y - 5.0 * row + 3.0 * _wave(0.38 * column + 0.2 * row) - 1.5
    x_in_cell = x_in_row - column * (1.0 / 0.18)
    dots = (1.0 - 0.7 * (x_in_cell * x_in_cell + y_in_cell * y_in_cell)).clip(0.0, 1.0)
    _darken(rgb, person.freckles * dots * _cover(_ellipse(x, y, 30.0, 10.0), 4.0))


def _paint_mole(head: _Frame, person: Person) -> None:
    narrowing = person.face_width * (1.0 - 0.02 * person.mole_y)
    rgb, x, y = head.patch(person.mole_x * narrowing, person.mole_y, 2.0, 2.0)
    _paint(rgb, 0.85 * _cover(_ellipse(x, y, 1.3, 1.3)), 0.35 * person.skin)


def _paint_beard(head: _Frame, distance: Array, person: Person) -> None:
    """Stubble to full beard, below a line from the ears to under the nose."""
    if person.beard <= 0.0:
        return
    rows, _ = head.box(0.0, 25.0, person.face_width, 30.0)
    across = (head.x[rows] * (1.0 / person.face_width)) ** 2
    line = _EYE_LINE + person.nose_length + 5.0 - 24.0 * across * across
    cover = _cover(line - head.y[rows], 5.0) * _cover(distance[rows] + 0.5)
    _paint(head.rgb[:, rows], person.beard * cover, 0.9 * person.hair)


def _paint_eyes(head: _Frame, person: Person, expression: Expression) -> None:
    half_w = person.eye_width
    rgb, x, y = head.patch(0.0, _EYE_LINE, person.eye_spacing + half_w + 4.0, 8.0)
    across = np.abs(x) - person.eye_spacing
    to_iris_x = across - np.copysign(expression.gaze_x, x)
    to_iris_y = y - expression.gaze_y + 0.4
    to_iris = np.sqrt(to_iris_x * to_iris_x + to_iris_y * to_iris_y)
    socket = 0.22 * _blob(across, y + 1.0, half_w + 4.0, 8.0)
    y = y + person.eye_tilt * across
    rise = person.eye_height * max(1.0 - expression.blink, 0.0)
    drop = 0.75 * rise
    crease = 0.25 * _cover(_lens(across, y + 2.0, half_w, rise + 0.9, -rise), 1.5)
    lower_lid = 0.3 * _cover(_lens(across, y, half_w, -drop, drop + 1.0))
    _darken(rgb, socket + crease + lower_lid)
    opening = _cover(_lens(across, y, half_w, rise, drop))
    _paint(rgb, opening, _WHITE)
    pupil = _cover(to_iris - 1.7)
    _paint(rgb, opening * _cover(to_iris - 4.0), person.iris, 1.0 - 0.9 * pupil)
    _paint(rgb, opening * _blob(to_iris_x + np.copysign(1.2, x), to_iris_y + 1.3, 1.5, 1.5), _WHITE)
    _paint(rgb, 0.85 * _cover(_lens(across, y, half_w + 1.0, rise + 1.0, 0.5 - rise)), _DARK)


def _paint_brows(head: _Frame, person: Person, expression: Expression) -> None:
    half_w = person.eye_width + 2.5
    height = _EYE_LINE - person.brow_height - expression.brow_raise
    rgb, x, y = head.patch(0.0, height, person.eye_spacing + half_w + 1.0, 6.0)
    x = np.abs(x) - person.eye_spacing - 0.5
    y = y + x * (person.brow_tilt - 0.02 * x)
    thickness = person.brow_thickness * (1.0 - 0.04 * x).clip(0.3, 1.5)
    shape = _lens(x, y, half_w, thickness, 0.6 * thickness)
    _paint(rgb, person.brow_darkness * _cover(shape, 1.5), 0.8 * person.hair)


def _paint_nose(head: _Frame, person: Person) -> None:
    """Ridge with a shadow on both sides, tip, wings and nostrils.

    The nose stands out from the face, so its tip moves further than the rest
    when the head turns.
    """
    tip_x, tip_y = 10.0 * head.yaw, 10.0 * head.pitch
    half_w, length = person.nose_width, person.nose_length
    rgb, x, y = head.patch(tip_x, _EYE_LINE + length + tip_y, half_w + 5.0, length + 4.0)
    up = (y * (-1.0 / length)).clip(0.0, 1.0)
    outwards = np.abs(x)
    edge = np.abs(np.abs(x + tip_x * up) - 2.0 - (half_w - 2.5) * (1.0 - up) ** 2)
    sides = 0.24 * (1.0 - up) * _cover(edge - 0.5, 4.0) * _cover(y - 2.0, 3.0)
    underside = 0.28 * _cover(_lens(x, y - 2.6, half_w, 0.6, 1.6), 2.0)
    wing = np.abs(_ellipse(outwards - 0.62 * half_w, y, 0.4 * half_w, 3.6))
    wings = 0.35 * _cover(wing - 0.2, 1.2) * _cover(0.7 * half_w - outwards, 2.0)
    nostrils = 0.6 * _cover(_ellipse(outwards - 0.45 * half_w, y - 2.2, 0.24 * half_w, 1.1))
    highlight = 0.12 * _blob(x, y + 1.5, 0.6 * half_w, 6.0)
    _darken(rgb, sides + underside + wings + nostrils - highlight)


def _paint_mouth(head: _Frame, person: Person, expression: Expression) -> None:
    half_w = person.mouth_width + 0.5 * expression.smile - 0.25 * expression.mouth_open
    gap, lip = expression.mouth_open, person.lip_thickness
    rgb, x, y = head.patch(0.0, person.mouth_height, half_w + 5.0, gap + 9.0)
    across = (x * (1.0 / half_w)) ** 2
    y = y + expression.smile * (across - 0.4)
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


def _paint_smile_folds(head: _Frame, person: Person, expression: Expression) -> None:
    strength = 0.1 + 0.06 * (1.0 + person.cheek) * max(expression.smile, 0.0)
    rgb, x, y = head.patch(0.0, person.mouth_height - 6.0, person.mouth_width + 9.0, 9.0)
    x = np.abs(x) - person.mouth_width - 3.5
    fold = np.abs(x - y * (0.35 - 0.03 * y)) - 0.4
    _darken(rgb, strength * _cover(fold, 2.0) * _blob(x, y, 8.0, 10.0))


def _paint_front_hair(head: _Frame, distance: Array, person: Person) -> None:
    """Hair on top of the skull, down to the hairline and the temples."""
    rows, _ = head.box(0.0, -20.0, person.face_width, 45.0)
    x, y = head.x[rows], head.y[rows]
    across = (x * (1.0 / person.face_width)) ** 2
    temples = 36.0 + 0.2 * max(person.hair_length, 0.0)
    from_parting = x - person.hair_parting
    peak = (7.0 - 0.5 * np.abs(from_parting)).clip(0.0, 7.0)
    hairline = person.hairline + temples * across * across - peak
    height = person.hair_volume * (0.3 - 0.03 * y).clip(0.1, 1.0)
    curls = (2.5 * person.hair_curl) * _wave(0.07 * (np.abs(x) + y))
    cover = np.minimum(_cover(distance[rows] - height + curls, 1.5), _cover(y - hairline, 2.0))
    fan = from_parting * (45.0 / (y + 100.0))  # strands spread from the parting
    _paint(head.rgb[:, rows], cover, person.hair, _hair_texture(fan, y, person))


# --- Occlusion --------------------------------------------------------------


def _paint_glasses(head: _Frame, person: Person, chance: _Chance, lens_opacity: float) -> None:
    frame_colour, lens_colour = chance.colour(0.0, 0.4), chance.colour(0.0, 0.2)
    half_w, half_h = 10.0 + 3.0 * chance.uniform(), 7.0 + 4.0 * chance.uniform()
    rgb, x, y = head.patch(0.0, _EYE_LINE + 1.0, person.face_width, 12.0)
    outwards = np.abs(x)
    rim = _ellipse(outwards - person.eye_spacing, y, half_w, half_h)
    _paint(rgb, lens_opacity * _cover(rim), lens_colour)
    bridge = np.abs(y + 2.0) + np.maximum(outwards - person.eye_spacing + half_w, 0.0)
    temple = np.abs(y + 2.0) + np.maximum(person.eye_spacing + half_w - outwards, 0.0)
    wire = np.minimum(np.abs(rim), np.minimum(bridge, temple))
    _paint(rgb, _cover(np.maximum(wire - 0.7, outwards - person.face_width - 1.0)), frame_colour)


def _paint_mask(head: _Frame, distance: Array, chance: _Chance) -> None:
    x, y = head.x, head.y
    colour = chance.colour(0.3, 1.0)
    top = 8.0 + 6.0 * chance.uniform() + 0.006 * x * x
    pleats = 0.9 + 0.1 * _wave(0.14 * y)
    _paint(head.rgb, _cover(np.maximum(distance - 1.5, top - y)), colour, pleats)
    strap = np.abs(y - top + 0.2 * np.abs(x) - 2.0) - 0.6
    _paint(head.rgb, _cover(np.maximum(distance, strap)), colour)


def _paint_scarf(frame: _Frame, chance: _Chance) -> None:
    rgb, x, y = frame.patch(0.0, 58.0, 80.0, 42.0)
    top = -34.0 + 14.0 * chance.uniform() + (0.3 * (chance.uniform() - 0.5)) * x + 0.004 * x * x
    stripes = _wave((0.02 + 0.06 * chance.uniform()) * (y + 0.4 * x))
    first, second = chance.colour(), chance.colour()
    _paint(rgb, _cover(top - y, 1.5), first + stripes * (second - first))


def _paint_block(frame: _Frame, chance: _Chance) -> None:
    half_w, half_h = 8.0 + 14.0 * chance.uniform(), 8.0 + 14.0 * chance.uniform()
    x, y = 90.0 * (chance.uniform() - 0.5), 90.0 * (chance.uniform() - 0.5)
    rgb, x, y = frame.patch(x, y, half_w, half_h)
    _paint(rgb, _cover(np.maximum(np.abs(x) - half_w, np.abs(y) - half_h)), chance.colour())


# --- Light and camera -------------------------------------------------------


def _light(frame: _Frame, chance: _Chance) -> None:
    """Exposure, a light from one side, and the colour of the light."""
    across, down = chance.around("side_light") / 50.0, chance.around("side_light") / 50.0
    exposure, warm, green = chance.around("exposure"), chance.around("temperature"), chance.around("tint")
    shade = np.maximum(across * frame.x + down * frame.y + 1.0, 0.2) * (1.0 + exposure)
    frame.rgb *= shade
    frame.rgb *= _colour(1.0 + warm, 1.0 + green, 1.0 - warm)


def _develop(rgb: Array, chance: _Chance) -> None:
    """Tone curve and loss of colour. Leaves every level in [0, 1]."""
    rgb.clip(0.0, 1.0, out=rgb)
    curvature = chance.around("tone_curve")
    rgb *= (1.0 + curvature) - curvature * rgb
    faded = 1.0 if chance.happens("greyscale_share") else chance.upto("desaturation")
    grey = 0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2]
    rgb += faded * (grey - rgb)


def _blur(rgb: Array) -> None:
    """One pass of the kernel (1, 2, 1) / 4 along each axis; the border stays."""
    for planes in (rgb, rgb.transpose(0, 2, 1)):
        pairs = planes[:, :-1] + planes[:, 1:]
        np.add(pairs[:, :-1], pairs[:, 1:], out=planes[:, 1:-1])
        planes[:, 1:-1] *= 0.25


def _quantise(rgb: Array, chance: _Chance) -> Array:
    """Sensor noise, then 8 bits: (3, H, W) in [0, 1] to uint8 (H, W, 3)."""
    noise = np.frombuffer(chance.bytes(SIZE * SIZE), np.int8).reshape(SIZE, SIZE)
    noise = noise * np.float32(2.0 * chance.upto("noise"))
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    for channel, plane in enumerate(rgb):
        picture[:, :, channel] = (255.0 * plane + noise).clip(0.0, 255.0)
    return picture


# --- The person and the picture ---------------------------------------------


def _person(identity: Array, chance: _Chance) -> Person:
    """The traits of an identity and the looks of the day, as named values."""
    traits = zip(_TRAITS.items(), identity.tolist(), strict=True)
    person = Person(**{name: low + t * (high - low) for (name, (low, high)), t in traits})
    person.hairline += chance.around("hair_jitter")
    person.hair_volume = max(person.hair_volume + chance.around("hair_jitter"), 0.5)
    tan = _colour(*(1.0 + chance.around("skin_jitter") for _ in range(3)))
    person.skin = tan * _ramp(_SKIN, person.skin_tone)
    person.hair = _ramp(_HAIR, person.hair_colour)
    person.iris = _ramp(_IRIS, person.iris_colour)
    lips = 0.4 * person.skin + 0.6 * _ramp(_LIPS, person.lip_colour)
    makeup = _colour(0.5 + 0.4 * chance.uniform(), 0.2, 0.25 + 0.2 * chance.uniform())
    person.lips = lips + chance.upto("lip_makeup") * (makeup - lips)
    return person


def draw_identity(rng: np.random.Generator) -> np.ndarray:
    """Draw an identity: float64 (IDENTITY_DIM,), independent and uniform in [0, 1)."""
    return rng.random(IDENTITY_DIM)


def draw_face(identity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one picture of an identity.

    Args:
        identity: (IDENTITY_DIM,) in [0, 1), from draw_identity.
        rng: draws everything else.
    Returns:
        uint8 (SIZE, SIZE, 3), RGB.
    """
    chance = _Chance(rng)
    person = _person(identity, chance)
    expression = _draw_expression(chance)
    body = _Frame(chance)
    head = body.turned(chance.around("yaw"), chance.around("pitch"))

    _paint_background(body, chance)
    _paint_back_hair(body, person)
    _paint_neck_and_clothes(body, person, chance)
    _paint_ears(head, person)
    outline = _head_distance(head.x, head.y, person)
    _paint_skin(head, outline, person)
    _paint_cheeks(head, person)
    _paint_freckles(head, person)
    _paint_beard(head, outline, person)
    _paint_mole(head, person)
    _paint_smile_folds(head, person, expression)
    _paint_nose(head, person)
    _paint_mouth(head, person, expression)
    _paint_eyes(head, person, expression)
    _paint_brows(head, person, expression)
    _paint_front_hair(head, outline, person)

    if chance.happens("mask_share"):
        _paint_mask(head, outline, chance)
    if chance.happens("sunglasses_share"):
        _paint_glasses(head, person, chance, lens_opacity=0.9)
    elif chance.happens("glasses_share"):
        _paint_glasses(head, person, chance, lens_opacity=0.12)
    if chance.happens("scarf_share"):
        _paint_scarf(body, chance)
    if chance.happens("block_share"):
        _paint_block(body, chance)

    _light(body, chance)
    _develop(body.rgb, chance)
    if chance.happens("blur_share"):
        for _ in range(1 + int(chance.upto("blur_passes"))):
            _blur(body.rgb)
    return _quantise(body.rgb, chance)
