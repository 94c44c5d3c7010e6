"""Speed: time and memory of forward + backward, HOPE against ViT-AC, and how both grow with the clip.

    python bench.py                        full size: config/vit_full.py and config/hope_full.py
    python bench.py --vit=config/vit_jump.py --hope=config/hope_jump.py --features=48 --grid=4    laptop size

Each is measured in a process of its own, which has a peak of memory of its own."""
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
from model import LOSSES, Sizes, teacher_forcing_loss
from support.files import autocast, pick_device
from support.plots import draw_growth

vit = 'config/vit_full.py'     # config file of the ViT-AC
hope = 'config/hope_full.py'   # config file of the AC-HOPE-ViT
features = 1024          # D, feature size [1..]
grid = 16                # patches per side [1..]
steps = '8,16'           # T, time steps per clip in teacher forcing
batch = 1                # clips at once [1..]
repeats = 3              # timed repetitions of each, after one to warm up [1..]
dtype = 'float32'        # what is computed in, as in train.py [auto | float32 | bfloat16]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
out = 'out/bench.png'    # picture of how teacher forcing grows with T, if there is more than one T
configure(globals())
device = pick_device(device)


def predictor_of(path):
    """The predictor of a config file of train.py, with random weights."""
    defaults = read_knobs(os.path.join(ROOT, 'train.py')).items()
    values = {name: default for name, (default, _) in defaults} | read_config(path)
    sizes = Sizes.from_config(values, feature_dim=features, grid=(grid, grid), steps=8, action_dim=2,
                              state_dim=0, normed_output=True)
    return build(sizes).to(device)


def measure(path, T, loss):
    """Forward + backward on random clips, by teacher forcing over T steps or a loss of LOSSES to step T + 1 →
    median of the seconds, and the peak of memory in MiB of this process, or of its GPU if it has one."""
    net = predictor_of(path)
    z = normed(torch.randn(batch, T + 1, grid**2, features, device=device))
    a = torch.ones(batch, T + 1, 2, device=device)
    tau = torch.full((batch,), T, device=device)
    seconds = []
    for _ in range(repeats + 1):
        net.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with autocast(device, dtype, net.sizes.width):
            if loss in LOSSES:
                lost = LOSSES[loss].train(net, z, a, tau).mean()
            else:
                lost, _ = teacher_forcing_loss(net, z, a, {})
        lost.backward()
        # item() waits for the device. The last gradient is that of the first layer.
        net.predictor_embed.weight.grad.sum().item()
        seconds.append(time.perf_counter() - started)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform == 'darwin' else 10)
    if device.startswith('cuda'):
        mib = torch.cuda.max_memory_allocated() / 2**20
    return statistics.median(seconds[1:]), mib


if __name__ == '__main__':
    for path in vit, hope:
        print(f'{path:<24} {sum(p.numel() for p in predictor_of(path).parameters()):>12,} parameters')
    print(f'{device}, {torch.get_num_threads()} threads, {dtype}, batch {batch}\n')
    print(f'{"":<21}{"ViT-AC":>11}{"HOPE":>11}{"/ ViT":>7}{"peak MiB":>16}')
    lengths = [int(T) for T in listed(steps)]
    # A new process for each imports this script and reads the same command line.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch'])
    growth = []
    cases = [*[('teacher forcing', T) for T in lengths], ('jump', lengths[0]), ('rollout', 2)]
    for loss, T in cases:
        measured = []
        for path in vit, hope:
            with ProcessPoolExecutor(1, context) as fresh:
                measured += fresh.submit(measure, path, T, loss).result()
        of_vit, mib_vit, of_hope, mib_hope = measured
        label = f'{loss} to step {T + 1}' if loss in LOSSES else f'{loss} T={T}'
        print(f'{label:<21}{of_vit:>9.3f} s{of_hope:>9.3f} s{of_hope / of_vit:>7.2f}'
              f'{mib_vit:>8.0f}{mib_hope:>8.0f}', flush=True)
        if loss not in LOSSES:
            growth.append(measured)
    if len(growth) > 1:
        draw_growth(out, lengths, growth)
