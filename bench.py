"""
Speed: time of forward + backward and its growth with the clip's length, HOPE against ViT-AC, and both against what the machine
can do at best, its rate of matrix products.

    python bench.py                                        full size: config/vit_full.py against config/hope_full.py
    python bench.py --vit=config/vit_jump.py --hope=config/hope_jump.py --features=48 --grid=4     laptop size
    python bench.py --what=memory                          how many clips a GiB holds, with and without checkpointing
    python bench.py --what=encoder                         V-JEPA 2's ViT-L on a clip, against transformers' (forward only)

All are timed in turn in one run and compared by their medians, because ratios vary less than times on a noisy machine.
Peak memory is measured in a separate process for each case.
"""
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import model
from configurator import Refusal, configure, read_config
from hope import build
from model import Sizes, autocast, jump_loss, pick_device, teacher_forcing_loss
from support.running import keep_freed_memory
from vjepa2 import VideoEncoder

# what to compare
what = 'time'            # of both predictors, or their memory, or the time of the video encoder [time | memory | encoder]
vit = 'config/vit_full.py'     # config file of the ViT-AC
hope = 'config/hope_full.py'   # config file of the AC-HOPE-ViT
features = 1024          # D, feature size [1..]
grid = 16                # patches per side [1..]
steps = '8,16'           # T, time steps per clip in teacher forcing
batch = 1                # clips at once [1..]
# how
repeats = 3              # timed repetitions of each, after one to warm up [1..]
threads = 0              # CPU threads; 0 = PyTorch's choice [0..]
dtype = 'float32'        # what is computed in, as in train.py [auto | float32 | bfloat16]
compile = False          # torch.compile the predictors
checkpointing = False    # compute blocks again in the backward pass, as in train.py
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
only = ''                # internal: print the peak memory of one case as JSON
settings = configure(globals())
device = settings['device'] = pick_device(device)
knobs = SimpleNamespace(**settings)
if threads:
    torch.set_num_threads(threads)
try:
    LENGTHS = [int(T) for T in steps.split(',')]
except ValueError:
    LENGTHS = [0]
if min(LENGTHS) < 1 or max(LENGTHS) > 10**6:
    raise Refusal(f'--steps={steps}: must be whole numbers from 1 to 1,000,000, separated by commas')


# ---- the models --------------------------------------------------------------------------------------------------------

def predictor_of(path, knobs):
    """The predictor of a config file, for features of the size that the knobs say, with random weights."""
    sizes = Sizes.from_settings(read_config(path), feature_dim=knobs.features, grid=(knobs.grid, knobs.grid))
    torch.manual_seed(0)
    net = build(sizes).to(knobs.device)
    net.checkpointing = knobs.checkpointing
    if knobs.compile:
        net.compile()
    return net.train()


def dense_mask(q, k, v, P):
    """What model.block_causal computes, with one dense mask for all steps, as the published predictor does it."""
    step = torch.arange(q.shape[2], device=q.device) // P
    return F.scaled_dot_product_attention(q, k, v, attn_mask=step[:, None] >= step)


def with_dense_mask(run):
    """Call run() with dense_mask() in place of model.block_causal()."""
    ours = model.block_causal
    model.block_causal = dense_mask
    run()
    model.block_causal = ours


def case(net, T, jump, knobs):
    """A function that gives the loss of random clips: by teacher forcing over T steps, or of a jump to step T + 1."""
    torch.manual_seed(1)
    z = torch.randn(knobs.batch, T + 1, knobs.grid ** 2, knobs.features, device=knobs.device)
    z = F.layer_norm(z, z.shape[-1:])
    a = torch.zeros(knobs.batch, T + 1, 2, device=knobs.device)
    a[:, 0] = 1
    tau = torch.full((knobs.batch,), T, device=knobs.device)

    def loss():
        with autocast(knobs.device, knobs.dtype, net.sizes.width):
            if jump:
                return jump_loss(net, z, a, tau).mean()
            return teacher_forcing_loss(net, z, a)[0]
    return loss


def forward_and_backward(net, loss):
    """One pass in both directions. item() waits for the device."""
    net.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.item()


def product(device, dtype):
    """A function that multiplies two large matrices, and its FLOP."""
    size = 8192 if device.startswith('cuda') else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return functools.partial(torch.mm, a, b), 2 * size ** 3


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
    """Median seconds of each function of a dict. After one call to warm up, all are called in turn, `repeats` times."""
    seconds = {name: [] for name in runs}
    for repetition in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def useful_flops(loss):
    """The FLOP of a forward and a backward pass, which is taken as twice the forward: what is computed again is not useful."""
    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)
    # The counter does not know the CPU's attention.
    unknown = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        loss()
    return 3 * counter.get_total_flops()


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


