"""The domains of data.py in a real engine: a box, cylinder or capsule slides on a textured plane in MuJoCo
(Todorov et al., 2012), with contact friction, seen in perspective, with a shadow.

    clips = simulate('B', 100, 1, 'test_B')      # as data.simulate
    frames = render(clips, 128)                  # as data.render

Needs pip install mujoco, and without a screen apt-get install libosmesa6. The plane is data.py's, its x to
the right and y towards the viewer."""
import atexit
import functools
import os
import sys

import numpy as np
import torch

import data
from configurator import ROOT, refuse

if sys.platform == 'linux' and 'DISPLAY' not in os.environ:
    os.environ.setdefault('MUJOCO_GL', 'osmesa')
try:
    import mujoco
except (ImportError, AttributeError, OSError) as error:
    refuse(f'{error}: pip install mujoco, and without a screen apt-get install libosmesa6, MUJOCO_GL=osmesa')

SUBSTEPS = 4                   # of the engine in a frame
SETTLE = 20                    # engine steps in which an object comes to rest on the plane
# The sizes of each shape, in radii of the object, and half its height.
SHAPES = [(0.65, 0.65, 0.65), (0.8, 0.6, 0), (0.5, 0.5, 0)]
HEIGHTS = [0.65, 0.6, 0.5]


def open_model():
    """The model of mujoco_world.xml."""
    model = mujoco.MjModel.from_xml_path(f'{ROOT}/support/mujoco_world.xml')
    model.opt.timestep = 1 / data.FPS / SUBSTEPS
    return model


@functools.cache
def open_renderer(size):
    """The model, its state and what draws it: opened once for all clips, as that takes half a second."""
    model = open_model()
    renderer = mujoco.Renderer(model, size, size)
    atexit.register(renderer.close)
    return model, mujoco.MjData(model), renderer


def place_object(model, clips, i):
    """Make the model's object that of clip i → half its height in metres."""
    shape = i % len(SHAPES)
    radius = clips['radius'][i]
    model.geom_contype[1:], model.geom_conaffinity[1:], model.geom_rgba[1:, 3] = 0, 0, 0
    model.geom_contype[1 + shape] = 1
    model.geom_conaffinity[1 + shape] = 1
    model.geom_rgba[1 + shape] = *clips['colour'][i], 1
    model.geom_size[1 + shape] = radius * np.array(SHAPES[shape])
    model.geom_rbound[1 + shape] = 2 * radius
    model.geom_friction[1:, 0] = clips['mu'][i]
    model.body_mass[1] = clips['mass'][i]
    model.body_inertia[1] = 0.4 * clips['mass'][i] * radius**2
    return radius * HEIGHTS[shape]


def simulate(domain, clips, seed, split, zoom=1):
    """data.simulate(), with the positions as the engine finds them."""
    drawn = data.simulate(domain, clips, seed, split, zoom)
    velocity = data.acting(drawn['impulse'], data.DOMAINS[domain]) / drawn['mass'][:, None]
    model = open_model()
    for i in range(clips):
        height = place_object(model, drawn, i)
        state = mujoco.MjData(model)
        mujoco.mj_setConst(model, state)
        x, y = drawn['position'][i, 0] - data.WORLD / 2
        state.qpos[:] = x, -y, height, -drawn['angle'][i]
        mujoco.mj_step(model, state, SETTLE)
        # The impulse acts at the centre of mass, at the last frame of the first step.
        state.qvel[:2] = velocity[i] * (1, -1)
        for frame in range(data.TUBELET, data.FRAMES):
            mujoco.mj_step(model, state, SUBSTEPS)
            moved = state.qpos[:2] * (1, -1) + data.WORLD / 2 - drawn['position'][i, 0]
            drawn['position'][i, frame] = drawn['position'][i, 0] + zoom * moved
    return drawn


def render(clips, size, device='cpu'):
    """Pictures of the clips of simulate() → uint8 (n,FRAMES,size,size,3)."""
    n = len(clips['mu'])
    frames = np.empty((n, data.FRAMES, size, size, 3), np.uint8)
    model, state, renderer = open_renderer(size)
    for i in range(n):
        height = place_object(model, clips, i)
        for frame in range(data.FRAMES):
            if 0 < frame < data.TUBELET:
                frames[i, frame] = frames[i, 0]
                continue
            x, y = clips['position'][i, frame] - data.WORLD / 2
            state.qpos[:] = x, -y, height, -clips['angle'][i]
            mujoco.mj_forward(model, state)
            renderer.update_scene(state, 'camera')
            renderer.render(out=frames[i, frame])
    return torch.from_numpy(frames).to(device)
