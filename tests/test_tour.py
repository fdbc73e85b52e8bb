"""docs/tour.ipynb runs from its first cell to its last on a model as small as can be."""
import json
import os

import matplotlib
import matplotlib.pyplot as plt
import pytest

from helpers import ROOT

NOTEBOOK = ROOT / 'docs' / 'tour.ipynb'


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())['cells']
            if cell['cell_type'] == 'code']


def test_the_notebook_is_stored_without_outputs():
    assert not any(cell['outputs'] or cell['execution_count'] for cell in code_cells())


@pytest.mark.filterwarnings('error::UserWarning')
def test_each_cell_prints_or_draws(work, tmp_path, monkeypatch, capsys):
    """Without a kernel: the cells one after another in one namespace, in docs/ beside out/."""
    (tmp_path / 'docs').mkdir()
    os.symlink(work / 'out', tmp_path / 'out')
    monkeypatch.chdir(tmp_path / 'docs')
    matplotlib.use('agg')
    plt.close('all')                                     # of other tests
    names, pictures = {}, 0
    for cell in code_cells():
        exec(''.join(cell['source']), names)
        drawn = plt.get_fignums()
        plt.close('all')
        assert drawn or capsys.readouterr().out
        pictures += len(drawn)
    assert pictures == 4
