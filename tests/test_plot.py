"""plot.py's pictures, from the command line."""
import json
import shutil

import pytest

from helpers import TINY, good, one_line, run
from plot import columns


def is_picture(path):
    return path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size > 5000


@pytest.fixture(scope='module')
def runs(work, tmp_path_factory):
    """A copy of work, since other tests count what eval.py leaves in it."""
    folder = tmp_path_factory.mktemp('runs') / 'work'
    shutil.copytree(work, folder)
    good(run(folder, 'train.py', *TINY, '--objective=ar', '--out_dir=judge', '--curriculum_frac=0'))
    good(run(folder, 'eval.py', '--gen_ppl=judge', '--steps=1,4', '--temperature=0.8,1', '--num_samples=2'))
    return folder


def test_every_picture(runs):
    assert is_picture(runs / 'out' / 'curve.png') and is_picture(runs / 'judge' / 'curve.png')       # train.py's
    for args, path in ((['out'], 'out/curve.png'), (['out', 'judge'], 'compare.png'),
                       (['--denoise', 'out'], 'out/denoise.png'), (['--gen', 'out'], 'gen.png')):
        (runs / path).unlink(missing_ok=True)
        done = run(runs, 'plot.py', *args)
        assert f'wrote {path}' in good(done) and is_picture(runs / path)
        assert 'Glyph' not in done.stderr                                   # control characters are dots


def test_what_cannot_be_drawn_is_one_line(runs, tmp_path):
    one_line(run(runs, 'plot.py', 'nowhere'), 'nowhere', 'train.py')
    one_line(run(runs, 'plot.py', '--gen', 'judge'), 'gen.jsonl', 'eval.py')
    one_line(run(runs, 'plot.py', '--denoise', 'judge'), 'judge', 'Duo')
    one_line(run(runs, 'plot.py'), 'runs')
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    one_line(run(tmp_path, 'plot.py', '.'), 'no validation')
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "lo')
    one_line(run(tmp_path, 'plot.py', '.'), 'log.jsonl')


def test_a_run_with_steps_that_had_no_loss_is_drawn(runs, tmp_path):
    (tmp_path / 'config.json').write_text((runs / 'out' / 'config.json').read_text())
    records = [dict(step=1, loss=None), dict(step=2, loss=3.0), dict(step=2, val_loss=4.0, val_error=None)]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, records)))
    good(run(tmp_path, 'plot.py', '.'))
    assert is_picture(tmp_path / 'curve.png')


def test_columns():
    step, loss = columns([dict(step=1, loss=None), dict(step=2), dict(step=3, loss=5)], 'step', 'loss')
    assert step.tolist() == [1, 3] and loss[1] == 5 and loss[0] != loss[0]
    assert [len(column) for column in columns([], 'step', 'loss')] == [0, 0]
