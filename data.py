"""
Clips: the physics of a sliding object, its pictures, and batches of clips from a prepared data set.

    clips = open_split('slide', 'val')      # len(clips) clips, read from disk on demand
    z, a = clips[[0, 5]]                    # z (2,T,N,D) float32, layer-normed; a (2,T,A) float32
    z, a = clips[0]                         # z (T,N,D), a (T,A), as a torch DataLoader wants them

To change the world, change the constants and DOMAINS below; to add a domain, add a row to DOMAINS.
"""
import hashlib
import io
import json
import math
import os
import typing
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from configurator import Refusal
from support.files import folder_of, map_array, read_checksums, read_manifest, verify

# ---- the world: one rigid object on a plane seen from above, SI units --------------------------------------------
GRAVITY = 9.81               # m/s^2
FPS = 60.0                   # frames per second
FRAMES = 16                  # frames per clip
TUBELET = 2                  # frames per time step
WORLD = 0.80                 # metres, side of the square picture
IMPULSE = (0.25, 0.80)       # N·s, log-uniform
RADIUS = (0.060, 0.100)      # metres, circumradius of the object
CORNERS = (3, 4, 6, 64)      # triangle, square, hexagon, disc
BACKGROUND = 0.10            # grey level of the plane, 0..1


class Physics(typing.NamedTuple):
    """The physics of a domain, in which domains differ."""

    # Friction coefficient
    mu: float
    # kg
    mass: float
    # Angle in degrees by which the camera is turned
    camera: float = 0


# In A more than half of the objects must still move by a pixel or more between the first jump target (step 6) and the last
# (step 8). Otherwise the targets look alike, and a predictor does not learn to use tau.
DOMAINS = {
    # The world of training.
    'A': Physics(mu=0.12, mass=1.0),
    # The shift under test: less friction and less mass, about twice the displacement.
    'B': Physics(mu=0.05, mass=0.6),
    # More friction.
    'C': Physics(mu=0.25, mass=1.0),
    # B's friction alone, and B's mass alone.
    'friction': Physics(mu=0.05, mass=1.0),
    'mass': Physics(mu=0.12, mass=0.6),
    # Almost no friction.
    'ice': Physics(mu=0.01, mass=1.0),
    # A with a turned camera: pushes are given in another frame than the pictures.
    'turned': Physics(mu=0.12, mass=1.0, camera=40),
}


def displacement(impulse, physics, seconds):
    """
    Distance in metres slid `seconds` after an impulse in N·s under the Physics of a domain (broadcasts over arrays).

    Coulomb friction: v0 = J/m, constant deceleration mu*g, rest after v0/(mu*g); the stopping distance is v0^2 / (2 mu g).
    """
    v0 = impulse / physics.mass
    brake = physics.mu * GRAVITY
    t = np.minimum(np.maximum(seconds, 0.0), v0 / brake)
    return v0 * t - 0.5 * brake * t * t


def turn(vectors, degrees):
    """Vectors (...,2) turned by an angle, from x towards y."""
    angle = np.deg2rad(degrees)
    cos = np.cos(angle)
    sin = np.sin(angle)
    x = vectors[..., 0]
    y = vectors[..., 1]
    turned_x = cos * x - sin * y
    turned_y = sin * x + cos * y
    return np.stack([turned_x, turned_y], axis=-1)


