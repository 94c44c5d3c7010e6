"""
Speed: time and memory of forward + backward, HOPE against ViT-AC, and how both grow with the clip.

    python bench.py                        full size: config/vit_full.py and config/hope_full.py
    python bench.py --vit=config/vit_jump.py --hope=config/hope_jump.py --features=48 --grid=4    laptop size

Both are timed in turn and compared by their medians, because ratios vary less than times on a noisy machine.
The peak of memory is that of a process of its own for each case, weights and gradients included.
"""
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F

from configurator import ROOT, configure, listed, read_config, read_knobs
from hope import build
from model import Sizes, jump_loss, teacher_forcing_loss
from support.files import autocast, pick_device

# what to compare
vit = 'config/vit_full.py'     # config file of the ViT-AC
hope = 'config/hope_full.py'   # config file of the AC-HOPE-ViT
features = 1024          # D, feature size [1..]
grid = 16                # patches per side [1..]
steps = '8,16'           # T, time steps per clip in teacher forcing
batch = 1                # clips at once [1..]
# how
repeats = 3              # timed repetitions of each, after one to warm up [1..]
dtype = 'float32'        # what is computed in, as in train.py [auto | float32 | bfloat16]
checkpointing = False    # compute blocks again in the backward pass, as in train.py
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
config = configure(globals()) if __name__ == '__main__' else {}


def predictor_of(path, config):
    """The predictor of a config file of train.py, with random weights."""
    knobs = read_knobs(os.path.join(ROOT, 'train.py'))
    values = {name: default for name, (default, _) in knobs.items()}
    values.update(read_config(path))
    values.update(feature_dim=config['features'], action_dim=2, state_dim=0, steps=8, normed_output=True)
    values['grid'] = config['grid'], config['grid']
    net = build(Sizes.from_config(values)).to(config['device'])
    net.checkpointing = config['checkpointing']
    return net


def seconds(net, T, jump, config):
    """Time of forward + backward on random clips: teacher forcing over T steps, or a jump to step T + 1."""
    clips, device = config['batch'], config['device']
    z = torch.randn(clips, T + 1, config['grid'] ** 2, config['features'], device=device)
    z = F.layer_norm(z, z.shape[-1:])
    a = torch.zeros(clips, T + 1, 2, device=device)
    a[:, 0] = 1
    tau = torch.full((clips,), T, device=device)
    net.zero_grad(set_to_none=True)
    started = time.perf_counter()
    with autocast(device, config['dtype'], net.sizes.width):
        if jump:
            loss = jump_loss(net, z, a, tau).mean()
        else:
            loss, _ = teacher_forcing_loss(net, z, a)
    loss.backward()
    # item() waits for the device. The last gradient is that of the first layer.
    net.predictor_embed.weight.grad.sum().item()
    return time.perf_counter() - started


def peak(path, T, jump, config):
    """Peak of memory in MiB, of the GPU if there is one, after forward + backward in this process."""
    seconds(predictor_of(path, config), T, jump, config)
    if config['device'].startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(config):
    """Print a line for each length of clip, and one for a jump."""
    paths = config['vit'], config['hope']
    cases = [(int(T), False) for T in listed(config['steps'])]
    cases.append((cases[0][0], True))
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch'])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as fresh:
        peaks = [fresh.submit(peak, path, *case, config) for case in cases for path in paths]

    nets = [predictor_of(path, config) for path in paths]
    for path, net in zip(paths, nets):
        print(f'{path:<24} {sum(p.numel() for p in net.parameters()):>12,} parameters')
    threads = torch.get_num_threads()
    print(f'{config["device"]}, {threads} threads, {config["dtype"]}, batch {config["batch"]}\n')
    print(f'{"":<21}{"ViT-AC":>11}{"HOPE":>11}{"/ ViT":>7}{"peak MiB":>16}')
    for T, jump in cases:
        times = {net: [] for net in nets}
        for _ in range(config['repeats'] + 1):
            for net in nets:
                times[net].append(seconds(net, T, jump, config))
        # Without the first, in which memory is allocated.
        of_vit, of_hope = [statistics.median(times[net][1:]) for net in nets]
        label = f'jump to step {T + 1}' if jump else f'teacher forcing T={T}'
        print(f'{label:<21}{of_vit:>9.3f} s{of_hope:>9.3f} s{of_hope / of_vit:>7.2f}'
              f'{peaks.pop(0).result():>8.0f}{peaks.pop(0).result():>8.0f}', flush=True)


if __name__ == '__main__':
    main({**config, 'device': pick_device(device)})
