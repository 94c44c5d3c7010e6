"""Every command of the README runs, on tiny settings."""
import os
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, TINY, official_predictor, official_weights, own_clip, own_clips, run


def readme_commands():
    """The commands of every indented or fenced block of the README, split at && and without their comments."""
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        blocks = re.findall(r'```(?:bash|sh)\n(.*?)```', f.read(), re.S)
    lines = [line.split('   #')[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(part.strip() for line in lines for part in line.split('&&') if part.strip()))


@pytest.mark.parametrize('command', readme_commands())
def test_command(command, tiny, trained, tmp_path):
    words = shlex.split(command)
    if words[:2] == ['pip', 'install']:                    # what .ci/run does before it calls this suite
        assert os.path.exists(os.path.join(ROOT, words[-1]))
        return
    if words[0] == 'pytest':                               # this suite; a path in it must exist
        assert all(os.path.exists(os.path.join(ROOT, w)) for w in words[1:] if w.startswith('tests'))
        return
    if words[0] in ('git', 'cd'):
        return
    launcher = None
    if words[0] == 'torchrun':
        flags = [w for w in words[1:] if w.startswith('--') and words.index(w) < words.index('train.py')]
        launcher = [sys.executable, '-m', 'torch.distributed.run', *(re.sub('nproc_per_node=.*', 'nproc_per_node=2', f) for f in flags)]
        words = words[words.index('train.py'):]
    else:
        assert words.pop(0) == 'python', command
    script, args = words[0], words[1:]
    if '--help' in args:
        assert '--' in run(script, *args).stdout
        return
    if script == 'prepare.py':
        args += [f'--name={tmp_path}/set', '--size=32', '--dim=24', '--clips=6', '--test_clips=4']
        if '--source=clips' in args:
            args.append(f'--source={own_clips(tmp_path / "clips")}')
        if any(a.startswith('--encoder=vit') for a in args):
            args.append(f'--weights={official_weights(tmp_path / "vitl.pt")}')
        if any(a.startswith('--split=') for a in args):
            for i, number in enumerate((17000, 17001, 22000, 23000)):
                own_clip(tmp_path / 'clips' / f'clip_{number}', i + 1)
            args += [f'--source={tmp_path}/clips', '--split=train:17000-17001,B:22000-22000,A2:23000-23000']
    elif script == 'train.py':
        args = [a.replace('out/hope.pt', trained['hope']).replace('out/vit.pt', trained['vit']) for a in args]
        args += [*TINY, f'--data={tiny}', f'--out={tmp_path}/x.pt', '--accumulation=1']
        starts = {'config/hope_stream.py': trained['hope'], 'config/oracle.py': trained['vit']}
        args += [f'--init_from={starts[a]}' for a in words[1:] if a in starts]
        if 'config/finetune_vjepa2_ac.py' in args:
            args.append(f'--init_from={official_predictor(tmp_path / "ac.pt")}')
        if '--resume=True' in args:
            run(script, *[a for a in args if a != '--resume=True'], '--stop_at=3')
    elif script == 'adapt.py':
        args = [a.replace('out/hope.pt', trained['hope']).replace('out/vit.pt', trained['vit']).replace('out/oracle.pt', trained['vit'])
                .replace('out/hope_stream.pt', trained['hope']) for a in args]
        args = [a.replace('out/memory.pt', f'{tmp_path}/memory.pt') for a in args]
        # Those of the laptop set do not fit the tiny one; tests/test_data.py runs them.
        args = [a.replace('assets/hope.pt', trained['hope']).replace('assets/vit.pt', trained['vit']) for a in args]
        args += [f'--data={tiny}', f'--out={tmp_path}/aba', '--clips=4', '--probe_clips=4', '--tune_clips=1']
        if f'--memory_in={tmp_path}/memory.pt' in args:
            run(script, *[a.replace('memory_in', 'memory_out') for a in args])
    elif script == 'bench.py':
        args += ['--features=24', '--grid=2', '--steps=2', '--repeats=1', '--vit=config/vit_jump.py', '--hope=config/hope_jump.py']
    elif script == 'ablate.py':
        args += [f'--data={tiny}', f'--out={tmp_path}/ablation', '--clips=4', '--tune_clips=1', '--seeds=1', '--max_iters=2',
                 '--variants=HOPE', '--extra=' + ' '.join(TINY), '--device=cpu']
        first, again = run(script, *args).stdout, run(script, *args).stdout
        assert first.splitlines()[-4:] == again.splitlines()[-4:] and 'step' in first and 'step ' not in again  # made once
        return
    else:
        raise AssertionError(f'no tiny settings for: {command}')
    run(script, *args, launcher=launcher or ())


def test_the_two_commands_are_there():
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        text = f.read()
    assert 'pip install -r requirements.txt && python train.py config/hope_jump.py && python adapt.py --ckpt=out/hope.pt' in text
    assert 'pip install -r requirements.txt && pytest' in text


def test_the_python_examples(tiny, trained, tmp_path):
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        encode, predict = sorted(re.findall(r'```python\n(.*?)```', f.read(), re.S), key=len)
    scope = {}
    exec(predict.replace('out/hope.pt', trained['hope']).replace("'slide'", repr(tiny)), scope)
    assert scope['z_8'].shape == scope['z'][:, 7].shape
    scope = {'video': torch.randn(2, 3, 4, 32, 32)}
    exec(encode.replace('vitl.pt', official_weights(str(tmp_path / 'vitl.pt'))), scope)
    assert scope['features'].shape == (2, 2 * 4, 768)