def simulate(domain, clips, seed, split, zoom=1):
    """
    Draw clips of a domain and solve their motion; one independent random stream per (seed, split).

    Returns a dict of arrays over n = clips: mu (n,), mass (n,) kg, impulse (n,2) N·s as it is given to the predictor,
    position (n,FRAMES,2) m in the picture, and for render() corners (n,), radius (n,) m, angle (n,) rad, colour (n,3) in
    0..1. The object rests during the first time step, so z_1 holds no physics; the impulse acts at the last frame of that
    step. The start is drawn so that the object would stay in view in every domain of DOMAINS, so it carries no
    information about the domain. Raises Refusal for a domain that is not in DOMAINS,
    and where an object cannot stay in view.

    zoom: a factor above 1, or one per clip (n,), shows the world from nearer by, through a window of WORLD / zoom. Position
    and radius are then multiplied by zoom: they are those of the object in the picture, whose side counts as WORLD. The
    impulse is not. Far motion leaves no room for every domain, so the object then stays in view in this domain only.
    """
    if domain not in DOMAINS:
        raise Refusal(f'no domain is called {domain!r}; there are {", ".join(DOMAINS)}')
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    u = rng.random((clips, 10))
    weakest, strongest = IMPULSE
    impulse = weakest * (strongest / weakest) ** u[:, 0]
    direction = 2 * np.pi * u[:, 1]
    heading = np.stack([np.cos(direction), np.sin(direction)], axis=1)    # (n,2)
    least, largest = RADIUS
    radius = least + (largest - least) * u[:, 2]
    seconds = (np.arange(FRAMES) - (TUBELET - 1)) / FPS

    def path(physics):
        """Position of the object relative to its start, (n,FRAMES,2)."""
        slid = displacement(impulse[:, None], physics, seconds)           # (n,FRAMES)
        seen_heading = turn(heading, physics.camera)
        return slid[:, :, None] * seen_heading[:, None]

    zoom = np.broadcast_to(zoom, clips)[:, None]
    in_view = [DOMAINS[domain]] if (zoom > 1).any() else DOMAINS.values()
    ends = [path(physics)[:, -1] for physics in in_view]
    ends = np.stack(ends)                                                 # (domains,n,2)
    furthest_back = np.maximum(0, -ends).max(0)
    furthest_ahead = np.maximum(0, ends).max(0)
    low = radius[:, None] + furthest_back
    high = WORLD / zoom - radius[:, None] - furthest_ahead
    if (low > high).any():
        raise Refusal(f'domain {domain}, a window of {WORLD / zoom.max():.2f} m: objects slide out of view; enlarge WORLD, or '
                      'lower ZOOM in prepare.py')
    start = low + (high - low) * u[:, 3:5]
    physics = DOMAINS[domain]
    position = start[:, None] + path(physics)
    corners = (u[:, 5] * len(CORNERS)).astype(int)
    return {
        'mu': np.full(clips, physics.mu),
        'mass': np.full(clips, physics.mass),
        'impulse': impulse[:, None] * heading,
        'position': zoom[:, None] * position,
        'corners': np.asarray(CORNERS)[corners],
        'radius': zoom[:, 0] * radius,
        'angle': 2 * np.pi * u[:, 6],
        'colour': 0.3 + 0.7 * u[:, 7:10],
    }


def render(clips, size, device='cpu'):
    """
    Pictures of simulated clips (the dict of simulate()) → uint8 (n,FRAMES,size,size,3), antialiased.

    Every shape is a regular polygon. Folding the angle maps all of its edges to one, whose signed distance is computed.
    """
    def column(name, *shape):
        """An array of the clips as a tensor of this shape."""
        return torch.as_tensor(clips[name], dtype=torch.float32, device=device).view(*shape)
    n = len(clips['mu'])
    scale = size / WORLD
    centre = column('position', n, FRAMES, 2) * scale
    # Only a box around the object is computed. At the border the box is moved inside.
    largest = max(RADIUS[1], clips['radius'].max())
    box = min(size, 2 * int(largest * scale + 2) + 1)
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
    frame = torch.arange(n * FRAMES, device=device)
    frames[frame[:, None, None], down[:, :, None], across[:, None]] = painted.flatten(0, 1)
    return frames.view(n, FRAMES, size, size, 3)


def tubelets(frames, patch):
    """uint8 frames (n,F,H,W,3) → float pixels in [-1,1] of every tubelet, (n,T,N,3,TUBELET*patch*patch)."""
    n, f, h, w, _ = frames.shape
    steps, rows, columns = f // TUBELET, h // patch, w // patch
    # (n,T,t,rows,y,columns,x*colour) → (n,T,rows*columns,t*y*x,colour)
    x = frames.view(n, steps, TUBELET, rows, patch, columns, patch * 3)
    x = x.permute(0, 1, 3, 5, 2, 4, 6)
    x = x.reshape(n, steps, rows * columns, TUBELET * patch * patch, 3)
    return (x.float() / 127.5 - 1).mT


