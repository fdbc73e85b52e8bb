"""Damaged and hostile input, a few hundred cases; FUZZ_CASES=10000 for many. Each gives what can be
used, or a UserError of one line: no other exception, no hang, no code run, no great allocation."""
import json
import math
import os
import pickle
import resource
import shutil
import signal
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import sample
import train
from checkpoint import STATE, load_model, load_state, save
from configurator import UserError, configure
from convert import convert
from data import (check_tokens, get_rows, likelihood_figures, load_data, load_tokenizer,
                  num_rows)
from files import repacked
from helpers import ROOT, equal, good, run
from model import DiT, DiTConfig

CASES = int(os.environ.get('FUZZ_CASES', 400))
fuzz = lambda share: settings(derandomize=True, database=None, deadline=None,
                              max_examples=round(CASES * share),
                              suppress_health_check=list(HealthCheck))
flat = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
        | st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 1e30,
                           'bytes', 'bpe', 'uint16', 'duo', 'ar', 'mdlm', '\n']))
value = st.recursive(
    flat, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


class Late(BaseException):
    """No `except Exception` swallows it."""


def late(*_):
    raise Late


@contextmanager
def one_line_or_fine():
    """The block ends, or raises a UserError of one line; in time, and without much memory."""
    before, old = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                   signal.signal(signal.SIGALRM, late))
    signal.alarm(20)
    try:
        yield
    except UserError as error:
        assert len(str(error).splitlines()) == 1, repr(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3, (
        'it took hundreds of megabytes')


@st.composite
def damaged(draw, raw):
    """raw with some bytes changed, cut off, left out or put in: at the ends, where the headers are,
    and inside."""
    # st.integers(0, n) would prefer small ones
    anywhere = st.integers(0, 999).map(lambda i: len(raw) * i // 1000)
    if draw(st.booleans()):  # a single bit is the hardest to notice
        at = draw(anywhere)
        return raw[:at] + bytes([raw[at] ^ 1 << draw(st.integers(0, 7))]) + raw[at + 1:]
    for _ in range(draw(st.integers(1, 3))):
        n = len(raw)
        at = draw(anywhere | st.integers(0, min(n, 2999)) | st.integers(max(0, n - 999), n))
        new = draw(st.binary(min_size=1, max_size=8)
                   | st.sampled_from([b'\0' * 8, b'\xff' * 8, b'9' * 8, b'9' * 30]))
        kind = draw(st.sampled_from(['flip', 'flip', 'write', 'cut', 'leave out', 'put in']))
        if kind == 'flip' and at < n:
            new = bytes([raw[at] ^ 1 << draw(st.integers(0, 7))])
        end = n if kind == 'cut' else at if kind == 'put in' else at + len(new)
        raw = raw[:at] + (b'' if kind in ('cut', 'leave out') else new) + raw[end:]
    return raw


@st.composite
def altered(draw, tree):
    """A JSON-able tree with a value or two changed, anywhere, or left out; as the text of a
    file."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        node = tree
        key = draw(st.sampled_from(sorted(node)))
        while isinstance(node[key], dict) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            key = draw(st.sampled_from(sorted(node)))
        kind = draw(st.sampled_from(['nudge', 'change', 'change', 'lose']))
        if kind == 'lose':
            del node[key]
        else:
            nudged = kind == 'nudge' and type(node[key]) is int
            node[key] = node[key] + draw(st.integers(-2, 99)) if nudged else draw(value)
        if not tree:
            break
    return json.dumps(tree).encode()


def write(path, raw):
    path.unlink(missing_ok=True)  # another file: the old one may be mapped
    path.write_bytes(raw)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """data/, small data sets, and out/, a small model with two checkpoints."""
    home = tmp_path_factory.mktemp('fuzz')
    (home / 'a.txt').write_text('\n\n'.join(f'This is line {i} of a text.' for i in range(99)))
    for name in ('bytes', 'bpe'):
        good(run(home, 'prepare.py', 'a.txt', f'--name={name}', f'--tokenizer={name}'))
    padded = shutil.copytree(home / 'data/bpe', home / 'data/padded')
    meta, data = load_data(padded)
    for split, (tokens, *_) in data.items():
        np.array([0, 9, 9, 40, len(tokens)], np.uint64).tofile(padded / f'{split}.idx')
    (padded / 'meta.json').write_text(json.dumps(meta | dict(pad_id=1)))
    torch.manual_seed(0)
    model = DiT(DiTConfig(256, 16, 1, 2, 16, 8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1)).sum().backward()
    optimizer.step()
    meta = load_data(home / 'data/bytes')[0]
    info = dict(objective='duo', model=asdict(model.config), data=meta,
                settings={'dataset': 'bytes'})
    (home / 'out').mkdir()
    for step in (4, 5):
        save(home / 'out',
             info | dict(step=step, weights=model.state_dict(), ema=model.state_dict(),
                         teacher=None, optimizers=[optimizer.state_dict()['state']], scaler={},
                         seconds=1.0, skipped=0, fingerprint='f'),
             model, info, home / 'data/bytes')
    return home


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def restored(folder, whole):
    """Afterwards the folder is as it was."""
    try:
        yield
    finally:
        for name, raw in whole.items():
            write(folder / name, raw)


# --------------------------------------------------------------------------------------------------
# settings

GLOBALS = {name: v for name, v in vars(train).items() if type(v) in (int, float, bool, str)}
TYPES = {name: type(v) for name, v in GLOBALS.items() if name[0].islower()}
CHECKS = [('max_iters batch_size', lambda v: v >= 1, 'at least 1'),
          ('objective', lambda v: v in ('duo', 'ar'), 'duo or ar')]
names = st.sampled_from(sorted(TYPES)) | st.from_regex(r'\A[a-z_]{1,9}\Z')
texts = flat.map(str) | st.text(max_size=8) | st.sampled_from(
    ['1e6', 'True', 'nan', '-', '--', '--help', '9' * 5000])
options = st.builds('--{}={}'.format, names, texts)
assignments = st.builds('{} = {}'.format, names, flat.map(repr) | names | texts)
override_files = st.lists(assignments, max_size=4).map('\n'.join).map(
    lambda text: text.encode('utf-8', 'surrogatepass'))


def configured(args):
    with one_line_or_fine():
        try:
            got = configure(GLOBALS, CHECKS, args)
        except SystemExit as end:
            assert end.code == 0 and '--help' in args
            return
        assert {name: type(v) for name, v in got.items()} == TYPES
        assert got['max_iters'] >= 1 and got['objective'] in ('duo', 'ar')


@fuzz(0.1)
@given(st.lists(options | options | options | names.map('--{}'.format) | texts, max_size=3))
def test_arguments(args):
    configured(args)


@fuzz(0.1)
@given(override_files | damaged((ROOT / 'config/stdlib_gpu.py').read_bytes()))
def test_override_files(home, raw):
    write(home / 'o.py', raw)
    configured([str(home / 'o.py')])


# --------------------------------------------------------------------------------------------------
# data

def use_data(folder):
    """What train.py does with a data set."""
    with one_line_or_fine():
        meta, data = load_data(folder)
        K = meta['vocab_size']
        check_tokens(data, K, folder)
        for split, stream in data.items():
            rows = get_rows(stream, [0, num_rows(stream, 16) - 1], 16, meta)
            starts = [0, len(stream[0])] if stream[1] is None else stream[1].tolist()
            assert starts == sorted(starts) and (starts[0], starts[-1]) == (0, len(stream[0]))
            assert 0 <= rows.min() and rows.max() < K
            _, figures = likelihood_figures(torch.ones(2), 'duo', stream, [0, 0], 16, split)
            assert all(math.isfinite(figure) for figure in figures.values())
        encode, decode, _ = load_tokenizer(meta, folder)
        assert type(decode(np.arange(K))) is str and max(encode('line')) < K


@pytest.mark.parametrize('name', ['bytes', 'bpe', 'padded'])
def test_meta(home, name):
    folder = home / 'data' / name
    whole = files(folder)

    @fuzz(0.05)
    @given(altered(json.loads(whole['meta.json'])) | damaged(whole['meta.json']))
    def check(raw):
        write(folder / 'meta.json', raw)
        use_data(folder)

    with restored(folder, whole):
        check()


@pytest.mark.parametrize('folder', ['padded', 'bpe'])
def test_token_files(home, folder):
    folder = home / 'data' / folder
    whole = files(folder)
    names = sorted(whole.keys() - {'meta.json'})

    @fuzz(0.1)
    @given(st.data(), st.sampled_from(names))
    def check(data, name):
        raw, meta = data.draw(damaged(whole[name])), json.loads(whole['meta.json'])
        made_so = data.draw(st.booleans())  # who made it so meant it: no checksum tells
        if made_so and not name.endswith('.bytes'):
            meta |= (dict(tokenizer_sha256=None) if name == 'tokenizer.json'
                     else {f'{name[:-4]}_tokens': len(raw) // 2})
        write(folder / name, raw)
        write(folder / 'meta.json', json.dumps(meta).encode())
        with restored(folder, whole):
            use_data(folder)

    check()


def test_a_tokenizer_of_another_data_set(home, tmp_path):
    folder = home / 'data/bpe'
    meta, raw = load_data(folder)[0], (folder / 'tokenizer.json').read_bytes()
    (tmp_path / 'tokenizer.json').write_bytes(raw + b' ')
    with pytest.raises(UserError, match='not the one'):
        load_tokenizer(meta, tmp_path)


# --------------------------------------------------------------------------------------------------
# checkpoints

def test_checkpoints(home):
    """Damage is seen, whatever it is: the state is bit for bit this one, or the one before, or
    there is a line."""
    out = home / 'out'
    whole, states = files(out), [torch.load(out / f'step-{step:08}.pt') for step in (4, 5)]

    @fuzz(0.1)
    @given(damaged(whole['step-00000005.pt']), st.booleans())
    def check(raw, alone):
        write(out / 'step-00000005.pt', raw)
        if alone:
            (out / 'step-00000004.pt').unlink(missing_ok=True)
        with restored(out, whole):
            got = None
            with one_line_or_fine():
                got = load_state(str(out))
            assert any(equal(got, state) for state in states[alone:]) or got is None and alone

    check()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_the_pickle_in_a_checkpoint(home, tmp_path):
    """Another pickle in the file, its checksums right."""
    whole = home / 'out/step-00000005.pt'
    with zipfile.ZipFile(whole) as file:
        inside = file.read(next(name for name in file.namelist() if name.endswith('data.pkl')))

    @fuzz(0.1)
    @given(damaged(inside))
    def check(raw):
        write(tmp_path / whole.name, repacked(whole, raw))
        with one_line_or_fine():
            state = load_state(tmp_path)
            assert all(isinstance(state[key], kind) for key, kind in STATE.items())

    write(tmp_path / whole.name, repacked(whole, inside))
    assert equal(load_state(tmp_path), load_state(home / 'out'))
    check()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('bomb', [
    b'cos\nsystem\n(S"touch ran"\ntR.', b'cbuiltins\nexec\n(S"open(\'ran\', \'w\')"\ntR.',
    b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.',
    b'cdefused\nThing\n)R.', b'ctransformers.defused\nThing\n)R.',
    b'cos\nsystem\nq\x00}q\x01X\x01\x00\x00\x00ah\x00(X\x09\x00\x00\x00touch rantRs.'])
def test_a_bomb_is_refused_not_run(home, tmp_path, monkeypatch, bomb):
    """As a bare pickle and as one in torch's zip; by a system call, or by a module that merely
    gets imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path('defused.py').write_text('open("ran", "w")\nThing = dict')
    whole, folder = home / 'out/step-00000005.pt', tmp_path / 'bombs'
    states = [lambda: load_state(folder)]
    models = [lambda: load_model(folder), lambda: convert(folder, tmp_path / 'never'),
              lambda: convert(folder / 'model.ckpt', tmp_path / 'never')]
    calls = {'step-00000007.pt': states, 'model.ckpt': models,
             'model.safetensors': models}
    for raw in (bomb, b'\x80\x02' + bomb,
                repacked(whole, bomb), repacked(whole, b'\x80\x02' + bomb)):
        for name, attempts in calls.items():
            for attempt in attempts:
                folder.mkdir()
                write(folder / name, raw)
                with pytest.raises(UserError) as error:
                    attempt()
                line = str(error.value)
                assert len(line.splitlines()) == 1 and str(folder) in line
                assert not Path('ran').exists()
                shutil.rmtree(folder)
    if b'transformers' not in bomb:  # or this would test nothing
        pickle.loads(bomb)
        assert Path('ran').exists()


def use_model(folder):
    """What sample.py and eval.py do with a model."""
    with one_line_or_fine():
        loaded = model, tokenizer, info = sample.load(str(folder))
        (text,) = sample.generate(loaded, 'a', length=8, steps=2)
        assert type(text) is str
        return model


def test_weights(home):
    out = home / 'out'
    whole, weights = files(out), load_model(str(out))[0].state_dict()
    with safe_open(out / 'model.safetensors', 'pt') as file:
        told = f'"sha256":"{file.metadata()["sha256"]}"'.encode()

    @fuzz(0.1)
    @given(damaged(whole['model.safetensors']))
    def check(raw):
        write(out / 'model.safetensors', raw)
        model = use_model(out)
        assert model is None or told not in raw or equal(dict(model.state_dict()), dict(weights))

    with restored(out, whole):
        check()


def test_config(home):
    out = home / 'out'
    whole = files(out)

    @fuzz(0.1)
    @given(altered(json.loads(whole['config.json'])) | damaged(whole['config.json']))
    def check(raw):
        write(out / 'config.json', raw)
        use_model(out)

    with restored(out, whole):
        check()
