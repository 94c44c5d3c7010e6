"""
Speed: time and memory of forward + backward, HOPE against ViT-AC, and how both grow with the clip.

    python bench.py                        full size: config/vit_full.py and config/hope_full.py
    python bench.py --vit=config/vit_jump.py --hope=config/hope_jump.py --features=48 --grid=4    laptop size

Both are timed in turn, since ratios of medians vary least. Peaks of memory are those of processes of their
own.
"""
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from configurator import ROOT, configure, listed, read_config, read_knobs
from data import normed
from hope import build
from model import Sizes, jump_loss, teacher_forcing_loss
from support.files import autocast, pick_device

vit = 'config/vit_full.py'     # config file of the ViT-AC
hope = 'config/hope_full.py'   # config file of the AC-HOPE-ViT
features = 1024          # D, feature size [1..]
grid = 16                # patches per side [1..]
steps = '8,16'           # T, time steps per clip in teacher forcing
batch = 1                # clips at once [1..]
repeats = 3              # timed repetitions of each, after one to warm up [1..]
dtype = 'float32'        # what is computed in, as in train.py [auto | float32 | bfloat16]
checkpointing = False    # compute blocks again in the backward pass, as in train.py
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
configure(globals())
device = pick_device(device)


def predictor_of(path):
    """The predictor of a config file of train.py, with random weights."""
    knobs = read_knobs(os.path.join(ROOT, 'train.py'))
    values = {name: default for name, (default, _) in knobs.items()}
    values.update(read_config(path))
    sizes = Sizes.from_config(values, feature_dim=features, grid=(grid, grid), steps=8, action_dim=2,
                              state_dim=0, normed_output=True)
    net = build(sizes).to(device)
    net.checkpointing = checkpointing
    return net


def seconds(net, T, jump):
    """Time of forward + backward on random clips: teacher forcing over T steps, or a jump to step T + 1."""
    z = normed(torch.randn(batch, T + 1, grid**2, features, device=device))
    a = torch.ones(batch, T + 1, 2, device=device)
    tau = torch.full((batch,), T, device=device)
    net.zero_grad(set_to_none=True)
    started = time.perf_counter()
    with autocast(device, dtype, net.sizes.width):
        loss = jump_loss(net, z, a, tau).mean() if jump else teacher_forcing_loss(net, z, a)[0]
    loss.backward()
    # item() waits for the device. The last gradient is that of the first layer.
    net.predictor_embed.weight.grad.sum().item()
    return time.perf_counter() - started


def peak(path, T, jump):
    """Peak of memory in MiB, of the GPU if there is one, after forward + backward in this process."""
    seconds(predictor_of(path), T, jump)
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == '__main__':
    lengths = [int(T) for T in listed(steps)]
    cases = [(T, False) for T in lengths] + [(lengths[0], True)]
    # A new process imports this script and reads the same command line.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch'])
    peaks = {}
    for case in cases:
        for path in vit, hope:
            with ProcessPoolExecutor(1, context) as fresh:
                peaks.setdefault(case, []).append(fresh.submit(peak, path, *case).result())

    nets = predictor_of(vit), predictor_of(hope)
    for path, net in zip((vit, hope), nets):
        print(f'{path:<24} {sum(p.numel() for p in net.parameters()):>12,} parameters')
    print(f'{device}, {torch.get_num_threads()} threads, {dtype}, batch {batch}\n')
    print(f'{"":<21}{"ViT-AC":>11}{"HOPE":>11}{"/ ViT":>7}{"peak MiB":>16}')
    for T, jump in cases:
        times = [[seconds(net, T, jump) for net in nets] for _ in range(repeats + 1)]
        of_vit, of_hope = map(statistics.median, zip(*times[1:]))
        label = f'jump to step {T + 1}' if jump else f'teacher forcing T={T}'
        mib_vit, mib_hope = peaks[T, jump]
        print(f'{label:<21}{of_vit:>9.3f} s{of_hope:>9.3f} s{of_hope / of_vit:>7.2f}'
              f'{mib_vit:>8.0f}{mib_hope:>8.0f}', flush=True)