def pictures(z, decoder, grid, patch):
    """
    Features turned back into pictures: z (n,N,D) layer-normed, decoder (D+1, 3*TUBELET*patch*patch) as prepare.py fitted
    it, grid (rows, columns) with rows*columns = N → float (n,H,W,3) in [0,1], the last frame of the step.
    """
    rows, columns = grid
    # (n,N,3*t*y*x)
    blocks = z @ decoder[:-1] + decoder[-1]
    blocks = blocks.view(len(z), rows, columns, 3, TUBELET, patch, patch)
    # (n,rows,columns,colour,y,x)
    last = blocks[:, :, :, :, -1]
    last = last.permute(0, 1, 4, 2, 5, 3)
    # (n,H,W,colour)
    picture = last.reshape(len(z), rows * patch, columns * patch, 3)
    return (picture / 2 + 0.5).clamp(0, 1)


# ---- clips of a prepared data set (its files: support/files.py) ---------------------------------------------------------

class Shard(typing.NamedTuple):
    """Where the features of some clips of a split are: a file of the set, or, read in place, the own file of one clip."""
    path: str
    # Number of clips
    clips: int
    # Where the first clip begins in a file of the set, in bytes
    offset: int = 0
    # Read in place: what prepare.py found in the file
    sha256: str = ''
    # In a file of the set: the CRC-32 of each clip, uint32 (clips,); None where an earlier version made it
    crc32: np.ndarray = None


