"""configurator.py as users meet it: small scripts in a subprocess, then each rule and error."""
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import configurator
import train
from configurator import UserError, configure

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''\
# a licence, which --help leaves out
"""Train a small thing.

$ python train.py config/tiny.py --max_iters=10
"""
import json
import math  # not a setting's comment
import sys
from configurator import UserError, configure

# --- where things go
out_dir = 'out # 1'  # where checkpoints go # really
init_from = "scratch"

# --- how long
max_iters = 100              # optimiser steps
learning_rate = 3e-4         # peak, which is reached
                             # after the warm-up
# a comment that belongs to no setting
beta1 = 0.9
beta2 = 0.95                 # averages
gamma_min = -3.5             # window

compile = True
name = 'ab'
_private = 3
CONSTANT = 4
# --- how to sample
OPTIONS = dict(
    sampler='psi',           # which
    eta=0.5,
    steps=8)                 # network calls
OTHERS = dict(unseen=1)      # not merged
shape = [1, 2]
CHECKS = [('max_iters', lambda v: v > 0, 'at least 1')]
# -----------------------------------------------------------------------------
try:
    globals().update(configure(OPTIONS | globals(), CHECKS))
except UserError as error:
    sys.exit(str(error))
max_iters_doubled = max_iters * 2
plain = {k: v for k, v in globals().items()
         if type(v) in (int, float, bool, str) and k[0].islower()}
print(json.dumps(plain))
'''


@pytest.fixture
def project(tmp_path):
    """tmp_path/project/{train.py, config/tiny.py} and an empty tmp_path/elsewhere to run from."""
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'project/config').mkdir(parents=True)
    (tmp_path / 'project/train.py').write_text(SCRIPT)
    (tmp_path / 'project/config/tiny.py').write_text('max_iters = 10\nbeta2 = 0.99\n')
    return tmp_path


def run(project, *args, cwd='elsewhere'):
    command = [sys.executable, str(project / 'project/train.py'), *args]
    return subprocess.run(command, cwd=project / cwd, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          capture_output=True, text=True)


def settings():
    return dict(out_dir='out', batch_size=16, learning_rate=3e-4, gamma_min=-3.5, compile=True,
                wandb_log=False, _hidden=1, shape=[1], nothing=None, kind=int, __doc__='Doc.',
                __file__='/nowhere/train.py')


def call(*args, checks=(), **extra):
    return configure({**settings(), **extra}, checks, args)


def error(*args, **extra):
    """The one line of the UserError that `args` raise."""
    with pytest.raises(UserError) as e:
        call(*args, **extra)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write an override file into the working directory (a temporary one)."""
    monkeypatch.chdir(tmp_path)
    return lambda text, name='o.py': (tmp_path / name).write_text(textwrap.dedent(text)) and name


# ---- as users run it

def test_script_from_another_directory(project):
    r = run(project, 'config/tiny.py', '--learning-rate', '1', '--gamma_min', '-4.5',
            '--compile=false', '--out_dir=a b', '--steps=9')
    assert r.returncode == 0 and r.stderr == ''
    for part in ('"max_iters": 10,', '"max_iters_doubled": 20', '"beta2": 0.99',
                 '"learning_rate": 1.0', '"gamma_min": -4.5', '"compile": false',
                 '"out_dir": "a b"', '"init_from": "scratch"', '"steps": 9', '"eta": 0.5'):
        assert part in r.stdout


def test_script_error_is_one_line(project):
    (project / 'elsewhere/bad.py').write_text('max_iters = 1\n\nmax_itres = 2\n')
    r = run(project, 'bad.py')
    assert r.returncode == 1 and r.stdout == ''
    assert r.stderr == 'bad.py: max_itres is not a setting (did you mean max_iters?)\n'
    r = run(project, '--max_iters=0')
    assert r.returncode == 1 and r.stderr == '--max_iters=0: must be at least 1\n'


def test_help_is_the_settings_block(project):
    r = run(project, 'config/tiny.py', '--help', '--nonsense')
    assert r.returncode == 0 and r.stderr == ''
    assert r.stdout == '''\
Train a small thing.

$ python train.py config/tiny.py --max_iters=10

# --- where things go
--out_dir='out # 1'               # where checkpoints go # really
--init_from='scratch'
# --- how long
--max_iters=10                    # optimiser steps
--learning_rate=0.0003            # peak, which is reached
                             # after the warm-up
