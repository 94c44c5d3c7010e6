"""
Train a predictor on phase A: teacher forcing plus a curriculum-weighted jump (or rollout) loss.

    python train.py config/hope_jump.py                            laptop: HOPE on two CPU cores
    python train.py config/hope_jump.py --resume=True              go on after an interruption
    torchrun --standalone --nproc_per_node=4 train.py config/hope_jump.py        four GPUs of one machine

The data set is prepared first if it is missing. Writes the checkpoint `out`, and beside it the log as CSV.
"""
import contextlib
import csv
import functools
import os
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import ROOT, Refusal, configure
from data import batch_indices, open_split, read_manifest
from hope import hand_on
from model import build, jump_loss, load, pick_device, rollout, save, teacher_forcing_loss

# predictor
model = 'hope'           # AC-HOPE-ViT or ViT-AC [hope | vit]
depth = 2                # blocks [1..]
width = 96               # C, channels inside the predictor; a multiple of heads [6..]
heads = 4                # attention heads, or Titan memories per block [1..]
mlp_hidden = 384         # vit: hidden width of the MLP [1..]
cms_hidden = 300         # hope: hidden width of each of the three CMS levels [1..]
# data
data = 'slide'           # a data set that prepare.py made; 'slide' is made on the spot if missing
batch_size = 32          # clips per optimiser step, over all GPUs [1..]
accumulation = 1         # micro-batches per optimiser step [1..]
# loss: (1 - lambda) * teacher forcing + lambda * jump
loss = 'jump'            # the second term [jump | rollout]
lambda_start = 0.2       # its weight at the first step [0..1]
lambda_end = 0.8         # its weight at the last step, linear in between [0..1]
jump_last = 3            # jumps go to one of the last k steps, drawn per clip; also what evaluation averages over [1..]
rollout_steps = 2        # rollout: steps fed back; the last is scored (T = 2 in V-JEPA 2-AC) [1..]
teacher_every = 4        # teacher forcing, the dear term, sees every n-th clip of a batch; 1 = all of them [1..]
carry_every = 3          # hope: at every n-th step, jumps start from what another clip has just written; 0 = never [0..]
# optimiser: AdamW, warm-up - constant - decay
max_iters = 3000         # optimiser steps [1..]
learning_rate = 2e-3     # peak [>0]
warmup = 0.04            # share of the steps in which the rate rises from 0 [0..1]
decay = 0.7              # share of the steps in which the rate falls to 0 [0..1]
weight_decay = 0.04      # none on biases and other 1-D parameters [0..]
beta2 = 0.99             # AdamW's second-moment decay [0..1]
grad_clip = 1.0          # largest gradient norm [>0]
seed = 1                 # initial weights, order of the clips and jump targets follow from it [0..]
# running
out = 'out/hope.pt'      # checkpoint
resume = False           # go on from `out`
stop_at = 0              # end at this step as if interrupted; 0 = never [0..]
eval_interval = 500      # steps between evaluations and checkpoints [1..]
eval_clips = 256         # clips of `val` that an evaluation uses, always the same ones [1..]
log_interval = 50        # steps between log lines [1..]
device = 'auto'          # auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu
compile = False          # torch.compile the predictor; pays off in long runs on a GPU
wandb = ''               # project name: also log to Weights & Biases
settings = configure(globals())

# ---- device and processes ------------------------------------------------------------------------------------------
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
device = pick_device(device)
if world > 1:
    if device == 'cuda':
        device = f'cuda:{int(os.environ["LOCAL_RANK"])}'
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
if batch_size % (world * accumulation):
    raise Refusal(f'batch_size = {batch_size} must be a multiple of accumulation x processes = {accumulation * world}')
if model == 'hope' and carry_every and batch_size // (world * accumulation) <= teacher_every:
    raise Refusal(f'carry_every = {carry_every} needs two shown clips in every micro-batch: raise batch_size, or lower '
                  'teacher_every or accumulation, or set carry_every = 0')
if wandb:
    try:
        import wandb as wandb_library
    except ImportError:
        raise Refusal('--wandb needs the package: pip install wandb') from None
bf16 = device.startswith('cuda') and torch.cuda.is_bf16_supported()
autocast = torch.autocast('cuda', torch.bfloat16) if bf16 else contextlib.nullcontext()
torch.backends.cuda.matmul.allow_tf32 = True
say = functools.partial(print, flush=True) if rank == 0 else lambda text: None

