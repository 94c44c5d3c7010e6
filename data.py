"""
Clips: the physics of a sliding object, its pictures, the shards on disk, and batches of clips read back from them.

    clips = open_split('slide', 'val')      # len(clips) clips, memory-mapped
    z, a = clips[[0, 5]]                    # z (2,T,N,D) float32, layer-normed; a (2,T,A) float32, zero after step 1

To change the world, change the constants and DOMAINS below; to add a domain, add a row to DOMAINS.
"""
import hashlib
import json
import math
import os
import sys
import time
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from configurator import ROOT, Refusal

try:
    import fcntl
except ImportError:          # Windows: two runs into one place are not kept apart there
    fcntl = None

# ---- the world: one rigid object on a plane seen from above, SI units --------------------------------------------
GRAVITY = 9.81               # m/s^2
FPS = 60.0                   # frames per second
FRAMES = 16                  # frames per clip
TUBELET = 2                  # frames per time step, so T = 8 steps
WORLD = 0.80                 # metres that the square picture shows
IMPULSE = (0.25, 0.80)       # N·s, log-uniform
RADIUS = (0.060, 0.100)      # metres, circumradius of the object
CORNERS = (3, 4, 6, 64)      # triangle, square, hexagon, disc
BACKGROUND = 0.10            # grey level of the plane, 0..1; objects are brighter

# Time matters: in A more than half of the objects still move by a pixel or more between the first jump target (step 6)
# and the last (step 8).
DOMAINS = {                  # friction coefficient, mass in kg, angle in degrees by which the camera is turned
    'A': (0.12, 1.0, 0),         # normal
    'B': (0.05, 0.6, 0),         # the shift under test: both clearly reduced, about twice the displacement
    'C': (0.25, 1.0, 0),         # more friction
    'friction': (0.05, 1.0, 0),  # B's friction alone
    'mass': (0.12, 0.6, 0),      # B's mass alone
    'ice': (0.01, 1.0, 0),       # almost no friction
    'turned': (0.12, 1.0, 40),   # A's physics; the camera is turned, so pushes come in another frame than the pictures
}


def displacement(impulse, mu, mass, seconds):
    """
    Distance in metres slid `seconds` after an impulse under Coulomb friction (broadcasts over arrays).

    impulse N·s, mu dimensionless, mass kg. v0 = J/m, constant deceleration mu*g, rest after v0/(mu*g); the stopping
    distance is v0^2 / (2 mu g).
    """
    v0, brake = impulse / mass, mu * GRAVITY
    t = np.minimum(np.maximum(seconds, 0.0), v0 / brake)
    return v0 * t - 0.5 * brake * t * t


def turn(vectors, degrees):
    """Vectors (...,2) turned by an angle, from x towards y."""
    angle = np.deg2rad(degrees)
    x, y = vectors[..., 0], vectors[..., 1]
    return np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], axis=-1)


def simulate(domain, clips, seed, split):
    """
    Draw clips of a domain and solve their motion; one independent random stream per (seed, split).

    Returns a dict of arrays over n = clips: mu (n,), mass (n,) kg, impulse (n,2) N·s as it is given to the predictor,
    position (n,FRAMES,2) m in the picture, and the looks: corners (n,), radius (n,) m, angle (n,) rad, colour (n,3) in
    0..1. The object rests during the first time step (so z_1 holds no physics), the impulse acts at its last frame. The
    start is drawn so that the object stays in view in every domain of DOMAINS, by the same rule in all: where it starts
    tells nothing about the domain. Raises Refusal for a domain that is not in DOMAINS.
    """
    if domain not in DOMAINS:
        raise Refusal(f'no domain is called {domain!r}; there are {", ".join(DOMAINS)}')
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    u = rng.random((clips, 10))
    impulse = IMPULSE[0] * (IMPULSE[1] / IMPULSE[0]) ** u[:, 0]
    direction = 2 * np.pi * u[:, 1]
    heading = np.stack([np.cos(direction), np.sin(direction)], axis=1)  # (n,2)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[:, 2]
    seconds = (np.arange(FRAMES) - (TUBELET - 1)) / FPS

    def path(mu, mass, camera):
        slid = displacement(impulse[:, None], mu, mass, seconds)       # (n,FRAMES)
        return slid[:, :, None] * turn(heading, camera)[:, None]       # (n,FRAMES,2)

    ends = np.stack([path(*physics)[:, -1] for physics in DOMAINS.values()])  # (domains,n,2)
    low = radius[:, None] + np.maximum(0, -ends).max(0)
    high = WORLD - radius[:, None] - np.maximum(0, ends).max(0)
    start = low + (high - low) * u[:, 3:5]
    mu, mass, _ = DOMAINS[domain]
    return {
        'mu': np.full(clips, mu), 'mass': np.full(clips, mass), 'impulse': impulse[:, None] * heading,
        'position': start[:, None] + path(*DOMAINS[domain]),
        'corners': np.asarray(CORNERS)[(u[:, 5] * len(CORNERS)).astype(int)], 'radius': radius,
        'angle': 2 * np.pi * u[:, 6], 'colour': 0.3 + 0.7 * u[:, 7:10],
    }