# a comment that belongs to no setting
--beta1=0.9
--beta2=0.99                      # averages
--gamma_min=-3.5                  # window
--compile=True
--name='ab'
# --- how to sample
--sampler='psi'                   # which
--eta=0.5
--steps=8                         # network calls
'''


def test_help_of_settings_declared_elsewhere(project):
    """eval.py shows the options that sample.py declares: without a comment, at the end."""
    text = (project / 'project/train.py').read_text()
    (project / 'project/options.py').write_text('OPTIONS = dict(steps=8)  # elsewhere\n')
    start, end = text.index('OPTIONS = dict('), text.index('OTHERS =')
    text = text[:start] + 'from options import OPTIONS\n' + text[end:]
    (project / 'project/train.py').write_text(text)
    r = run(project, '--help')
    assert r.returncode == 0 and r.stdout.endswith("--name='ab'\n# --- how to sample\n--steps=8\n")


def test_help_without_source(capsys):
    for flag in ('-h', '--help'):
        with pytest.raises(SystemExit) as e:
            call('--batch_size=8', flag)
        assert e.value.code == 0
        said = capsys.readouterr().out.splitlines()
        assert said[:4] == ['Doc.', '', "--out_dir='out'", '--batch_size=8']
    with pytest.raises(SystemExit) as e:  # a notebook has neither a docstring nor a file
        configure(dict(a=1, __doc__=None), (), ['-h'])
    assert e.value.code == 0 and capsys.readouterr().out == '--a=1\n'


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--batch_size=3'])
    assert configure(settings())['batch_size'] == 3


# ---- settings and arguments

def test_settings_are_the_plain_globals():
    g = settings()
    assert configure(g, (), []) == dict(out_dir='out', batch_size=16, learning_rate=3e-4,
                                        gamma_min=-3.5, compile=True, wandb_log=False)
    configure(g, (), ['--batch_size=1'])
    assert g == settings()  # configure returns, it does not change


@pytest.mark.parametrize('args, name, value', [
    (['--batch_size=8'], 'batch_size', 8),
    (['--batch_size', '8'], 'batch_size', 8),
    (['--batch-size', '8'], 'batch_size', 8),
    (['--batch_size=8', '--batch_size=9'], 'batch_size', 9),
    (['--batch_size', '-8'], 'batch_size', -8),
    (['--batch_size=1_000'], 'batch_size', 1000),
    (['--learning_rate=1e-4'], 'learning_rate', 1e-4),
    (['--learning_rate=3'], 'learning_rate', 3.0),
    (['--gamma_min', '-3.25'], 'gamma_min', -3.25),
    (['--gamma_min', '-1e-2'], 'gamma_min', -0.01),
    (['--out_dir=a=b'], 'out_dir', 'a=b'),
    (['--out_dir='], 'out_dir', ''),
    (['--out_dir', ''], 'out_dir', ''),
    (['--out_dir', '-'], 'out_dir', '-'),
    (['--out_dir', 'not_a_file.py'], 'out_dir', 'not_a_file.py'),
    (['--out_dir=--help'], 'out_dir', '--help'),
    (['--out_dir=__import__("os").getcwd()'], 'out_dir', '__import__("os").getcwd()'),
    (['--out_dir=3'], 'out_dir', '3'),
    (['--out_dir=True'], 'out_dir', 'True'),
    (['--wandb_log'], 'wandb_log', True),
    (['--wandb-log'], 'wandb_log', True),
    (['--wandb_log', '--batch_size=2'], 'wandb_log', True),
    (['--wandb_log', 'true'], 'wandb_log', True),
    (['--compile', 'false'], 'compile', False),
    (['--compile', 'False'], 'compile', False),
    *[([f'--wandb_log={text}'], 'wandb_log', True) for text in ('true', 'True')],
    *[([f'--compile={text}'], 'compile', False) for text in ('false', 'False')],
])
def test_arguments(args, name, value):
    got = call(*args)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('args, message', [
    (['--batch_sise=8'], '--batch_sise is not a setting (did you mean batch_size?)'),
    (['--batch-sise', '8'], 'did you mean batch_size?'),
    (['--zzz'], '--zzz is not a setting (see --help;'),
    (['--help=1'], '--help is not a setting'),
    (['-batch_size=8'], '-batch_size is not a setting (did you mean batch_size?)'),
    (['-8'], '-8 is not a setting'),
    (['--'], '-- is not a setting'),
    (['--=1'], '-- is not a setting'),
    (['--_hidden=2'], '--_hidden is not a setting'),
    (['--shape=2'], '--shape is not a setting'),
    (['--batch_size'], '--batch_size needs a value: --batch_size=...'),
    (['--out_dir', '--compile'], '--out_dir needs a value'),
    (['--out-dir', '--help'], '--out-dir needs a value'),
    (['--batch_size=abc'], "--batch_size=abc: batch_size must be an int, not 'abc'"),
    (['--batch_size', 'o.py'], "--batch_size=o.py: batch_size must be an int, not 'o.py'"),
    (['--compile', 'maybe'],
     "no file 'maybe' here or beside the script (a setting is --key=value)"),
    (['batch_size=8'], "no file 'batch_size=8'"),
    ([''], "no file ''"),
    (['.'], "no file '.'"),
    (['a\0b'], 'no file'),
    (['a' * 5000], 'no file'),
    (['--a\nb'], '--a b is not a setting'),
    *[([f'--batch_size={v}'], 'must be an int')
      for v in ('', '1.5', '1.5e0', '1e-3', '1e6', 'True', 'nan', 'inf', '1e400', '0x10', '0xe',
                '9' * 5000, '2+2', 'e')],
    *[([f'--learning_rate={v}'], 'must be a finite float')
      for v in ('', 'nan', '-NaN', 'inf', '-Infinity', '1e400', 'True', '1/3', '3e')],
    *[([f'--compile={v}'], 'must be True or False')
      for v in ('', '1', '0', '2', 'yes', 'None', '1.0', 'not True')],
])
def test_argument_errors(args, message):
    assert message in error(*args)


# ---- override files

def test_files_and_arguments_act_left_to_right(file):
    a = file('batch_size = batch_size * 2\n', 'a.py')
    b = file('learning_rate = batch_size / 10\n', 'b.py')
    assert call(a, b, '--batch_size=5') == {**call(), 'batch_size': 5, 'learning_rate': 3.2}
    assert call('--batch_size=5', a, a, b) == {**call(), 'batch_size': 20, 'learning_rate': 2.0}


def test_file_may_use_python(file):
    got = call(file('''
        """A recipe."""
        import math, os.path
        from pathlib import Path
        try:
            import no_such_module
        except ImportError:
            no_such_module = math
        _half = 8
        for _i in range(3):
            _half += 1
        def double(n):
            pi_like = n
            return pi_like * 2
        square = lambda n: n * n
        if batch_size > 3:
            batch_size = double(_half - 3)
        learning_rate = 1  # a whole number for a float
        gamma_min: float = -max(x for x in [1.5, 2.5])
        out_dir = os.path.join('out', __file__)
        exec('_half = 4')
        del compile
    '''))
    assert got == dict(out_dir='out/o.py', batch_size=16, learning_rate=1.0, gamma_min=-2.5,
                       compile=True, wandb_log=False)
    assert type(got['learning_rate']) is float


def test_file_here_comes_before_file_beside_the_script(file, tmp_path):
    (tmp_path / 'beside').mkdir()
    script = str(tmp_path / 'beside/train.py')
    name = file('batch_size = 2', 'beside/o.py')[7:]
    assert call(name, __file__=script)['batch_size'] == 2
    file('batch_size = 1')
    assert call(name, __file__=script)['batch_size'] == 1
    assert call(str(tmp_path / 'beside/o.py'))['batch_size'] == 2  # an absolute path
    assert call(name, __file__='')['batch_size'] == 1


def test_defaults_are_not_checked_until_set(file):
    name = file('batch_size = 1')
    assert call(name, clip=float('inf'))['clip'] == float('inf')


@pytest.mark.parametrize('text, message', [
    ('batch_sise = 1', 'o.py: batch_sise is not a setting (did you mean batch_size?)'),
    ('zzz = 1', 'o.py: zzz is not a setting (see --help; names of your own begin with _)'),
    ('\n\nif True:\n    steps = 1\n', 'o.py: steps is not a setting'),
    ('for i in range(3): pass', 'o.py: i is not a setting'),
    ('_a, b = 1, 2', 'o.py: b is not a setting'),
    ('shape = [2]', 'o.py: shape is not a setting'),
    ('from math import e', 'o.py: e is not a setting'),
    ("exec('batch_sise = 1')", 'o.py: batch_sise is not a setting'),
    ('\nbatch_size = (1', "o.py: SyntaxError: '(' was never closed (o.py, line 2)"),
    ('if 1:\npass', 'o.py: IndentationError: '),
    ('\nreturn 1', "o.py: SyntaxError: 'return' outside function (o.py, line 2)"),
    ('x = "\0"', 'o.py: '),
    ('(' * 5000, 'o.py: '),
    ('\n1 / 0', 'o.py:2: ZeroDivisionError: division by zero'),
    ('def f():\n    1 / 0\n\nf()\n', 'o.py:4: ZeroDivisionError'),
    ('import no_such_module', "o.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
    ('from json import loads\nloads("{\\n,")', 'o.py:2: JSONDecodeError'),
    ('raise ValueError("one\\n  two\\u2028three")', 'o.py:1: ValueError: one two three'),
    ('raise SystemExit', 'o.py:1: SystemExit:'),
    ('print(unknown)', "o.py:1: NameError: name 'unknown' is not defined"),
    ('print(shape)', 'o.py:1: NameError'),  # not a setting, so not seen
    ('\nbatch_size = "16"', "o.py: batch_size must be an int, not '16'"),
    ('batch_size = 16.0', 'o.py: batch_size must be an int, not 16.0'),
    ('batch_size = 160 / 10', 'batch_size must be an int, not 16.0'),
    ('batch_size = True', 'batch_size must be an int, not True'),
    ('batch_size = None', 'batch_size must be an int, not None'),
    ('from math import pi as batch_size', 'o.py: batch_size must be an int, not 3.14'),
    ('def batch_size(): pass', 'o.py: batch_size must be an int, not <function'),
    ('compile = 1', 'o.py: compile must be True or False, not int'),
    ('compile = "False"', "compile must be True or False, not 'False'"),
    ('learning_rate = "3e-4"', "learning_rate must be a finite float, not '3e-4'"),
    ('learning_rate = True', 'learning_rate must be a finite float, not True'),
    ('learning_rate = float("nan")', 'learning_rate must be a finite float, not nan'),
    ('learning_rate = -1e999', 'learning_rate must be a finite float, not -inf'),
    ('learning_rate = 10**5000', 'learning_rate must be a finite float, not int'),
    ('out_dir = 3', 'out_dir must be a str, not int'),
    ('out_dir = b"out"', "out_dir must be a str, not b'out'"),
    ('class S(str): pass\nout_dir = S("a\\nb")', r"o.py: out_dir must be a str, not 'a\nb'"),
])
def test_file_errors(file, text, message):
    assert message in error(file(text))


def test_file_that_is_not_text(file, tmp_path):
    (tmp_path / 'o.py').write_bytes(b'out_dir = "\xff"')
    assert 'o.py: SyntaxError: ' in error('o.py')


def test_errors_come_in_order(file):
    bad = file('batch_size = "x"')
    assert 'batch_sise' in error('--batch_sise=1', bad)
    assert 'o.py: batch_size' in error(bad, '--batch_sise=1')


def test_a_failed_file_changes_nothing_else(file):
    g = settings()
    with pytest.raises(UserError):
        configure(g, (), [file('batch_size = 3\nshape.append(2)')])
    assert g == settings()


# ---- the checks table

CHECKS = [
    ('batch_size', lambda v: v >= 1, 'at least 1'),
    ('learning_rate batch_size', lambda v: v >= 0, 'at least 0'),
    ('out_dir', lambda v: v in ('out', 'new'), 'out or new'),
]


@pytest.mark.parametrize('args, message', [
    (['--batch_size=0'], '--batch_size=0: must be at least 1'),
    (['--learning_rate=-1'], '--learning_rate=-1.0: must be at least 0'),
    (['--out_dir=a\nb'], '--out_dir=a b: must be out or new'),
    (['--out_dir=a', '--batch_size=0'], '--batch_size=0: must be at least 1'),  # the first row
])
def test_checks(args, message):
    assert error(*args, checks=CHECKS) == message


def test_checks_are_of_the_last_values(file):
    assert call(checks=CHECKS) == call()
    assert call('--batch_size=0', file('batch_size = 2'), checks=CHECKS)['batch_size'] == 2
    assert error(file('batch_size = -1'), checks=CHECKS) == '--batch_size=-1: must be at least 1'


def test_a_row_that_names_no_setting_is_a_bug():
    with pytest.raises(KeyError, match='batch_sise'):
        call(checks=[('batch_sise', lambda v: v >= 1, 'at least 1')])


# ---- the recipes

RECIPES = sorted((ROOT / 'config').glob('*.py'))


def settings_of(recipe):
    return configure(vars(train), train.CHECKS, [str(recipe)])


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_of_train(recipe):
    got = settings_of(recipe)
    for name in ('curriculum_frac', 'cooldown_frac'):
        steps = got[name] * got['max_iters']
        unused = name == 'curriculum_frac' and got['objective'] != 'duo'
        assert unused or steps == pytest.approx(round(steps), abs=1e-6), name
    if got['objective'] == 'dcd':
        assert got['max_iters'] % got['dcd_rounds'] == 0
        assert 0 < got['dcd_delta'] * 2 ** (got['dcd_rounds'] - 1) <= 1


def test_recipes_do_not_overwrite_each_other():
    all_settings = [settings_of(recipe) for recipe in RECIPES]
    out_dirs = [got['out_dir'] for got in all_settings]
    assert len({'out', *out_dirs}) == len(RECIPES) + 1
    assert {got['init_from'] for got in all_settings} <= {'scratch', 'out', *out_dirs}


def test_help_of_train_after_a_recipe(project):
    command = [sys.executable, str(ROOT / 'train.py'), 'config/owt_ar.py', '--help']
    r = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert r.returncode == 0 and r.stderr == ''
    assert "\n--objective='ar'  " in r.stdout and '\n--block_size=1024  ' in r.stdout


# ---- anything at all gives settings or one line

def test_random_arguments(file, capsys):
    file('batch_size = batch_size + 1\nlearning_rate = 1', 'good.py')
    file('batch_size = learning_rate', 'bad.py')
    keys = ['--' + k for k in settings()]
    keys += ['--batch-size', '--bath_size', '-h', '--help', '--', '-', '---out_dir', '']
    values = ['', '1', '-1', '0', '1e3', '1e309', '-3.5', 'nan', 'inf', 'true', 'False', 'None',
              '"', "'a'", '\n', '\0', '\ud800', '٣', '½', '1__0', '_', '=', '==', 'é' * 300,
              '9' * 4400, 'good.py', 'bad.py', './good.py', '..']
    types = {k: type(v) for k, v in call().items()}
    rng, good = random.Random(0), 0
    for _ in range(300):
        args = []
        for _ in range(rng.randrange(5)):
            key, value = rng.choice(keys), rng.choice(values)
            args += rng.choice([[key], [value], [key, value], [f'{key}={value}'], ['good.py'],
                                ['--compile', value]])
        try:
            got = call(*args)
            assert {k: type(v) for k, v in got.items()} == types, args
            good += 1
        except UserError as e:
            assert len(str(e).splitlines()) == 1, args
        except SystemExit as e:
            assert e.code == 0 and {'-h', '--help'} & set(args), args
    assert 30 < good < 270  # both ends are worth something


def fails_with(message):
    raise RuntimeError(message)


@pytest.mark.parametrize('call, one_line', [
    (lambda: torch.empty(2 ** 58), True),
    (lambda: np.empty(2 ** 58), True),
    (lambda: bytearray(2 ** 62), True),                  # a MemoryError without a word
    (lambda: fails_with('CUDA out of memory. Tried to allocate 9 GiB'), True),
    (lambda: fails_with('CUDA error: an illegal memory access was encountered'), False)])
def test_a_lack_of_memory_is_one_line_and_a_bug_is_not(call, one_line):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if one_line else RuntimeError) as end:
            configurator.run(call)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert str(end.value).startswith('not enough memory') == one_line


@pytest.mark.parametrize('script', 'train sample eval prepare convert plot bench'.split())
def test_ctrl_c_while_a_script_loads_is_no_traceback(tmp_path, script):
    for name in ('torch', 'numpy', 'matplotlib'):        # found before the real ones
        (tmp_path / f'{name}.py').write_text(
            "import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    process = subprocess.Popen(
        [sys.executable, ROOT / f'{script}.py'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)), preexec_fn=listen)
    assert process.stdout.readline() == 'loading\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == '' and process.returncode == -signal.SIGINT