# ---- checkpoint to go on from ----------------------------------------------------------------------------------------
RUN_KNOBS = {'out', 'resume', 'stop_at', 'eval_interval', 'eval_clips', 'log_interval', 'device', 'compile', 'wandb'}
recipe = {key: value for key, value in settings.items() if key not in RUN_KNOBS}  # what the result depends on
first_step, checkpoint = 0, None
if resume:
    predictor, checkpoint = load(out, device)
    changed = [f'{k} = {recipe[k]!r} (was {v!r})' for k, v in checkpoint['recipe'].items() if recipe.get(k) != v]
    if changed:
        raise Refusal(f'--resume=True, but {out} was trained with other settings: {", ".join(changed)}')
    first_step = checkpoint['step']
    if first_step >= max_iters:
        say(f'{out} is finished ({first_step} steps); nothing to do')
        sys.exit(0)
elif os.path.exists(out):
    raise Refusal(f'{out} exists; go on with --resume=True, or name another --out, or delete it')

# ---- data ----------------------------------------------------------------------------------------------------------
if data == 'slide' and rank == 0:
    try:
        read_manifest(data)
    except Refusal:  # missing, or left unfinished by an interruption
        say('preparing data/slide first (built-in physics, nothing is downloaded)')
        if subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py')]).returncode:
            sys.exit(2)
if world > 1:
    dist.barrier()
train_clips, val_clips = open_split(data, 'train'), open_split(data, 'val')
T, N, D = train_clips.manifest['shape']
if jump_last >= T:
    raise Refusal(f'jump_last = {jump_last}: the clips have {T} steps, so at most {T - 1} can be jumped to')
if rollout_steps >= T:
    raise Refusal(f'rollout_steps = {rollout_steps}: the clips have {T} steps, so at most {T - 1} can be predicted')

# ---- predictor, optimiser, schedules -------------------------------------------------------------------------------
torch.manual_seed(seed)
if checkpoint is None:
    predictor = build(model=model, feature_dim=D, action_dim=train_clips.actions.shape[-1], depth=depth, width=width,
                      grid=tuple(train_clips.manifest['grid']), heads=heads, mlp_hidden=mlp_hidden,
                      cms_hidden=cms_hidden).to(device)
predictor.train()
weights = [p for p in predictor.parameters() if p.dim() > 1]
others = [p for p in predictor.parameters() if p.dim() <= 1]
optimizer = torch.optim.AdamW([{'params': weights, 'weight_decay': weight_decay}, {'params': others, 'weight_decay': 0.0}],
                              lr=learning_rate, betas=(0.9, beta2), fused=device.startswith('cuda'))
if checkpoint is not None:
    optimizer.load_state_dict(checkpoint['optimizer'])
net = torch.compile(predictor) if compile else predictor
if world > 1:
    net = DistributedDataParallel(net, broadcast_buffers=False)


def share(step):
    """lambda at a step: the weight of the jump (or rollout) loss."""
    return lambda_start + (lambda_end - lambda_start) * step / max(1, max_iters - 1)


def rate(step):
    """Learning rate at a step: linear warm-up, constant, linear decay to 0."""
    rising = (step + 1) / (warmup * max_iters + 1)
    falling = (max_iters - step) / (decay * max_iters + 1e-9)
    return learning_rate * min(1.0, rising, falling)


def second_loss(net, z, a, tau, memory):
    """The jump (or rollout) term, averaged over the clips, which are predicted from their first step and the memory."""
    if loss == 'jump':
        return jump_loss(net, z, a, tau, memory).mean()
    return (rollout(net, z, a, rollout_steps, memory)[:, -1] - z[:, rollout_steps]).abs().mean()


@torch.no_grad()
def evaluate():
    """Fixed clips of val → (teacher forcing, jump or rollout, copy baseline), jump averaged over its target steps."""
    predictor.eval()
    sums, clips = np.zeros(3), min(eval_clips, len(val_clips))
    for start in range(0, clips, 64):
        z, a = (x.to(device) for x in val_clips[range(start, min(start + 64, clips))])
        with autocast:
            if loss == 'rollout':
                later = (rollout(predictor, z, a, T - 1)[:, -jump_last:] - z[:, -jump_last:]).abs().mean()
            else:
                later = sum(jump_loss(predictor, z, a, torch.full((len(z),), t, device=device)).mean()
                            for t in range(T - jump_last, T)) / jump_last
            teacher, _ = teacher_forcing_loss(predictor, z, a)
        copy = (z[:, :1] - z[:, -jump_last:]).abs().mean()
        sums += len(z) * np.array([teacher.item(), later.item(), copy.item()])
    predictor.train()
    return (sums / clips).tolist()


# ---- log -----------------------------------------------------------------------------------------------------------
LOG_COLUMNS = ['step', 'loss', 'teacher_forcing', loss, 'lambda', 'learning_rate', 'grad_norm', 'clips_per_s',
               'val_teacher_forcing', f'val_{loss}']
log_path = os.path.splitext(out)[0] + '.csv'