def peak_memory(path, T, jump, settings, **changed):
    """Peak memory in MiB of one forward + backward, in a process of its own with these settings, but for those changed."""
    flags = [f'--{key}={value}' for key, value in {**settings, **changed}.items() if key != 'only']
    command = [sys.executable, __file__, *flags, f'--only={path},{T},{int(jump)}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return float('nan')
    return json.loads(done.stdout.splitlines()[-1])['peak']


# ---- tables ------------------------------------------------------------------------------------------------------------

def print_models(nets, knobs):
    """The parameters of predictors {path: net}, and the size of their memory."""
    for path, net in nets.items():
        parameters = sum(p.numel() for p in net.parameters())
        print(f'{path:<24} {parameters:>12,} parameters')
        z = torch.zeros(1, 1, knobs.grid ** 2, knobs.features, device=knobs.device)
        a = torch.zeros(1, 1, 2, device=knobs.device)
        with torch.no_grad():
            _, memory = net(z, a)
        if memory is not None:
            mebibytes = sum(m.numel() * m.element_size() for m in memory) / 2**20
            print(f'{"":<24} {mebibytes:>12.2f} MiB of memory state per clip')


def compare_time(settings, knobs, bfloat16):
    """Print the time and the peak memory of both predictors for clips of all lengths, and for a jump."""
    nets = {'ViT-AC': predictor_of(knobs.vit, knobs), 'HOPE': predictor_of(knobs.hope, knobs)}
    print_models({knobs.vit: nets['ViT-AC'], knobs.hope: nets['HOPE']}, knobs)
    multiply, product_flops = product(knobs.device, torch.bfloat16 if bfloat16 else torch.float32)
    print('times of forward + backward; / x: divided by the time of x; rate: useful FLOP/s as a share of those of a matrix\n'
          'product in the same run\n')
    print(f'{"":<21}{"dense mask":>11}{"ViT-AC":>11}{"/ mask":>8}{"rate":>6}{"HOPE":>11}{"/ ViT":>7}{"rate":>6}'
          f'{"peak MiB":>14}')
    cases = [(T, False) for T in LENGTHS]
    cases.append((LENGTHS[0], True))
    for T, jump in cases:
        losses = {name: case(net, T, jump, knobs) for name, net in nets.items()}
        flops = {name: useful_flops(loss) for name, loss in losses.items()}
        runs = {name: functools.partial(forward_and_backward, net, losses[name]) for name, net in nets.items()}
        runs['mask'] = functools.partial(with_dense_mask, runs['ViT-AC'])
        runs['product'] = multiply
        seconds = in_turn(runs, knobs.repeats, knobs.device)
        best = product_flops / seconds['product']
        of_vit, of_hope = (f'{flops[name] / seconds[name] / best:.0%}' for name in nets)
        mask, vit_ac, hope_ac = seconds['mask'], seconds['ViT-AC'], seconds['HOPE']
        peaks = [peak_memory(path, T, jump, settings) for path in (knobs.vit, knobs.hope)]
        label = f'jump to step {T + 1}' if jump else f'teacher forcing T={T}'
        print(f'{label:<21}{mask:>9.3f} s{vit_ac:>9.3f} s{vit_ac / mask:>8.2f}{of_vit:>6}'
              f'{hope_ac:>9.3f} s{hope_ac / vit_ac:>7.2f}{of_hope:>6}{peaks[0]:>7.0f}{peaks[1]:>7.0f}', flush=True)
    print(f'\nmatrix product: {best / 1e9:,.0f} GFLOP/s')


def compare_memory(settings, knobs):
    """Print how much memory a training pass takes for each clip of a batch, with and without checkpointing."""
    T = LENGTHS[0]
    print(f'\n{f"teacher forcing T={T}":<24}{"checkpointing":>16}{"weights, gradients":>22}{"a clip":>14}{"clips per GiB":>18}')
    for path in knobs.vit, knobs.hope:
        for again in False, True:
            peaks = [peak_memory(path, T, False, settings, batch=clips, checkpointing=again) for clips in (1, 3)]
            clip = (peaks[1] - peaks[0]) / 2
            print(f'{path:<24}{str(again):>16}{peaks[0] - clip:>18.0f} MiB{clip:>10.0f} MiB{1024 / clip:>18.1f}', flush=True)


def compare_encoders(knobs):
    """Print the time of both video encoders."""
    frames = 2 * LENGTHS[0]
    side = 16 * knobs.grid
    with torch.no_grad(), autocast(knobs.device, knobs.dtype, 1024):
        seconds = in_turn(encoders(knobs.batch, frames, side, knobs.device), knobs.repeats, knobs.device)
    print(f'a clip of {frames} frames of {side} x {side}; forward\nViT-L of transformers {seconds["theirs"]:.3f} s, '
          f'ours {seconds["ours"]:.3f} s: ratio {seconds["ours"] / seconds["theirs"]:.2f}')


# ---- the run -----------------------------------------------------------------------------------------------------------
keep_freed_memory()
if only:
    path, T, jump = only.split(',')
    net = predictor_of(path, knobs)
    forward_and_backward(net, case(net, int(T), jump == '1', knobs))
    print(json.dumps({'peak': peak_here(device)}))
    sys.exit(0)

width = 1024 if what == 'encoder' else Sizes.from_settings(read_config(vit)).width
with autocast(device, dtype, width):
    bfloat16 = torch.is_autocast_enabled(torch.device(device).type)
hardware = torch.cuda.get_device_name() if device.startswith('cuda') else f'{device}, {torch.get_num_threads()} threads'
print(f'{hardware}, {"bfloat16" if bfloat16 else "float32"}, batch {batch}, {grid * grid} patches x {features} features, median '
      f'of {repeats}')
if what == 'time':
    compare_time(settings, knobs, bfloat16)
elif what == 'memory':
    compare_memory(settings, knobs)
else:
    compare_encoders(knobs)
