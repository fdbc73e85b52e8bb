"""docs/tour.ipynb runs from its first cell to its last on a model as small as can be."""
import os

import pytest

from helpers import ROOT

nbclient = pytest.importorskip('nbclient', reason='needs pip install nbclient ipykernel')
pytest.importorskip('ipykernel', reason='needs pip install nbclient ipykernel')
import nbformat                                                      # noqa: E402


def test_the_tour(work, tmp_path, monkeypatch):
    path = ROOT / 'docs' / 'tour.ipynb'
    assert path.stat().st_size < 1e6
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    (tmp_path / 'docs').mkdir()
    os.symlink(work / 'out', tmp_path / 'out')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    resources = dict(metadata=dict(path=str(tmp_path / 'docs')))
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    assert all(cell.outputs for cell in cells)
    said = str([cell.outputs for cell in cells])
    assert 'stderr' not in said                          # no warning
    assert said.count('image/png') == 4
