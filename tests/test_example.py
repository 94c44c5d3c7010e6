"""The notebook runs from top to bottom, and shows what it says."""
import json

from conftest import ROOT
from torch.nn.functional import l1_loss


def test_the_notebook(monkeypatch):
    import matplotlib.pyplot as plt
    plt.switch_backend('Agg')
    monkeypatch.chdir(ROOT)
    with open('example.ipynb', encoding='utf-8') as f:
        cells = json.load(f)['cells']
    scope = {}
    for cell in cells:
        if cell['cell_type'] == 'code':
            assert not cell['outputs']
            exec(''.join(cell['source']), scope)
    assert len(plt.get_fignums()) == 2
    plt.close('all')
    z, a = scope['z'], scope['a']
    assert l1_loss(scope['step_8'](z, a), z[:, 7]) < 0.3 * l1_loss(z[:, 0], z[:, 7])
    # The last clips of B, which the memory has not seen.
    z, a = scope['z_new'], scope['a_new']
    assert l1_loss(scope['adapted'], z[:, 7]) < 0.5 * l1_loss(scope['step_8'](z, a), z[:, 7])
