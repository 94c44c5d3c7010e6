"""
Speed: time of forward + backward, FLOP/s, peak memory and their growth with the clip's length, HOPE against ViT-AC.

    python bench.py                                        full size: config/vit_full.py against config/hope_full.py
    python bench.py --vit=config/vit_jump.py --hope=config/hope_jump.py --features=48 --grid=4     laptop size
    python bench.py --what=encoder                         V-JEPA 2's ViT-L on a clip, against transformers' (forward only)

Both are timed in turn in one run and compared by their medians, because ratios vary less than times on a noisy machine.
Peak memory is measured in a separate process for each case.
"""
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from configurator import Refusal, configure, read_config
from hope import build
from model import Sizes, jump_loss, pick_device, teacher_forcing_loss
from vjepa2 import VideoEncoder

# what to compare
what = 'predictors'      # HOPE against ViT-AC, or the video encoder against that of transformers [predictors | encoder]
vit = 'config/vit_full.py'     # config file of the ViT-AC
hope = 'config/hope_full.py'   # config file of the AC-HOPE-ViT
features = 1024          # D, feature size [1..]
grid = 16                # patches per side [1..]
steps = '8,16,32'        # T, time steps per clip in teacher forcing
batch = 1                # clips at once [1..]
# how
repeats = 3              # timed repetitions of each, after one to warm up [1..]
threads = 0              # CPU threads; 0 = PyTorch's choice [0..]
bf16 = False             # autocast to bfloat16
compile = False          # torch.compile the predictor
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
only = ''                # internal: print the peak memory of one case as JSON
settings = configure(globals())
device = pick_device(device)
if threads:
    torch.set_num_threads(threads)
try:
    LENGTHS = [int(T) for T in steps.split(',')]
except ValueError:
    LENGTHS = [0]
if min(LENGTHS) < 1 or max(LENGTHS) > 10**6:
    raise Refusal(f'--steps={steps}: must be whole numbers from 1 to 1,000,000, separated by commas')


# ---- the models --------------------------------------------------------------------------------------------------------

def predictor_of(path, features, grid, device, compile):
    """The predictor of a config file for features of this size and grid, with random weights, in training mode."""
    sizes = Sizes.from_settings(read_config(path), feature_dim=features, grid=(grid, grid))
    torch.manual_seed(0)
    net = build(sizes).to(device)
    if compile:
        net.compile()
    return net.train()


def case(net, batch, T, jump, device, bf16):
    """A function of one forward + backward on random clips: teacher forcing over T steps, or a jump to step T + 1."""
    torch.manual_seed(1)
    rows, columns = net.sizes.grid
    z = torch.randn(batch, T + 1, rows * columns, net.sizes.feature_dim, device=device)
    z = F.layer_norm(z, z.shape[-1:])
    a = torch.zeros(batch, T + 1, 2, device=device)
    a[:, 0] = 1
    tau = torch.full((batch,), T, device=device)

    def run():
        net.zero_grad(set_to_none=True)
        with torch.autocast(device.split(':')[0], torch.bfloat16, enabled=bf16):
            if jump:
                loss = jump_loss(net, z, a, tau).mean()
            else:
                loss, _ = teacher_forcing_loss(net, z, a)
        loss.backward()
        # item() waits for the device.
        return loss.item()
    return run


def encoders(batch, frames, side, device):
    """{name: function} of the ViT-L encoders, ours and that of transformers, on a random clip of frames x side x side."""
    try:
        from transformers import VJEPA2Config, VJEPA2Model
    except ImportError:
        raise Refusal('--what=encoder compares with transformers: pip install transformers') from None
    video = torch.randn(batch, 3, frames, side, side, device=device)
    # VJEPA2Config's defaults are ViT-L.
    theirs = VJEPA2Model(VJEPA2Config(crop_size=side, frames_per_clip=frames)).to(device).eval()
    ours = VideoEncoder(1024, 16, 24, 4096).to(device).eval()
    frames_first = video.transpose(1, 2)
    return {'ours': lambda: ours(video), 'theirs': lambda: theirs.get_vision_features(frames_first)}


