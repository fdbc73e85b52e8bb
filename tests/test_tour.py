"""docs/tour.ipynb runs from its first cell to its last on a model as small as can be, and the other
pages name functions that exist."""
import importlib
import json
import os
import re

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


def test_the_pages_name_functions_that_exist():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    named = re.findall(r'`(\w+)\.(\w+)`', ''.join(page.read_text() for page in pages))
    ours = [(module, name) for module, name in named
            if name != 'py' and (ROOT / f'{module}.py').exists()]
    assert len(ours) > 8
    for module, name in ours:
        assert hasattr(importlib.import_module(module), name), f'{module}.{name}'