def start_log():
    """Open the CSV log; a resumed run keeps the rows up to its first step."""
    rows = []
    if first_step and os.path.exists(log_path):
        with open(log_path, newline='') as f:
            rows = [row for row in csv.DictReader(f) if int(row['step']) <= first_step]
    file = open(log_path, 'w', newline='')
    writer = csv.DictWriter(file, LOG_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return file, writer


def log(**row):
    if rank == 0:
        log_writer.writerow(row)
        log_file.flush()
        if wandb:
            wandb_run.log(row, step=row['step'])


def save_checkpoint(step):
    if rank == 0:
        save(out, predictor, optimizer=optimizer.state_dict(), step=step, recipe=recipe, loss=loss,
             jump_last=jump_last, clip_steps=T, best=best)


if rank == 0:
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    log_file, log_writer = start_log()
    if wandb:
        wandb_run = wandb_library.init(project=wandb, config=settings)
best = checkpoint['best'] if checkpoint else float('inf')
_, val_second, copy = evaluate()
say(f'{model}: {sum(p.numel() for p in predictor.parameters()):,} parameters, {T * (1 + N)} tokens per clip, '
    f'{len(train_clips):,} training clips, {device}{", bfloat16" if bf16 else ""}'
    + (f', {world} processes' if world > 1 else ''))
say(f'copy baseline ({loss} L1 of predicting z_1 again): {copy:.4f}')

# ---- training ------------------------------------------------------------------------------------------------------
started = window = time.time()
micro = batch_size // (accumulation * world)  # clips per process and micro-batch
for step in range(first_step, max_iters):
    for group in optimizer.param_groups:
        group['lr'] = rate(step)
    indices = batch_indices(len(train_clips), batch_size, seed, step)
    targets = np.random.default_rng([seed, 1, step]).integers(T - jump_last, T, batch_size)
    sums = torch.zeros(2, device=device)
    for part in range(accumulation):
        mine = slice((rank * accumulation + part) * micro, (rank * accumulation + part + 1) * micro)
        z, a = (x.to(device, non_blocking=True) for x in train_clips[indices[mine]])
        tau = torch.from_numpy(targets[mine]).to(device)
        if world > 1:
            net.require_backward_grad_sync = part == accumulation - 1
        with autocast:
            teacher, memory = teacher_forcing_loss(net, z[::teacher_every], a[::teacher_every])
            carries = memory is not None and carry_every and step % carry_every == 0
            later = second_loss(net, z, a, tau, hand_on(memory, len(z)) if carries else None)
            total = (1 - share(step)) * teacher + share(step) * later
        (total / accumulation).backward()
        sums += torch.stack([teacher.detach(), later.detach()]) / accumulation
    norm = torch.nn.utils.clip_grad_norm_(predictor.parameters(), grad_clip)
    # One number decides: a non-finite loss makes the gradient norm non-finite too, and the norm is the same everywhere.
    if not torch.isfinite(norm):
        raise Refusal(f'step {step + 1}: the loss or its gradient is not finite (teacher forcing {sums[0].item():.4g}, '
                      f'{loss} {sums[1].item():.4g}); the weights were not touched and {out} keeps the last good ones; '
                      'try a lower --learning_rate')
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    done = step + 1
    stopping = done == stop_at or done == max_iters

    if done % log_interval == 0 or stopping:
        if world > 1:
            dist.all_reduce(sums)
        teacher, later = (sums / world).tolist()
        now = time.time()
        speed = batch_size * ((done - first_step - 1) % log_interval + 1) / (now - window)
        left = (now - started) / (done - first_step) * (max_iters - done)
        window = now
        say(f'step {done:>6}/{max_iters} {done / max_iters:>4.0%}  tf {teacher:.4f}  {loss} {later:.4f}  '
            f'λ {share(step):.2f}  lr {rate(step):.1e}  |g| {norm.item():.2f}  {speed:.0f} clips/s  '
            f'{left // 60:.0f}:{left % 60:02.0f} left')
        log(step=done, loss=(1 - share(step)) * teacher + share(step) * later, teacher_forcing=teacher,
            **{loss: later, 'lambda': share(step)}, learning_rate=rate(step), grad_norm=norm.item(), clips_per_s=speed)
    if done % eval_interval == 0 or stopping:
        val_teacher, val_second, copy = evaluate()
        best = min(best, val_second)
        say(f'  val {done:>6}  tf {val_teacher:.4f}  {loss} {val_second:.4f}  '
            f'{1 - val_second / copy:.0%} below copy ({copy:.4f})  saved {out}')
        log(step=done, val_teacher_forcing=val_teacher, **{f'val_{loss}': val_second})
        save_checkpoint(done)
        window = time.time() if done % log_interval == 0 else window
    if stopping and done < max_iters:
        say(f'stopped at step {done} as --stop_at asked; --resume=True goes on')
        break
else:
    say(f'finished in {(time.time() - started) / 60:.1f} min; next: python adapt.py --ckpt={out}')
if world > 1:
    dist.destroy_process_group()
