"""plot.py's pictures, from the command line."""
import json
import math
import shutil

import pytest

from helpers import TINY, good, one_line, run, run_here
from plot import columns, draw_gen


def is_picture(path):
    return path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size > 5000


@pytest.fixture(scope='module')
def runs(work, tmp_path_factory):
    """A copy of work, since other tests count what eval.py leaves in it."""
    folder = tmp_path_factory.mktemp('runs') / 'work'
    shutil.copytree(work, folder)
    good(run_here(folder, 'train.py', *TINY, '--objective=ar', '--out_dir=judge',
                  '--num_samples=0'))
    sampling = '--gen_ppl=judge --steps=1,4 --temperature=0.8,1 --num_samples=2'
    good(run_here(folder, 'eval.py', *sampling.split()))
    return folder


def test_training_draws_its_curve(runs):
    assert is_picture(runs / 'out' / 'curve.png')


@pytest.mark.parametrize('args, path', [
    ('out', 'out/curve.png'),
    ('out judge', 'out/compare.png'),
    ('--gen out', 'out/gen.png')])
def test_every_picture(runs, args, path):
    (runs / path).unlink(missing_ok=True)
    done = run(runs, 'plot.py', *args.split())
    assert f'wrote {path}' in good(done)
    assert is_picture(runs / path)
    assert 'Glyph' not in done.stderr                          # control characters are dots


def test_figures_of_two_judges_are_two_curves(tmp_path):
    records = [dict(sampler='psi', judge=judge, steps=steps, temperature=1.0, gen_ppl=9.0,
                    entropy=4.0)
               for judge, steps in (('a', 8), ('a', 32), ('b', 32), ('b', 128))]
    (tmp_path / 'gen.jsonl').write_text('\n'.join(map(json.dumps, records)))
    fig, _ = draw_gen([tmp_path])
    curves = [line.get_xdata().tolist() for line in fig.axes[0].lines]
    assert curves == [[8, 32], [32, 128]]


@pytest.mark.parametrize('args, parts', [
    ('nowhere', ['nowhere', 'train.py']),
    ('--gen judge', ['gen.jsonl', 'eval.py']),
    ('', ['runs'])])
def test_what_cannot_be_drawn_is_one_line(runs, args, parts):
    one_line((run_here if args else run)(runs, 'plot.py', *args.split()), *parts)


def test_a_broken_log_is_one_line(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    one_line(run_here(tmp_path, 'plot.py', '.'), 'no validation')
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "lo')
    one_line(run_here(tmp_path, 'plot.py', '.'), 'no validation')


@pytest.mark.parametrize('file, old, new', [
    ('log.jsonl', '"step": 4', '"step": []'),
    ('log.jsonl', '"step": 4', '"step": "four"'),
    ('log.jsonl', '"step": 4', f'"step": 1{400 * "0"}'),
    ('log.jsonl', '"val_error"', '"error"'),
    ('config.json', '"curriculum_frac"', '"frac"'),
    ('config.json', '"objective": "duo"', '"objective": 5, "objective": "duo", "settings": 7'),
    ('config.json', '{', '[')])
def test_a_run_with_a_broken_file_is_one_line(runs, tmp_path, file, old, new):
    shutil.copytree(runs / 'out', tmp_path / 'out')
    text = (tmp_path / 'out' / file).read_text()
    assert old in text
    (tmp_path / 'out' / file).write_text(text.replace(old, new))
    done = run_here(tmp_path, 'plot.py', 'out')
    if done.returncode:
        one_line(done, 'out')


def test_a_run_with_steps_that_had_no_loss_is_drawn(runs, tmp_path):
    shutil.copy(runs / 'out' / 'config.json', tmp_path)
    records = [
        dict(step=1, loss=None),
        dict(step=2, loss=3.0),
        dict(step=2, val_loss=4.0, val_error=None),
    ]
    foreign = ['', 'by hand', '7', '[1]', '{}', '\0}', '{"step": 3, "lo']
    (tmp_path / 'log.jsonl').write_text('\n'.join([*map(json.dumps, records), *foreign]))
    good(run_here(tmp_path, 'plot.py', '.'))
    assert is_picture(tmp_path / 'curve.png')


def test_columns():
    records = [dict(step=1, loss=None), dict(step=2), dict(step=3, loss=5)]
    step, loss = columns(records, 'step', 'loss')
    assert step.tolist() == [1, 3]
    assert math.isnan(loss[0])
    assert loss[1] == 5
    assert [len(column) for column in columns([], 'step', 'loss')] == [0, 0]
