"""Clips: the physics of a sliding object, its pictures, and batches of clips from a prepared data set.

    clips = Clips('slide', 'val')           # len(clips) clips, read from disk on demand
    z, a = clips[[0, 5]]                    # z (2,T,N,D) float32, layer-normed; a (2,T,A) float32

To change the world, change the constants and DOMAINS below; to add a domain, add a row to DOMAINS."""
import json
import os
import subprocess
import sys
import typing
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from configurator import ROOT, refuse

# ---- the world: one rigid object on a plane seen from above, SI units ----------------------------------
GRAVITY = 9.81               # m/s^2
FPS = 60.0                   # frames per second
FRAMES = 16                  # frames per clip
TUBELET = 2                  # frames per time step
WORLD = 0.80                 # metres, side of the square picture
IMPULSE = (0.25, 0.80)       # N·s, log-uniform
RADIUS = (0.060, 0.100)      # metres, circumradius of the object
CORNERS = (3, 4, 6, 64)      # triangle, square, hexagon, disc
BACKGROUND = 0.95            # grey level of the plane, 0..1
BRIGHTEST = 0.65             # of an object's colours, 0..1: all stand out from the plane by 0.3 or more


class Physics(typing.NamedTuple):
    """The physics of a domain, in which domains differ."""
    mu: float                # friction coefficient
    mass: float              # kg
    camera: float = 0        # angle in degrees by which the camera is turned
    wind: tuple = (0, 0)     # N·s, a constant push on top of the one that is given
    varied: float = 0        # standard deviation of the log of the mass, which is drawn anew for each clip
    colour: float = 1        # how many times as heavy as blue objects red ones are


# In A more than half of the objects must still move by a pixel or more between the first jump target (step 6)
# and the last (step 8). Otherwise the targets look alike, and a predictor does not learn to use tau.
DOMAINS = {
    'A': Physics(mu=0.12, mass=1.0),                  # the world of training
    'B': Physics(mu=0.05, mass=0.6),                  # the shift under test: about twice the displacement
    'C': Physics(mu=0.25, mass=1.0),                  # more friction
    'friction': Physics(mu=0.05, mass=1.0),           # B's friction alone
    'mass': Physics(mu=0.12, mass=0.6),               # B's mass alone
    'ice': Physics(mu=0.01, mass=1.0),                # almost no friction
    'turned': Physics(mu=0.12, mass=1.0, camera=40),  # pushes are given in another frame than the pictures
    'wind': Physics(mu=0.12, mass=1.0, wind=(0.2, 0.1)),
    'varied': Physics(mu=0.12, mass=1.5, varied=0.3),  # heavier, and nothing tells how much
    'colour': Physics(mu=0.12, mass=1.0, colour=2.5),  # heavier or lighter, as its colour tells
}
# Objects start where they would stay in view under each of these: so the start tells nothing of the domain,
# and a new domain moves no clip. One that slides further needs a wider room, which moves all.
ROOM = [Physics(mu=0.01, mass=0.6)]
ROOM += [Physics(mu=0.01, mass=1.0, camera=camera) for camera in (90, -90)]
ROOM += [Physics(mu=0.01, mass=1.0, wind=(wind, wind)) for wind in (0.2, -0.2)]


def displacement(impulse, physics, seconds):
    """Metres slid `seconds` after an impulse in N·s (broadcasts): v0 = J/m, constant deceleration mu*g
    (Coulomb friction), rest after v0/(mu*g) at v0^2 / (2 mu g)."""
    v0 = impulse / physics.mass
    brake = physics.mu * GRAVITY
    t = np.minimum(np.maximum(seconds, 0.0), v0 / brake)
    return v0 * t - 0.5 * brake * t * t


def acting(impulse, physics):
    """The push (...,2) in N·s that acts, as the picture has it: the given one and the wind, turned."""
    x, y = np.moveaxis(impulse + np.asarray(physics.wind), -1, 0)
    cos, sin = np.cos(np.deg2rad(physics.camera)), np.sin(np.deg2rad(physics.camera))
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)       # from x towards y


