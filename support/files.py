"""Devices, precision, checkpoints (save() here, hope.load() reads them back as predictors), torchrun."""
import dataclasses
import os
import zipfile

import torch
import torch.distributed as dist

from configurator import refuse


def pick_device(name):
    """'auto' → this machine's accelerator (CUDA, MPS), else the CPU. Refuses a device that is not here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    here = found.type if found else 'cpu'
    if name.partition(':')[0] not in ('auto', 'cpu', here):
        refuse(f'--device={name}: there is no such device here; --device=cpu runs anywhere')
    return here if name == 'auto' else name


def autocast(device, dtype, width):
    """The context in which a model of this width computes. dtype 'auto': bfloat16 where the device has it, on
    a CPU from a width of 256 on. Narrower ones gain little, and the published figures are theirs in float32.
    """
    kind = torch.device(device).type
    fast = dtype == 'bfloat16'
    if dtype == 'auto' and kind == 'cuda':
        fast = torch.cuda.is_bf16_supported()
    if dtype == 'auto' and kind == 'cpu':
        able = torch.cpu.get_capabilities()
        fast = width >= 256 and any(able.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


def write_atomically(path, write):
    """Call write(file) on a file beside path, then rename it: path has its old content or all of the new."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(f'{path}.tmp', 'wb') as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.tmp', path)


def save(path, predictor, **more):
    """Write a checkpoint atomically: sizes, weights and further entries (tensors and plain values)."""
    content = {'sizes': dataclasses.asdict(predictor.sizes), 'predictor': predictor.state_dict(), **more}
    write_atomically(path, lambda f: torch.save(content, f))


def read_checkpoint(path, device='cpu'):
    """Read a file of save() → dict. Refuses a missing or damaged one: torch.load compares no checksums."""
    if not os.path.isfile(path):
        refuse(f'no checkpoint at {path}; train one with: python train.py config/hope_jump.py')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError):
        damaged = path
    if damaged:
        refuse(f'{path} is damaged or no checkpoint; restore a copy, or delete it and train again')
    return torch.load(path, map_location=device, weights_only=True, mmap=True)


def average_gradients(predictor, processes):
    """Average the gradients over all processes, in one message."""
    gradients = [p.grad for p in predictor.parameters() if p.grad is not None]
    together = torch.nn.utils.parameters_to_vector(gradients) / processes
    dist.all_reduce(together)
    torch.nn.utils.vector_to_parameters(together, gradients)
