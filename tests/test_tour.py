"""docs/tour.ipynb runs from its first cell to its last on a model as small as can be, the README's
changes work where they are pasted, and the other pages name functions that exist."""
import importlib
import json
import os
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest

from helpers import ROOT, TINY, good, project_with, run

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


def snippet(name):
    """The README's code block that defines a function."""
    blocks = re.findall('```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    [found] = [block for block in blocks if f'def {name}(' in block]
    return found


def test_the_readmes_loss_trains(work, tmp_path):
    returned = 'def loss_of(objective, vocab_size):\n    return weighted_nelbo'
    script = project_with(tmp_path, snippet('weighted_nelbo') + returned)
    good(run(work, script, *TINY, '--max_iters=2', '--num_samples=0', '--out_dir=weighted'))


def test_the_readmes_sampler_samples(work, tmp_path):
    added = """
SAMPLERS['late'] = late
SAMPLER_OPTIONS['power'] = 2.0
"""
    script = project_with(tmp_path, snippet('late') + added, 'sample.py').with_name('sample.py')
    for options in (['--sampler=late', '--steps=3'], ['--sampler=late', '--power=9', '--top_p=0.9']):
        said = good(run(work, script, '--num_samples=1', *options))
        assert '(late' in said


def test_the_pages_name_functions_that_exist():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    named = re.findall(r'`(\w+)\.(\w+)`', ''.join(page.read_text() for page in pages))
    ours = [(module, name) for module, name in named
            if name != 'py' and (ROOT / f'{module}.py').exists()]
    assert len(ours) > 8
    for module, name in ours:
        assert hasattr(importlib.import_module(module), name), f'{module}.{name}'