# ---- measuring ---------------------------------------------------------------------------------------------------------

def in_turn(runs, repeats, device):
    """Median seconds of each function of a dict. They are called in turn, `repeats` times; the caller warms them up."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def count_flops(run):
    """The FLOP of one call, which is also the warm-up."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_here(device):
    """Peak memory of this process so far, in MiB, on the GPU if that is the device."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 2**20
    # On Linux ru_maxrss starts from the peak of the parent process. On Windows there is neither.
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status') as f:
            peak = next(line for line in f if line.startswith('VmHWM'))
        return int(peak.split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory(settings, path, T, jump):
    """Peak memory in MiB of one forward + backward, in a process of its own with these settings."""
    flags = [f'--{key}={value}' for key, value in settings.items() if key != 'only']
    command = [sys.executable, __file__, *flags, f'--only={path},{T},{int(jump)}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return float('nan')
    return json.loads(done.stdout.splitlines()[-1])['peak']


# ---- the run -----------------------------------------------------------------------------------------------------------

if only:
    path, T, jump = only.split(',')
    net = predictor_of(path, features, grid, device, compile)
    run = case(net, batch, int(T), jump == '1', device, bf16)
    run()
    print(json.dumps({'peak': peak_here(device)}))
    sys.exit(0)

hardware = torch.cuda.get_device_name() if device.startswith('cuda') else f'{device}, {torch.get_num_threads()} threads'
hardware += f', {"bfloat16" if bf16 else "float32"}, batch {batch}'
if what == 'encoder':
    frames = 2 * LENGTHS[0]
    side = 16 * grid
    with torch.no_grad(), torch.autocast(device.split(':')[0], torch.bfloat16, enabled=bf16):
        runs = encoders(batch, frames, side, device)
        for run in runs.values():
            run()
        t = in_turn(runs, repeats, device)
    print(f'{hardware}, a clip of {frames} frames of {side} x {side}; forward, median of {repeats}\n'
          f'ViT-L of transformers {t["theirs"]:.3f} s, ours {t["ours"]:.3f} s: ratio {t["ours"] / t["theirs"]:.2f}')
    sys.exit(0)

nets = {path: predictor_of(path, features, grid, device, compile) for path in (vit, hope)}
for path, net in nets.items():
    parameters = sum(p.numel() for p in net.parameters())
    print(f'{path:<24} {parameters:>12,} parameters')
    z = torch.zeros(1, 1, grid * grid, features, device=device)
    a = torch.zeros(1, 1, 2, device=device)
    with torch.no_grad():
        _, memory = net(z, a)
    if memory is not None:
        mebibytes = sum(m.numel() * m.element_size() for m in memory) / 2**20
        print(f'{"":<24} {mebibytes:>12.2f} MiB of memory state per clip')
print(f'{hardware}, {grid * grid} patches x {features} features; forward + backward, median of {repeats}\n')
print(f'{"":<22}{"ViT-AC":>10}{"HOPE":>10}{"ratio":>8}{"GFLOP/s":>16}{"peak MiB":>16}{"ratio":>8}')
cases = [(T, False) for T in LENGTHS]
cases.append((LENGTHS[0], True))
for T, jump in cases:
    runs = {path: case(net, batch, T, jump, device, bf16) for path, net in nets.items()}
    flops = {path: count_flops(run) for path, run in runs.items()}
    seconds = in_turn(runs, repeats, device)
    peaks = {path: peak_memory({**settings, 'device': device}, path, T, jump) for path in nets}
    gigaflops = ' '.join(f'{flops[path] / seconds[path] / 1e9:>7.0f}' for path in (vit, hope))
    name = f'jump to step {T + 1}' if jump else f'teacher forcing T={T}'
    time_ratio = seconds[hope] / seconds[vit]
    peak_ratio = peaks[hope] / peaks[vit]
    print(f'{name:<22}{seconds[vit]:>8.3f} s{seconds[hope]:>8.3f} s{time_ratio:>8.2f}{gigaflops:>16}'
          f'{peaks[vit]:>8.0f}{peaks[hope]:>8.0f}{peak_ratio:>8.2f}', flush=True)