class Split:
    """
    Splits of a data set, one after the other, read from disk on demand.

    len(clips), and clips[index] → z (T,N,D), a (T,A) as one item of a torch DataLoader, or clips[indices] → z (b,T,N,D),
    a (b,T,A), indices being a sequence or a slice. Further: .actions (clips,T,A) float32, .states (clips,T,S) float32 or
    None, .several_pushes (whether any clip has a push after step 1), .physics (dict of arrays, or empty) and .manifest.

    Opening it checks the size and header of each file; a clip is compared with its checksum when it is first read.
    manifest: that of a set that is not finished yet; None to read it. Raises Refusal where a split is missing, or where
    anything is not as prepare.py writes it.
    """

    def __init__(self, name, *splits, manifest=None):
        folder = folder_of(name)
        self.manifest = manifest or read_manifest(name)
        self.name = f'split {" + ".join(splits)} of {folder}'
        self.folder = folder
        try:
            self.shards = []
            parts = {'actions': [], 'states': [], 'physics': []}
            for split in splits:
                if split not in self.manifest['splits']:
                    raise Refusal(no_such_split(name, [split], self.manifest))
                self.shards += self.find_shards(split)
                for key, read in parts.items():
                    read.append(self.read_arrays(split, key))
            self.starts = np.cumsum([0] + [shard.clips for shard in self.shards])
            # Whether a clip was read before, and found whole.
            self.whole = np.zeros(self.starts[-1], bool)
            self.actions = np.concatenate(parts['actions'])
            has_states = all(states is not None for states in parts['states'])
            self.states = np.concatenate(parts['states']) if has_states else None
            self.physics = {}
            if len(splits) == 1 and parts['physics'][0]:
                self.physics = parts['physics'][0]
            self.check()
        except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise Refusal(f'{self.name} is not as prepare.py writes it ({type(error).__name__}: {error})') from None
        self.several_pushes = bool(self.actions[:, 1:].any())

    def find_shards(self, split):
        """The Shards of a split, the sizes and headers of their files checked."""
        T, N, D = self.manifest['shape']
        rows, columns = self.manifest['grid']
        shards = []
        for entry in self.manifest['splits'][split]['shards']:
            file = entry['file']
            if file.endswith('.json'):
                shards += self.find_in_place(file)
                continue
            array = map_array(self.folder, file)
            if array.shape[1:] != (T, N, D) or array.dtype != np.float16 or rows * columns != N:
                raise ValueError(f'its shards are not float16 (clips,{T},{N},{D}) on a grid {rows} x {columns}')
            crc32 = read_checksums(entry['crc32']) if 'crc32' in entry else None
            if crc32 is not None and len(crc32) != len(array):
                raise ValueError(f'{file} has {len(array)} clips and {len(crc32)} checksums')
            shards.append(Shard(array.filename, len(array), array.offset, crc32=crc32))
        return shards

    def find_in_place(self, file):
        """The Shards of clips that are read in place, from the list that prepare.py made of them."""
        verify(self.folder, self.manifest, [file])
        with open(os.path.join(self.folder, file), encoding='utf-8') as f:
            listed = json.load(f)
        shards = []
        for clip in listed:
            path = clip['path']
            if not os.path.isfile(path) or os.path.getsize(path) != clip['bytes']:
                raise Refusal(self.changed(path))
            shards.append(Shard(path, 1, sha256=clip['sha256']))
        return shards

    def changed(self, path):
        """What to do about a clip that is read in place and is not what it was."""
        return (f'{path} is missing or has changed since {self.folder} was made, which reads its clips in place; restore the '
                'file, or delete that folder and run prepare.py again')

    def read_arrays(self, split, key):
        """Actions, states or physics of a split, their checksum compared; None where there are none. Actions must exist."""
        file = f'{split}_{key}.npz' if key == 'physics' else f'{split}_{key}.npy'
        if key != 'actions' and file not in self.manifest['sha256']:
            return None
        verify(self.folder, self.manifest, [file])
        if key == 'physics':
            with np.load(os.path.join(self.folder, file)) as stored:
                return dict(stored)
        return np.array(map_array(self.folder, file))

    def check(self):
        """Raise ValueError or Refusal unless the arrays have the manifest's shapes and are finite."""
        T = self.manifest['shape'][0]
        count = self.starts[-1]
        if not count:
            raise Refusal(f'{self.name} is empty')
        for key in ('actions', 'states'):
            array = getattr(self, key)
            if array is None:
                continue
            if array.shape[:2] != (count, T) or array.ndim != 3 or array.dtype != np.float32:
                raise ValueError(f'its {key} are not float32 ({count},{T},numbers) but {array.dtype} {array.shape}')
            finite = np.isfinite(array).all((1, 2))
            if not finite.all():
                raise Refusal(f'{self.name}: the {key} of clip {np.argmin(finite)} are not finite')
        if self.physics:
            position = self.physics['position']
            if position.ndim != 3 or position.shape[::2] != (count, 2):
                raise ValueError(f'its positions are not ({count},frames,2)')

    def __len__(self):
        return len(self.actions)

    def __getitem__(self, indices):
        """
        Features z, float32, layer-normed without affine (eps 1e-5), and actions a, float32, of clips.

        A number gives z (T,N,D) and a (T,A); a sequence of b numbers or a slice gives z (b,T,N,D) and a (b,T,A). Raises
        IndexError as a list does, and Refusal where features are not finite, or where a file is not what it was.
        """
        # Makes slices, negative numbers and an IndexError work as for a list.
        chosen = np.arange(len(self))[indices]
        clips = np.atleast_1d(chosen)
        features, a, _ = self.stored(clips)
        z = normed(features)
        return (z[0], a[0]) if np.ndim(chosen) == 0 else (z, a)

    def stored(self, clips, pinned=False):
        """
        Clips (b,) as they are stored: features (b,T,N,D) float16, of which normed() makes z, actions (b,T,A) and states
        (b,T,S), or None.

        pinned: features in memory from which a GPU can copy them without waiting. Raises Refusal as indexing does.
        """
        clips = np.asarray(clips)
        features = torch.empty(len(clips), *self.manifest['shape'], dtype=torch.float16, pin_memory=pinned)
        shard_of = np.searchsorted(self.starts, clips, side='right') - 1
        for number in np.unique(shard_of):
            members = np.flatnonzero(shard_of == number)
            self.read(number, clips[members], features.numpy(), members)
        states = None if self.states is None else torch.from_numpy(self.states[clips])
        return features, torch.from_numpy(self.actions[clips]), states

    def read(self, number, clips, features, places):
        """Read clips of Shard `number` into features[places]; features: float16 (b,T,N,D). What is new is checked."""
        shard = self.shards[number]
        first = self.starts[number]
        try:
            # Not memory-mapped: a map keeps its file open, and a process may open about a thousand.
            with open(shard.path, 'rb') as f:
                for clip, place in zip(clips.tolist(), places.tolist()):
                    new = not self.whole[clip]
                    if shard.sha256:
                        read_in_place(f, shard, features[place], new)
                    else:
                        read_row(f, shard, clip - first, features[place], new)
                    if new and not all_finite(features[place]):
                        raise Refusal(f'{self.name}: the features of clip {clip} are not finite')
                    self.whole[clip] = True
        except (EOFError, OSError, ValueError):
            if shard.sha256:
                raise Refusal(self.changed(shard.path)) from None
            raise Refusal(f'{shard.path} is damaged or missing; prepare.py, run as before, repairs it') from None