def render(clips, size, device='cpu'):
    """
    Pictures of simulated clips (the dict of simulate()) → uint8 (n,FRAMES,size,size,3), antialiased.

    Every shape is a regular polygon: its signed distance is that of one edge after folding the angle.
    """
    def column(name, *shape):
        return torch.as_tensor(clips[name], dtype=torch.float32, device=device).view(*shape)
    n, scale = len(clips['mu']), size / WORLD
    centre = column('position', n, FRAMES, 2) * scale
    # Only a box around the object is computed; it is cut off at the border by moving it inside.
    box = min(size, 2 * int(RADIUS[1] * scale + 2) + 1)
    corner = (centre.long() - box // 2).clamp(0, size - box)           # (n,F,2)
    pixel = corner[..., None] + torch.arange(box, device=device)       # (n,F,2,box)
    x, y = (pixel + 0.5 - centre[..., None]).unbind(2)                 # (n,F,box)
    sector = 2 * torch.pi / column('corners', n, 1, 1, 1)
    turned = torch.atan2(y[..., :, None], x[..., None, :]) - column('angle', n, 1, 1, 1)  # (n,F,box,box)
    folded = torch.remainder(turned, sector) - sector / 2
    distance = torch.hypot(y[..., :, None], x[..., None, :]) * folded.cos()
    cover = (0.5 + column('radius', n, 1, 1, 1) * scale * (sector / 2).cos() - distance).clamp(0, 1)
    colour = column('colour', n, 1, 1, 1, 3)
    painted = ((BACKGROUND + cover[..., None] * (colour - BACKGROUND)) * 255 + 0.5).to(torch.uint8)  # (n,F,box,box,3)
    frames = torch.full((n * FRAMES, size, size, 3), int(BACKGROUND * 255 + 0.5), dtype=torch.uint8, device=device)
    across, down = pixel.view(n * FRAMES, 2, box).unbind(1)
    frames[torch.arange(n * FRAMES, device=device)[:, None, None], down[:, :, None], across[:, None]] = painted.flatten(0, 1)
    return frames.view(n, FRAMES, size, size, 3)


def tubelets(frames, patch):
    """uint8 frames (n,F,H,W,3) → float pixels in [-1,1] of every tubelet, (n,T,N,3,TUBELET*patch*patch)."""
    n, f, h, w, _ = frames.shape
    x = frames.view(n, f // TUBELET, TUBELET, h // patch, patch, w // patch, patch * 3)  # n,T,t,gy,y,gx,x*c
    x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(n, f // TUBELET, -1, TUBELET * patch * patch, 3)  # n,T,gy*gx,t*y*x,c
    return (x.float() / 127.5 - 1).mT                                  # moved by rows of x*c: single bytes are slow


def pictures(z, decoder, grid, patch):
    """
    What features show: z (n,N,D) layer-normed, decoder (D+1, 3*TUBELET*patch*patch) as prepare.py fitted it,
    grid (rows, columns) with rows*columns = N → float (n,H,W,3) in [0,1], the last frame of the step.
    """
    blocks = z @ decoder[:-1] + decoder[-1]                                             # n,N,3*t*y*x
    blocks = blocks.view(len(z), *grid, 3, TUBELET, patch, patch)[:, :, :, :, -1]       # n,gy,gx,c,y,x
    return (blocks.permute(0, 1, 4, 2, 5, 3).reshape(len(z), grid[0] * patch, grid[1] * patch, 3) / 2 + 0.5).clamp(0, 1)


# ---- the disk format -----------------------------------------------------------------------------------------------
# data/<name>/<split>_<nnnnn>.npy     float16 (clips,T,N,D) features as the encoder gave them, memory-mapped
# data/<name>/<split>_actions.npy     float32 (clips,T,A), zero after step 1
# data/<name>/<split>_physics.npz     what simulate() returned
# data/<name>/manifest.json           shapes, domains, encoder, seed, sha256 of every file and of itself, complete or not


def folder_of(name):
    """data/<name> beside the code; a name with a path separator is taken as a folder."""
    if not name:
        raise Refusal('a data set needs a name')
    return os.path.abspath(name) if os.sep in name else os.path.join(ROOT, 'data', name)


def claim(path, *outputs):
    """
    Keep other runs out of a file or folder until this process ends, however it ends, and remove what a killed run left
    half-written of these outputs. Raises Refusal where another run is at work.
    """
    if fcntl:
        lock = os.open(path, os.O_RDONLY)                              # stays open: the system lets go when the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f'{path}: another run is writing here; wait for it, or choose another place') from None
    for output in outputs:
        if os.path.lexists(output + '.tmp'):
            os.unlink(output + '.tmp')


def write_atomically(path, write):
    """
    Call write(file) on a temporary neighbour, sync it and rename it: path is either old or whole, also after a loss of
    power. Raises Refusal where the system does not let it be written (disk full, no permission); path is then untouched.
    """
    temporary = path + '.tmp'
    try:
        if os.path.lexists(temporary):
            os.unlink(temporary)                                       # a link put there would lead elsewhere
        try:
            with open(temporary, 'xb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)
        if os.name == 'posix':                                         # the new name is safe once its folder is synced
            folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise Refusal(f'{path} could not be written ({error.strerror or error}); what it held before is untouched') from None


def sha256(path):
    """Hex digest of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


SEAL = b',\n "checksum": "'         # the manifest's last entry: the sha256 of every byte before it


def write_manifest(folder, manifest):
    """Write the manifest of a data set atomically, closed by its own checksum."""
    text = json.dumps({k: v for k, v in manifest.items() if k != 'checksum'}, indent=1).encode().removesuffix(b'\n}')
    seal = SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}'
    write_atomically(os.path.join(folder, 'manifest.json'), lambda f: f.write(text + seal))


def parse_manifest(path):
    """The manifest at a path, its 'checksum' verified; raises Refusal where a byte of it is not as it was written."""
    try:
        with open(path, 'rb') as f:
            raw = f.read()
    except OSError as error:
        raise Refusal(f'{path} could not be read ({error.strerror})') from None
    text, _, seal = raw.rpartition(SEAL)
    if seal != hashlib.sha256(text).hexdigest().encode() + b'"\n}':
        raise Refusal(f'{path} is damaged, or was not written by this version; delete the folder and run prepare.py again')
    try:
        manifest = json.loads(raw)
        return {**manifest, **{key: manifest[key] for key in ('made_from', 'complete', 'shape', 'sha256', 'splits')}}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refusal(f'{path} is not a manifest ({error!r}); delete the folder and run prepare.py again') from None


def read_manifest(name):
    """The manifest of a finished data set; raises Refusal where there is none or it is unfinished or unreadable."""
    path = os.path.join(folder_of(name), 'manifest.json')
    if not os.path.isfile(path):
        raise Refusal(f'no data set at {os.path.dirname(path)}; make it with: python prepare.py --name={name}')
    manifest = parse_manifest(path)
    if manifest.get('complete') is not True:
        raise Refusal(f'{os.path.dirname(path)} is unfinished; go on with the same prepare.py command')
    return manifest


def intact(folder, manifest, file):
    """Whether a file of a data set is there and has the sha256 that the manifest noted."""
    path = os.path.join(folder, file)
    return os.path.isfile(path) and sha256(path) == manifest['sha256'][file]


def verify(folder, manifest, files):
    """Raise Refusal unless each of these files lies in the folder itself and has the sha256 that the manifest noted."""
    large = sum(os.path.getsize(p) for p in (os.path.join(folder, f) for f in files) if os.path.isfile(p)) > 2**30
    for file in progress(files, f'checking {os.path.basename(folder)}', 'files') if large else files:
        if os.path.basename(file) != file:
            raise Refusal(f'{folder}: its manifest names {file!r}, which is not a file of this folder')
        if not intact(folder, manifest, file):
            raise Refusal(f'{os.path.join(folder, file)} is damaged or missing; prepare.py, called as at first, mends it')


def read_physics(path):
    """The arrays of an .npz file as np.savez writes it; ValueError for a member that claims more than it holds."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f'{member.filename} is compressed')
            with archive.open(member) as f:
                np.lib.format.read_magic(f)
                shape, _, dtype = np.lib.format.read_array_header_1_0(f)
                arrays[member.filename.removesuffix('.npy')] = np.frombuffer(f.read(), dtype).reshape(shape)
    return arrays


class Split:
    """One split of a data set, memory-mapped: len(), [indices] → (z, a), .physics (dict of arrays or empty)."""

    def __init__(self, name, split):
        folder, self.manifest = folder_of(name), read_manifest(name)
        self.name = f'split {split} of {folder}'
        try:
            if split not in self.manifest['splits']:
                raise Refusal(f'data set {name} has no split {split!r}; it has {", ".join(self.manifest["splits"])}')
            files = [shard['file'] for shard in self.manifest['splits'][split]['shards']]
            actions, physics = f'{split}_actions.npy', f'{split}_physics.npz'
            present = [physics] if physics in self.manifest['sha256'] else []
            verify(folder, self.manifest, [*files, actions, *present])
            # A header that claims more than its file holds cannot be mapped.
            *self.shards, self.actions = (np.load(os.path.join(folder, f), mmap_mode='r') for f in (*files, actions))
            self.physics = read_physics(os.path.join(folder, physics)) if present else {}
            self.starts = np.cumsum([0] + [len(s) for s in self.shards])
            T, N, D = self.manifest['shape']
            rows, columns = self.manifest['grid']
            count = self.starts[-1]
            if not count:
                raise Refusal(f'{self.name} is empty')
            if any(s.shape[1:] != (T, N, D) or s.dtype != np.float16 for s in self.shards) or rows * columns != N:
                raise ValueError(f'its shards are not float16 (clips,{T},{N},{D}) on a grid {rows} x {columns}')
            if self.actions.shape[:2] != (count, T) or self.actions.ndim != 3 or self.actions.dtype != np.float32:
                raise ValueError(f'its actions are not float32 ({count},{T},A) but {self.actions.dtype} {self.actions.shape}')
            if self.physics and (self.physics['position'].ndim, *self.physics['position'].shape[::2]) != (3, count, 2):
                raise ValueError(f'its positions are not ({count},frames,2)')
        except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise Refusal(f'{self.name} is not as prepare.py writes it ({type(error).__name__}: {error})') from None
        self.actions = np.array(self.actions)
        if not np.isfinite(self.actions).all():
            raise Refusal(f'{self.name}: the actions of clip {np.argwhere(~np.isfinite(self.actions))[0][0]} are not finite')

    def __len__(self):
        return len(self.actions)

    def __getitem__(self, indices):
        """indices: sequence of b ints → z (b,T,N,D) float32 layer-normed without affine (eps 1e-5), a (b,T,A) float32."""
        indices = np.arange(len(self))[indices]  # slices, negative numbers, and an IndexError where one is due
        shard = np.searchsorted(self.starts, indices, side='right') - 1
        z = np.stack([self.shards[s][i - self.starts[s]] for s, i in zip(shard, indices)])
        z = torch.from_numpy(z).float()
        z = F.layer_norm(z, z.shape[-1:])
        if not torch.isfinite(z.sum()):
            clip = indices[(~torch.isfinite(z)).flatten(1).any(1).nonzero()[0].item()]
            raise Refusal(f'{self.name}: the features of clip {clip} are not finite, or of no size')
        return z, torch.from_numpy(self.actions[indices])


def open_split(name, split):
    """Open a split of a prepared data set (a name under data/ or a folder); raises Refusal if it is missing or damaged."""
    return Split(name, split)


def batch_indices(clips, batch_size, seed, number):
    """
    Indices (batch_size,) of batch `number` of an endless pass in random order, a fresh permutation per epoch.

    A function of its arguments alone: a resumed run needs no saved position to draw the same clips.
    """
    first, picked = number * batch_size, []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), clips)
        order = np.random.default_rng([seed, epoch]).permutation(clips)
        picked.extend(order[offset:offset + batch_size - len(picked)])
    return np.array(picked)


def explained(x, y):
    """
    Share of the variance of y (n,k) that a linear read-out of x (n,d) explains on clips it was not fitted to, at most 1.

    Ridge regression, each clip predicted from all others (leave-one-out in closed form), the better of six strengths.
    """
    gram = (x @ x.T).double() / x.shape[1] + 1                         # + 1: the bias
    y, best = y.double(), -math.inf
    for strength in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        inverse = torch.linalg.inv(gram + strength * torch.eye(len(x), dtype=gram.dtype))
        left_out = inverse @ y / inverse.diagonal()[:, None]           # residuals of the clips left out
        best = max(best, 1 - (left_out.square().sum() / (y - y.mean(0)).square().sum()).item())
    return best


def progress(items, label, unit='clips'):
    """Iterate over a sized collection, showing the share done, the rate and the time left on the terminal."""
    start = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if now - shown > (0.3 if sys.stdout.isatty() else 10) or done == len(items):
            rate, shown = done / (now - start + 1e-9), now
            left = (len(items) - done) / rate
            last = done == len(items)
            print(f'{label:<28} {done:>6}/{len(items)} {done / len(items):>5.0%} {rate:8.1f} {unit}/s '
                  f'{f"{now - start:.0f} s" if last else f"{left:.0f} s left"}   ',
                  end='\n' if last or not sys.stdout.isatty() else '\r', flush=True)