def slide(impulse, physics, seconds):
    """Metres (...,2) from the start, `seconds` after impulses (...,2) in N·s as given, without the wind."""
    push = acting(impulse, physics)
    size = np.linalg.norm(push, axis=-1, keepdims=True)
    return displacement(size, physics, seconds) * push / np.maximum(size, 1e-9)


def path(impulse, mass, physics):
    """Positions (n,FRAMES,2) relative to the start, after impulses (n,2); mass (n,) kg, or one for all."""
    seconds = (np.arange(FRAMES) - (TUBELET - 1)) / FPS
    return slide(impulse[:, None], physics._replace(mass=np.reshape(mass, (-1, 1, 1))), seconds[:, None])


def places_to_start(radius, paths, zoom):
    """Least and greatest places (n,2) where objects, radii (n,1), stay in WORLD / zoom on all paths."""
    ends = np.stack([path[:, -1] for path in paths])                   # (paths,n,2)
    low = radius + np.maximum(0, -ends).max(0)
    high = WORLD / zoom - radius - np.maximum(0, ends).max(0)
    return low, high


def simulate(domain, clips, seed, split, zoom=1):
    """Draw clips of a domain and solve their motion; the same (seed, split) gives the same clips.

    Returns arrays over n = clips: mu (n,), mass (n,) kg, impulse (n,2) N·s without the wind, position
    (n,FRAMES,2) m in the picture; for render() corners (n,), radius (n,) m, angle (n,) rad, colour (n,3) in
    0..1. Objects rest during the first time step, so z_1 holds no physics; the impulse acts at its last
    frame. Refuses a domain in which objects slide out of view. zoom: plane and objects are so many times
    smaller and seen from as much nearer by; position and radius are those in the picture; above 1 the room is
    that of this domain alone."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    u = rng.random((clips, 11))
    size = IMPULSE[0] * (IMPULSE[1] / IMPULSE[0]) ** u[:, 0:1]         # (n,1)
    direction = 2 * np.pi * u[:, 1]
    impulse = size * np.stack([np.cos(direction), np.sin(direction)], axis=1)
    colour = BRIGHTEST * u[:, 7:10]
    radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[:, 2:3]) / zoom  # (n,1)
    physics = DOMAINS[domain]
    # Uniform between two bounds, so that no mass is far off; sqrt(3) makes `varied` a standard deviation.
    spread = np.sqrt(3) * (2 * u[:, 10] - 1)
    red = np.where(colour[:, 0] > colour[:, 2], 0.5, -0.5)
    mass = physics.mass * np.exp(physics.varied * spread) * physics.colour ** red
    motion = path(impulse, mass, physics)
    room = [motion] if zoom > 1 else [path(impulse, other.mass, other) for other in ROOM]
    low, high = places_to_start(radius, room, zoom)
    start = low + (high - low) * u[:, 3:5]
    least, most = places_to_start(radius, [motion], zoom)
    if (start < least - 1e-9).any() or (start > most + 1e-9).any():
        refuse(f'domain {domain}: objects slide out of view; widen ROOM or enlarge WORLD in data.py')
    corners = (u[:, 5] * len(CORNERS)).astype(int)
    return {
        'mu': np.full(clips, physics.mu),
        'mass': mass,
        'impulse': impulse,
        'position': zoom * (start[:, None] + motion),
        'corners': np.asarray(CORNERS)[corners],
        'radius': zoom * radius[:, 0],
        'angle': 2 * np.pi * u[:, 6],
        'colour': colour,
    }


def render(clips, size, device='cpu'):
    """Pictures of the clips of simulate() → uint8 (n,FRAMES,size,size,3), antialiased. All shapes are regular
    polygons: folding the angle maps all edges to one, whose signed distance is computed."""
    def column(name, *shape):
        return torch.as_tensor(clips[name], dtype=torch.float32, device=device).view(*shape)
    n = len(clips['mu'])
    scale = size / WORLD
    centre = column('position', n, FRAMES, 2) * scale
    # Only a box around the object is computed. At the border the box is moved inside.
    box = min(size, 2 * int(RADIUS[1] * scale + 2) + 1)
    corner = (centre.long() - box // 2).clamp(0, size - box)           # (n,F,2)
    pixel = corner[..., None] + torch.arange(box, device=device)       # (n,F,2,box)
    x, y = (pixel + 0.5 - centre[..., None]).unbind(2)                 # (n,F,box)
    x = x[..., None, :]                                                # (n,F,1,box)
    y = y[..., :, None]                                                # (n,F,box,1)

    sector = 2 * torch.pi / column('corners', n, 1, 1, 1)
    angle = torch.atan2(y, x) - column('angle', n, 1, 1, 1)            # (n,F,box,box)
    folded = torch.remainder(angle, sector) - sector / 2
    distance = torch.hypot(y, x) * folded.cos()
    edge = column('radius', n, 1, 1, 1) * scale * (sector / 2).cos()
    cover = (0.5 + edge - distance).clamp(0, 1)
    colour = column('colour', n, 1, 1, 1, 3)
    shade = BACKGROUND + cover[..., None] * (colour - BACKGROUND)      # (n,F,box,box,3)
    painted = (shade * 255 + 0.5).to(torch.uint8)

    grey = int(BACKGROUND * 255 + 0.5)
    frames = torch.full((n * FRAMES, size, size, 3), grey, dtype=torch.uint8, device=device)
    across, down = pixel.view(n * FRAMES, 2, box).unbind(1)
    frame = torch.arange(n * FRAMES, device=device)[:, None, None]
    frames[frame, down[:, :, None], across[:, None]] = painted.flatten(0, 1)
    return frames.view(n, FRAMES, size, size, 3)


def tubelets(frames, patch):
    """uint8 frames (n,F,H,W,3) → float pixels in [-1,1] of every tubelet, (n,T,N,3,TUBELET*patch*patch)."""
    n, count, height, width, _ = frames.shape
    steps, rows, columns = count // TUBELET, height // patch, width // patch
    # (n,T,t,rows,y,columns,x*colour) → (n,T,rows*columns,t*y*x,colour)
    x = frames.view(n, steps, TUBELET, rows, patch, columns, patch * 3)
    x = x.permute(0, 1, 3, 5, 2, 4, 6)
    x = x.reshape(n, steps, rows * columns, TUBELET * patch * patch, 3)
    return (x.float() / 127.5 - 1).mT


def pictures(z, decoder, grid, patch):
    """Features turned back into pictures: z (n,N,D) layer-normed, decoder (D+1, 3*TUBELET*patch*patch) of
    prepare.py, grid (rows, columns) → float (n,H,W,3) in [0,1], the last frame of the step."""
    n = len(z)
    rows, columns = grid
    blocks = z @ decoder[:-1] + decoder[-1]                            # (n,N,3*t*y*x)
    last = blocks.view(n, rows, columns, 3, TUBELET, patch, patch)[:, :, :, :, -1]
    # (n,rows,columns,colour,y,x) → (n,H,W,colour)
    picture = last.permute(0, 1, 4, 2, 5, 3).reshape(n, rows * patch, columns * patch, 3)
    return (picture / 2 + 0.5).clamp(0, 1)


# ---- clips of a prepared data set ----------------------------------------------------------------------
# data/<name>/meta.json     prepare.py's options, shape (T,N,D), grid, and the paths of own features
# data/<name>/<split>.npz   actions (n,T,A), states (n,T,S) if there are any, and what simulate() returned
# data/<name>/<split>.npy   features (n,T,N,D) float16, named last: a split that is there is complete

def folder_of(name):
    """data/<name> beside the code; a name with a path separator is taken as a folder."""
    return os.path.abspath(name) if os.sep in name else os.path.join(ROOT, 'data', name)


def read_meta(name):
    """The meta.json of a data set; refuses a set that is not there."""
    path = os.path.join(folder_of(name), 'meta.json')
    if not os.path.isfile(path):
        refuse(f'no data set at {folder_of(name)}; make it with: python prepare.py --name={name}')
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def has_split(name, split):
    """Whether a data set has a split, and all of it."""
    ending = 'npz' if split in read_meta(name).get('files', {}) else 'npy'    # of what is named last
    return os.path.isfile(os.path.join(folder_of(name), f'{split}.{ending}'))


def make_slide(name):
    """Have prepare.py make data/slide, the default data set, if that is asked for and not whole."""
    if name == 'slide' and not os.path.isfile(os.path.join(folder_of(name), 'decoder.npy')):
        print('preparing data/slide first (built-in physics, nothing is downloaded)', flush=True)
        subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py')], check=True)


class Clips:
    """Splits of a data set, joined, read from disk on demand: clips[indices] → z (b,T,N,D), a (b,T,A); a
    number gives one clip. .actions (n,T,A) and .states (n,T,S or None) float32, .physics (arrays of
    simulate(), empty for several splits), .meta, .several_pushes (whether any clip has a push after step 1).
    Refuses a split that is missing."""

    def __init__(self, name, *splits):
        self.meta = read_meta(name)
        self.folder = folder_of(name)
        self.name = f'split {" + ".join(splits)} of {self.folder}'
        # Of each clip an array (T,N,D), memory-mapped, or the path of own features.
        self.features, arrays = [], []
        for split in splits:
            if not has_split(name, split):
                refuse(f'data set {name} has no split {split!r}; run prepare.py as before to make it')
            paths = self.meta.get('files', {}).get(split)
            self.features.extend(paths or np.load(f'{self.folder}/{split}.npy', mmap_mode='r'))
            arrays.append(dict(np.load(f'{self.folder}/{split}.npz')))
        self.actions = np.concatenate([array.pop('actions') for array in arrays])
        self.states = None
        if all('states' in array for array in arrays):
            self.states = np.concatenate([array.pop('states') for array in arrays])
        self.physics = arrays[0] if len(splits) == 1 else {}
        self.several_pushes = bool(self.actions[:, 1:].any())

    def __len__(self):
        return len(self.actions)

    def __getitem__(self, indices):
        """z, float32, layer-normed without affine (eps 1e-5), and a, float32: see Clips."""
        chosen = np.arange(len(self))[indices]
        features, a, _ = self.stored(np.atleast_1d(chosen))
        z = normed(features)
        return (z[0], a[0]) if np.ndim(chosen) == 0 else (z, a)

    def stored(self, clips, pinned=False, steps=None):
        """Clips (b,) as they are stored → features (b,T,N,D) float16, actions (b,T,A), states (b,T,S) or
        None. pinned: in memory that a GPU can copy from without waiting. steps: only so many of the features.
        """
        clips = np.asarray(clips)
        T, N, D = self.meta['shape']
        features = torch.empty(len(clips), steps or T, N, D, dtype=torch.float16, pin_memory=pinned)
        for place, clip in zip(features.numpy(), clips):
            stored = self.features[clip]
            # Own files are opened one by one, as there may be many.
            array = np.load(stored, mmap_mode='r') if isinstance(stored, str) else stored
            place[:] = array.reshape(T, N, D)[:steps]
        states = None if self.states is None else torch.from_numpy(self.states[clips])
        return features, torch.from_numpy(self.actions[clips]), states


def normed(features):
    """Features as they are stored → z: float32, layer-normed without affine (eps 1e-5)."""
    z = features.float()
    return F.layer_norm(z, z.shape[-1:])


def batch_indices(clips, batch_size, seed, number):
    """Indices (batch_size,) of batch `number` of an endless pass in random order, a fresh permutation per
    epoch. It depends on its arguments only, so a resumed run draws the same clips without a saved position.
    """
    first = number * batch_size
    picked = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), clips)
        order = np.random.default_rng([seed, epoch]).permutation(clips)
        missing = batch_size - len(picked)
        picked.extend(order[offset:offset + missing])
    return np.array(picked, int)


def read_ahead(batches):
    """Go through an iterator of batches; the next is read in a thread while the present one is used."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def mean_push(actions):
    """Mean length of the pushes of clips, actions (clips,T,A); 1 where there are none."""
    sizes = np.linalg.norm(actions, axis=-1)
    return float(sizes[sizes > 0].mean()) if sizes.any() else 1.0


def median_scene(clips):
    """Each patch's median feature over the first clips, 256 of them or 256 MiB: an empty scene, (N,D)."""
    T, N, D = clips.meta['shape']
    count = min(256, 2**26 // (T * N * D) + 1, len(clips))
    z, _ = clips[range(count)]
    return z.flatten(0, 1).median(0).values