def read_row(f, shard, row, clip, compare):
    """Read a row of the open file of a Shard into `clip`, float16 (T,N,D); raises ValueError where it is damaged."""
    f.seek(shard.offset + row * clip.nbytes)
    if f.readinto(clip) < clip.nbytes:
        raise EOFError
    if compare and shard.crc32 is not None and zlib.crc32(clip) != shard.crc32[row]:
        raise ValueError


def read_in_place(f, shard, clip, compare):
    """Read the open file of one clip into `clip`, float16 (T,N,D); raises ValueError where it has changed."""
    f.seek(0)
    raw = f.read()
    if compare and hashlib.sha256(raw).hexdigest() != shard.sha256:
        raise ValueError
    clip[:] = np.load(io.BytesIO(raw), allow_pickle=False).reshape(clip.shape)


def all_finite(features):
    """Whether all of an array of float16 are finite. In a NaN or an infinity all bits of the exponent are set."""
    return (features.view(np.uint16) & 0x7fff).max() < 0x7c00


def normed(features):
    """Features as they are stored → z: float32, layer-normed without affine (eps 1e-5)."""
    z = features.float()
    return F.layer_norm(z, z.shape[-1:])


def no_such_split(name, missing, manifest):
    """What to say where a data set has no splits of these names."""
    words = f'data set {name} has no split {", ".join(map(repr, missing))}; it has {", ".join(manifest["splits"])}'
    later = [split.removeprefix('test_') for split in missing if split.removeprefix('test_') in DOMAINS]
    if later and manifest['made_from'].get('source') == 'physics':
        words += (f': it was made before the domain {later[0]} was added; make it anew (delete {folder_of(name)} and run '
                  'prepare.py as before, or give prepare.py another --name)')
    return words


def open_split(name, *splits):
    """Splits of a prepared data set (a name under data/ or a folder), joined; raises Refusal for missing or unfit ones."""
    return Split(name, *splits)


def batch_indices(clips, batch_size, seed, number):
    """
    Indices (batch_size,) of batch `number` of an endless pass in random order, a fresh permutation per epoch.

    It depends on its arguments only, so a resumed run draws the same clips without a saved position.
    """
    first = number * batch_size
    picked = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), clips)
        order = np.random.default_rng([seed, epoch]).permutation(clips)
        missing = batch_size - len(picked)
        picked.extend(order[offset:offset + missing])
    return np.array(picked)


def read_ahead(batches):
    """Go through an iterator of batches, the next of which is read in a thread while the present one is used."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def mean_push(actions):
    """Mean length of the pushes of clips, actions (clips,T,A); 1 where there are none."""
    sizes = np.linalg.norm(actions, axis=-1)
    return float(sizes[sizes > 0].mean()) if sizes.any() else 1.0


def median_scene(split):
    """Each patch's median feature over the first clips, 256 of them or 256 MiB: an empty scene, (N,D)."""
    T, N, D = split.manifest['shape']
    clips = min(256, 2**26 // (T * N * D) + 1, len(split))
    z, _ = split[range(clips)]
    return z.flatten(0, 1).median(0).values


def explained(x, y):
    """
    Share of the variance of y (n,k) that a linear read-out of x (n,d) explains on clips it was not fitted to, at most 1.

    Ridge regression, each clip predicted from all others (leave-one-out in closed form), with the best of six strengths.
    """
    # The 1 is the bias.
    gram = (x @ x.T).double() / x.shape[1] + 1
    identity = torch.eye(len(x), dtype=gram.dtype)
    y = y.double()
    total = (y - y.mean(0)).square().sum()
    best = -math.inf
    for strength in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        inverse = torch.linalg.inv(gram + strength * identity)
        # The residual of each clip when it is left out.
        residuals = inverse @ y / inverse.diagonal()[:, None]
        unexplained = residuals.square().sum() / total
        best = max(best, 1 - unexplained.item())
    return best
