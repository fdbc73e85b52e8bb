"""Token files: what prepare.py makes of texts, and data.py on what it wrote."""
import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from configurator import UserError
from data import (Tokenizer, check_tokens, epoch_rows, fingerprint, get_rows, load_data,
                  likelihood_figures, load_tokenizer, num_rows, tokenizer_difference)
from helpers import ROOT

BPE_FILE = '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'  # tiktoken's name for GPT-2's vocab.bpe
CACHES = [os.environ.get('TIKTOKEN_CACHE_DIR', ''),
          ROOT.parent / 'shared/tokenizers/tiktoken_cache']
CACHE = next((Path(cache) for cache in CACHES if Path(cache, BPE_FILE).exists()), None)
needs_gpt2 = pytest.mark.skipif(CACHE is None, reason="needs GPT-2's BPE files: TIKTOKEN_CACHE_DIR "
                                'names no folder that has them')
WITH_GPT2 = ['gpt2'] if CACHE else []                   # of which test_golden_rows_of_gpt2 says why
HARD = ('naïve café — 日本語 🙂🏽\n\n\n  def f(x):\n\treturn "x"  \n\x85\u2028é\x1c\nend\n  \n\n'
        'ok\r\n <|endoftext|>\nok\n')


def ok(*args, cwd):
    """prepare.py with these arguments, in this process: another one takes a second to start."""
    here, arguments = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = ['prepare.py', *map(str, args)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            prepare.main()
    finally:
        os.chdir(here)
        sys.argv = arguments
    assert len(out.getvalue().splitlines()) == 1
    return out.getvalue()


def command(*args, cwd, **env):
    """prepare.py in a process of its own."""
    return subprocess.run([sys.executable, ROOT / 'prepare.py', *map(str, args)], cwd=cwd,
                          text=True, capture_output=True, env=os.environ | env)


def one_line(text, says):
    assert len(text.splitlines()) == 1 and 'Traceback' not in text and says in text, text


def command_fails(says, *args, cwd, **env):
    done = command(*args, cwd=cwd, **env)
    assert done.returncode == 1 and not done.stdout
    one_line(done.stderr, says)


def stops(says, function, *args, **more):
    with pytest.raises((UserError, OSError)) as stop:
        function(*args, **more)
    one_line(str(stop.value), says)


def fails(says, *args, cwd):
    stops(says, ok, *args, cwd=cwd)


def play(words=60_000):
    """Speeches like Tiny Shakespeare's: who, some lines, an empty line."""
    rng, speeches = random.Random(0), []
    letters = 'abcdefghiklmnoprstuwy'
    lexicon = [''.join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(3000)]
    while words > 0:
        lines = [' '.join(rng.choices(lexicon, weights=range(3000, 0, -1), k=7))
                 for _ in range(rng.randint(1, 6))]
        who = rng.choice(['ROMEO', 'JULIET', 'First Citizen'])
        speeches.append(f'{who}:\n' + ',\n'.join(lines) + '.\n')
        words -= 7 * len(lines)
    return '\n'.join(speeches)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob('*') if path.is_file()}


def documents(folder, split):
    """The way back: the documents of a split, decoded one by one from its token file."""
    meta, data = load_data(folder)
    ids, decode = np.array(data[split][0]), load_tokenizer(meta, folder).decode
    ends = np.flatnonzero(ids == meta['eos_id'])
    assert ends[-1] == len(ids) - 1  # every document is ended by eos, the last one too
    return [decode(piece[:-1]) for piece in np.split(ids, ends + 1)[:-1]]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with what many tests look at, prepared once: data/play (bpe), data/play_bytes,
    data/stdlib (bytes)."""
    home = tmp_path_factory.mktemp('home')
    (home / 'play.txt').write_text(play(), encoding='utf-8')
    ok('play.txt', cwd=home)
    ok('play.txt', '--tokenizer', 'bytes', '--name', 'play_bytes', cwd=home)
    ok('stdlib', '--tokenizer', 'bytes', cwd=home)
    return home


@pytest.fixture
def notes(tmp_path):
    """Five texts in a folder, beside things that are not to be read."""
    for name, text in (('a.txt', 'first'), ('b.md', 'second\n'),
                       ('deep/c.txt', '\ufeffthird\r\nline\r\n'),
                       ('deep/d.txt', 'fourth'), ('e.txt', 'fifth'),
                       ('blank.txt', ' \n'), ('x.rst', 'no'), ('.git/f.txt', 'no'),
                       ('._a.txt', '\0')):
        path = tmp_path / 'notes' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path


# --------------------------------------------------------------------------------------------------
# what prepare.py writes

@pytest.mark.parametrize('name', ['play', 'play_bytes', 'stdlib'])
def test_meta_says_what_is_there(home, name):
    folder = home / 'data' / name
    meta, data = load_data(folder)
    bpe = name == 'play'
    files = {'train.bin', 'val.bin', 'train.bytes', 'val.bytes', 'meta.json'}
    assert set(os.listdir(folder)) == files | ({'tokenizer.json'} if bpe else set())
    assert meta['name'] == name
    assert meta['tokenizer'] == ('bpe' if bpe else 'bytes')
    assert (meta['bos_id'], meta['eos_id'], meta['pad_id']) == (0, 0, None)
    for split, (tokens, starts, _) in data.items():
        assert starts is None and tokens.dtype == np.uint16
        assert len(tokens) == meta[f'{split}_tokens'] > 0
        assert tokens.max() < meta['vocab_size']
        texts = documents(folder, split)
        assert meta[f'{split}_documents'] == len(texts)
        assert meta[f'{split}_bytes'] == sum(len(text.encode()) + 1 for text in texts)
        if not bpe:
            assert meta[f'{split}_bytes'] == meta[f'{split}_tokens'] and meta['vocab_size'] == 256
    if bpe:
        raw = (folder / 'tokenizer.json').read_bytes()
        assert meta['tokenizer_sha256'] == hashlib.sha256(raw).hexdigest()
        assert 512 < meta['vocab_size'] < 4096  # play.txt is too small for 4096
        assert meta['vocab_size'] == len(documents(folder, 'train')[0]) // 256
        assert meta['vocab_size'] == len(json.loads(raw)['model']['vocab'])
        assert meta['train_bytes'] / meta['train_tokens'] > 2  # it did learn


def test_stdlib_is_split_by_file(home):
    root = Path(os.__file__).parent
    train, val = (set(documents(home / 'data/stdlib', split)) for split in ('train', 'val'))
    meta, _ = load_data(home / 'data/stdlib')
    assert meta['train_documents'] >= len(train) > 300 and not train & val
    assert 4e6 < meta['train_bytes'] < 3e7 and 0.02 < meta['val_bytes'] / meta['train_bytes'] < 0.1
    read = lambda name: (root / name).read_text(encoding='utf-8')
    for name in ('argparse.py', 'json/decoder.py', 'asyncio/base_events.py', 'wave.py', 'turtle.py',
                 'zipapp.py'):
        held = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < 0.05
        assert read(name) in (val if held else train)
    left_out = ['encodings/cp437.py', 'pydoc_data/topics.py', 'html/entities.py', 'stringprep.py']
    left_out += ['test/test_bool.py'] if (root / 'test/test_bool.py').exists() else []  # not Debian
    assert not {read(name) for name in left_out} & (train | val)


def test_two_runs_write_the_same_bytes(home):
    ok('play.txt', '--data_dir', 'again', cwd=home)
    done = command('stdlib', '--tokenizer=bytes', '--data_dir', 'again', cwd=home)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 1
    for name in ('play', 'stdlib'):
        assert everything(home / 'again' / name) == everything(home / 'data' / name)


def test_one_file_is_cut_where_a_paragraph_begins(home):
    (train,), (val,) = (documents(home / 'data/play', split) for split in ('train', 'val'))
    text = play()
    assert train + val == text
    assert train.endswith('.\n\n') and val.split(':')[0] in ('ROMEO', 'JULIET', 'First Citizen')
    assert 0.05 <= len(val) / len(text) < 0.075


def test_one_file_without_paragraphs_or_lines():
    def split(text, val_fraction):
        (_, val), (_, train) = prepare.end_validates(text, val_fraction)
        return [train, val]
    assert split('line\n' * 100, 0.1) == ['line\n' * 90, 'line\n' * 10]
    assert split('字' * 100, 0.25) == ['字' * 75, '字' * 25]
    assert split('é' * 99, 0.26) == ['é' * 74, 'é' * 25]  # 147 bytes of 198: inside a letter
    train, val = split('One.\n\n' + 'x\n' * 100, 0.1)  # that paragraph is too far away
    assert train + val == 'One.\n\n' + 'x\n' * 100 and 20 <= len(val) <= 22


def test_a_folder_gives_one_document_per_file(notes):
    assert 'notes' in ok('notes', '--tokenizer', 'bytes', '--val_fraction', '0.3', cwd=notes)
    train, val = (documents(notes / 'data/notes', split) for split in ('train', 'val'))
    names = {'a.txt': 'first', 'b.md': 'second\n', 'deep/c.txt': 'third\nline\n',
             'deep/d.txt': 'fourth', 'e.txt': 'fifth'}
    held = {n for n in names if int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) / 2**32 < 0.3}
    assert 0 < len(held) < 5  # or this would test nothing
    assert train == [names[n] for n in names if n not in held]
    assert val == [names[n] for n in names if n in held]
    # The same files named one by one, in another order and from elsewhere, are the same data.
    (notes / 'else').mkdir()
    ok(*(f'../notes/{n}' for n in reversed(names)), '--name', 'notes', '--tokenizer', 'bytes',
       '--val_fraction', '0.3', cwd=notes / 'else')
    one, other = everything(notes / 'else/data/notes'), everything(notes / 'data/notes')
    for meta in (one.pop('meta.json'), other.pop('meta.json')):
        assert json.loads(meta)['name'] == 'notes'  # it says also which path was named
    assert one == other


def held_out(folder, names, val_fraction):
    """The names of the texts that validate; each text is its name."""
    for name in names:
        (folder / name).write_text(name)
    row = ['', '', 'some', 'text', 'bpe', 'packed', '-', 0, 0]
    split = prepare.read_documents(row, {name: str(folder / name) for name in names}, val_fraction,
                                   0)
    return {text for val, text in split if val}


@pytest.mark.parametrize('n', [2, 3, 20])
def test_neither_split_is_empty(tmp_path, n):
    names = [f'{i}.txt' for i in range(n)]
    for val_fraction in (1e-6, 0.5, 1 - 1e-6):
        val = held_out(tmp_path, names, val_fraction)
        train = set(names) - val
        assert train and val and val < set(names)
        assert val == held_out(tmp_path, names[::-1], val_fraction)
        if n == 20:
            most = {1e-6: len(val) == 1, 0.5: 5 < len(val) < 15, 1 - 1e-6: len(train) == 1}
            assert most[val_fraction]


def test_a_file_that_comes_moves_no_other(tmp_path):
    names = [f'{i}.txt' for i in range(100)]
    before = held_out(tmp_path, names, 0.2)
    after = held_out(tmp_path, names + ['new.txt'], 0.2)
    assert 10 < len(before) < 30 and after - {'new.txt'} == before


# --------------------------------------------------------------------------------------------------
# tokenizers

@pytest.mark.parametrize('name', ['bytes', 'bpe', *WITH_GPT2])
def test_a_tokenizer(home, monkeypatch, name):
    folder = home / 'data' / {'bytes': 'play_bytes', 'bpe': 'play', 'gpt2': ''}[name]
    meta = dict(tokenizer='gpt2', vocab_size=50257, bos_id=50256, eos_id=50256)
    if name == 'gpt2':
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    else:
        meta = load_data(folder)[0]
    encode, decode, _ = load_tokenizer(meta, folder)
    # 1. THERE AND BACK
    for text in (HARD, play(500), '', '\n', 'é' * 3000):
        ids = encode(text)
        assert type(ids) is list
        assert all(0 <= i < meta['vocab_size'] and i != meta['eos_id'] for i in ids)
        assert decode(ids) == text == decode(np.array(ids, dtype=np.uint16))
    # 2. DECODING NEVER FAILS
    assert decode([]) == ''
    mask = meta['vocab_size']                            # MDLM's
    assert decode([*encode('so'), mask, mask]) == 'so__'
    for i in range(meta['vocab_size']):
        assert type(decode([i])) is str
    rng = np.random.default_rng(0)
    for _ in range(100):
        decode(rng.integers(meta['vocab_size'], size=50))
    ids = encode('é')
    if len(ids) > 1:
        assert '\ufffd' in decode(ids[:1])
    assert name != 'bytes' or decode([0xff, 0x41]) == '\ufffdA'
    # 3. EOS shows as an empty line
    eos = [meta['eos_id']]
    assert decode(eos) == '\n\n'
    assert decode(encode('one') + eos + encode('two') + eos) == 'one\n\ntwo\n\n'
    assert decode(eos + eos + encode('x')) == '\n\n\n\nx'


def test_bpe_by_lines_gives_the_tokens_of_the_whole(home):
    import tokenizers
    folder = home / 'data/play'
    bpe = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    bpe.encode_special_tokens = True
    rng = random.Random(0)
    noise = ''.join(rng.choices('ab .,\'s1\n\n\n\r\t\x0b\x1c\x85\xa0\u2028\u3000é', k=20_000))
    ours = load_tokenizer(load_data(folder)[0], folder)
    for text in (HARD, play(3000), noise):
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids


def test_bpe_size_is_kept(notes):
    (notes / 'play.txt').write_text(play(5000))
    ok('play.txt', '--vocab_size', 300, cwd=notes)
    assert load_data(notes / 'data/play')[0]['vocab_size'] == 300
    # bytes and eos: no merge at all
    ok('play.txt', '--vocab_size', 257, '--name', 'bare', cwd=notes)
    meta, data = load_data(notes / 'data/bare')
    assert meta['vocab_size'] == 257 and meta['train_bytes'] == meta['train_tokens']
    ok('notes', cwd=notes)  # so little text has no 512 tokens in it
    assert 257 < load_data(notes / 'data/notes')[0]['vocab_size'] < 512


def test_bpe_never_sees_the_validation_text(tmp_path):
    (tmp_path / 'text.txt').write_text(play(5000) + '\nROMEO:\n' + 'zyzzyva ' * 100)
    ok('text.txt', cwd=tmp_path)
    (train,), (val,) = (documents(tmp_path / 'data/text', split) for split in ('train', 'val'))
    assert 'zyzzyva' in val and 'zyzzyva' not in train
    vocabulary = json.loads((tmp_path / 'data/text/tokenizer.json').read_text())['model']['vocab']
    assert not any('zyzz' in token for token in vocabulary)


def test_gpt2_out_of_reach_is_one_line(notes):
    (notes / 'empty').mkdir()
    dead = {key: 'http://127.0.0.1:9' for key in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY',
                                                  'all_proxy')}
    command_fails('TIKTOKEN_CACHE_DIR', 'notes', '--tokenizer', 'gpt2', cwd=notes, NO_PROXY='',
                  no_proxy='', TIKTOKEN_CACHE_DIR=str(notes / 'empty'), **dead)
    assert not everything(notes / 'data')


def test_tokenizer_errors(home, tmp_path):
    meta = dict(eos_id=0, tokenizer='bpe')
    stops(f'{tmp_path}/tokenizer.json', load_tokenizer, meta, tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{"half": ')
    stops(f'{tmp_path}/tokenizer.json', load_tokenizer, meta, tmp_path)
    (tmp_path / 'tokenizer.json').write_bytes((home / 'data/play/tokenizer.json').read_bytes())
    load_tokenizer(meta, tmp_path)
    stops('not the one', load_tokenizer, meta | dict(tokenizer_sha256='of another'), tmp_path)


# --------------------------------------------------------------------------------------------------
# rows

def test_golden_rows():
    tokens = np.arange(1, 32, dtype=np.uint16), None
    meta = dict(bos_id=98, eos_id=99, pad_id=None)
    assert num_rows(tokens, 16) == 2  # 14 of its own each; 29, 30 and 31 are dropped
    rows = get_rows(tokens, [1, 0, 1], 16, meta)
    assert rows.dtype == np.int64 and rows.tolist() == [
        [98, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 99],
        [98, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 99],
        [98, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 99]]


def test_golden_rows_from_text(tmp_path):
    for name, text in (('a.txt', 'validates'), ('b.txt', 'the quick'),
                       ('c.txt', 'brown fox jumps over')):
        (tmp_path / name).write_text(text)
    # of the three, sha256('a.txt') is the smallest
    ok('a.txt', 'b.txt', 'c.txt', '--tokenizer', 'bytes', cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/a')
    assert bytes(data['val'][0].astype(np.uint8)) == b'validates\0'
    assert num_rows(data['train'], 16) == 2
    rows = get_rows(data['train'], np.arange(2), 16, meta)
    rows = [bytes(row.astype(np.uint8)) for row in rows]
    assert rows == [b'\0the quick\0brow\0', b'\0n fox jumps ov\0']  # no er\0


def test_tokenizer_difference():
    meta = dict(tokenizer='bpe', tokenizer_sha256='a', vocab_size=300, bos_id=0, eos_id=0)
    for change, words in ((dict(), ''),
                          (dict(tokenizer_sha256=None, eos_id=7), ''),      # of the authors
                          (dict(tokenizer='json'), ''),
                          (dict(tokenizer_sha256='b'), 'tokenizer_sha256 a and b'),
                          (dict(vocab_size=301), 'vocab_size 300 and 301'),
                          (dict(bos_id=1, eos_id=2), 'bos_id 0 and 1, eos_id 0 and 2'),
                          (dict(tokenizer='gpt2', tokenizer_sha256=None, vocab_size=50257),
                           'vocab_size 300 and 50257, tokenizer bpe and gpt2')):
        assert tokenizer_difference(meta, meta | change) == words


def test_the_tokenizer_of_a_model_for_another_text(home, notes):
    """Its tokenizer.json gives what made it: the same meta, the same tokens."""
    for name in ('play', 'play_bytes'):
        source = home / 'data' / name / 'tokenizer.json' if name == 'play' else 'bytes'
        ok('notes', '--tokenizer', source, '--name', name, cwd=notes)
        ours, theirs = (load_data(folder / 'data' / name)[0] for folder in (home, notes))
        assert tokenizer_difference(ours, theirs) == ''
        for key in ('tokenizer', 'tokenizer_sha256', 'vocab_size', 'bos_id', 'eos_id', 'pad_id'):
            assert ours[key] == theirs[key]
    encode = load_tokenizer(ours | load_data(home / 'data/play')[0], home / 'data/play').encode
    _, data = load_data(notes / 'data/play')
    texts = documents(notes / 'data/play', 'train')
    assert data['train'][0].tolist() == sum((encode(text) + [0] for text in texts), [])


def test_a_stream_shorter_than_a_row():
    tokens = np.arange(14, dtype=np.uint16), None
    assert num_rows(tokens, 16) == 1
    stops('14 tokens fill no row: block_size = 17 takes 15', num_rows, tokens, 17)
    stops('block_size = 2 ', num_rows, tokens, 2)


def test_every_epoch_is_a_permutation():
    n, epochs = 37, 5
    index = np.arange(n * epochs)
    rows = epoch_rows(index, n, seed=3).reshape(epochs, n)
    assert rows.dtype == np.int64
    assert all(sorted(row) == list(range(n)) for row in rows.tolist())
    assert len({tuple(row) for row in rows.tolist()}) == epochs  # each its own
    assert rows[2].tolist() == np.random.default_rng([3, 2]).permutation(n).tolist()
    assert not np.array_equal(epoch_rows(index[:n], n, seed=4), rows[0])
    # However it is asked: in pieces that span epochs, out of order, again
    rows = rows.reshape(-1)
    for size in (1, 10, n, 100):
        parts = [epoch_rows(index[i:i + size], n, 3) for i in index[::size]]
        assert np.array_equal(np.concatenate(parts), rows)
    some = np.random.default_rng(0).permutation(index)
    assert np.array_equal(epoch_rows(some, n, 3), rows[some])


@pytest.mark.parametrize('name', ['bytes', 'bpe', *WITH_GPT2])
def test_bits_per_byte_are_of_the_rows_that_are_scored(tmp_path, monkeypatch, name):
    """As many bits as scored tokens, over the bytes of these rows' text: it is ASCII, which no row
    cuts inside a character. Words and figures have tokens of different lengths."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    (tmp_path / 'a.txt').write_text('validates, by the hash of its name')
    (tmp_path / 'b.txt').write_text(play(3000) + '7 1#0\n' * 900)
    ok('a.txt', 'b.txt', '--tokenizer', name, cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/a')
    decode, T = load_tokenizer(meta, tmp_path / 'data/a').decode, 34

    def bits_per_byte(rows, kind):
        nats = torch.full((len(rows),), math.log(2))
        return likelihood_figures(nats, kind, data['train'], rows, T, 'train')[1]['bpb']

    last = num_rows(data['train'], T) - 1
    for rows in ([0, 1, 2], [last, last - 2], range(last + 1)):
        ids = get_rows(data['train'], rows, T, meta)[:, 1:-1].reshape(-1)
        size = len(decode(ids)) - (ids == meta['eos_id']).sum()    # it shows as two line breaks
        assert math.isclose(bits_per_byte(rows, 'duo'), len(rows) * T / size, rel_tol=1e-6)
        assert math.isclose(bits_per_byte(rows, 'ar'), len(rows) * (T - 1) / size, rel_tol=1e-6)
    if name != 'bytes':  # or which rows they are would not matter
        assert bits_per_byte([last], 'duo') > 1.3 * bits_per_byte([0], 'duo')

@pytest.mark.parametrize('name', ['bytes', 'bpe', *WITH_GPT2])
def test_bytes_of_every_token(tmp_path, monkeypatch, name):
    """They add up to the text, of any letters, with no correction: they are whole numbers."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': HARD + str(i)}) + '\n'
                                              for i in range(60)))
    ok('a.jsonl', '--tokenizer', name, cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/a')
    for split, (tokens, _, sizes) in data.items():
        assert sizes.shape == (meta['vocab_size'],) and np.array_equal(sizes, sizes.round())
        assert sizes[tokens].sum() == meta[f'{split}_bytes'] and sizes[meta['eos_id']] == 1


# --------------------------------------------------------------------------------------------------
# bad input: one line, nothing written, and what was there stays

def test_bad_input(notes):
    ok('notes', '--tokenizer', 'bytes', cwd=notes)
    before = everything(notes / 'data')
    (notes / 'empty.txt').touch()
    (notes / 'latin.txt').write_bytes('naïve'.encode('latin-1'))
    (notes / 'binary.txt').write_bytes(b'text\0text')
    (notes / 'dot.txt').write_text('.')
    (notes / '.hidden').mkdir()
    (notes / '.hidden' / 'a.txt').write_text('some text')
    (notes / 'none').mkdir()
    (notes / 'owt').mkdir()
    for says, *args in [
        ("'missing.txt' is no regular file", 'missing.txt'),
        ("'missing.txt' is no regular file", 'notes', 'missing.txt'),
        ("'*.txt' is no regular file", '*.txt'),
        ('no text in empty.txt', 'empty.txt'),
        ('latin.txt: no UTF-8 text', 'latin.txt'),
        ('too little text', 'dot.txt'),
        ("'none' is no regular file, nor a folder with", 'none'),
        ('notes is there already: remove it, or', 'notes'),
        ('binary.txt: no UTF-8 text', 'binary.txt'),
        ('it holds a NUL byte', 'binary.txt'),
        ("'../up' will not do", 'notes', '--name', '../up'),
        ("'.up' will not do", 'notes', '--name', '.up'),
        ("'' will not do", '.hidden'),
        ('--vocab_size=-1: must be at least 0', 'notes', '--vocab_size', -1),
        ('--val_fraction=0.0: must be between 0 and 1', 'notes', '--val_fraction', 0),
        ('--val_fraction=1.0: must be between', 'notes', '--val_fraction', 1),
        ('--val_fraction', 'notes', '--val_fraction=nan'),
        ('--val_fraction', 'notes', '--val_fraction', 'half'),
        ('--tokenizer', 'notes', '--tokenizer', 'words', '--name', 'x'),
        ('--max_docs=-1: must be', 'notes', '--max_docs=-1'),
        ('--max_docs', 'notes', '--max_docs', 2 ** 63),
        ('--max_tokens', 'notes', '--max_tokens', 2 ** 63),
        ('--vocab_size', 'notes', '--vocab_size', 10 ** 11),
        ('--split is not a setting', 'notes', '--split', 'x'),
        ('--name needs a value', 'notes', '--name'),
        ('dot.txt', 'notes', '--data_dir', 'dot.txt'),
    ]:
        fails(says, *args, cwd=notes)
    command_fails("'missing.txt' is no regular file", 'missing.txt', cwd=notes)
    assert everything(notes / 'data') == before and os.listdir(notes / 'data') == ['notes']


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_a_pipe_is_refused_not_waited_for(tmp_path):
    """Every text is read twice, and this one's writer would never come."""
    (tmp_path / 'notes').mkdir()
    for name in ('a.txt', 'b.jsonl', 'notes/c.md'):
        os.mkfifo(tmp_path / name)
    for name in ('a.txt', 'b.jsonl', 'notes'):
        done = subprocess.run([sys.executable, ROOT / 'prepare.py', name], cwd=tmp_path, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == 1 and not done.stdout
        one_line(done.stderr, 'no regular file')


def test_arguments_that_are_not_utf_8(notes):
    """No name is too strange for a data set; what cannot be printed is escaped."""
    (notes / 'text.txt').write_text('some text ' * 9)
    os.rename(notes / 'text.txt', os.fsencode(notes) + b'/\xff.txt')
    for args in ([b'\xff.txt'], [b'notes', b'--data_dir=\xff'], [b'notes', b'--name', b'\xfe']):
        done = subprocess.run([sys.executable, ROOT / 'prepare.py', *args, '--tokenizer=bytes'],
                              cwd=notes, capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    ok('notes', '--tokenizer', 'bytes', '--name', 'umläut-\u202f字', cwd=notes)
    for name in ('data/umläut-\u202f字', 'data/\udcff', 'data/\udcfe', '\udcff/notes'):
        assert load_data(notes / name)


def test_a_text_is_never_run_as_settings(notes):
    (notes / 'a.py').write_text('open("ran", "w")\n')
    ok('a.py', '--tokenizer', 'bytes', '--name=first', 'a.py', 'a.py', cwd=notes)
    assert not (notes / 'ran').exists()


def test_help_lists_the_settings_and_the_sets(tmp_path):
    said = command(cwd=tmp_path).stdout
    assert all(f'\n{name}: {row[0]} ' in said for name, row in prepare.SETS.items())
    assert '--val_fraction=0.05 ' in said and said == command('--help', cwd=tmp_path).stdout


def test_nothing_is_replaced(notes):
    os.rename(notes / 'notes', notes / 'data')  # data/ holds the user's texts, and would-be targets
    fails('deep is there already', 'data/deep', cwd=notes)
    fails('deep is there already', 'data/a.txt', 'data/b.md', '--name', 'deep', cwd=notes)
    assert (notes / 'data/deep/c.txt').exists()


def test_a_folder_is_named_by_its_name(notes):
    ok('.', '--tokenizer', 'bytes', cwd=notes / 'notes')
    assert load_data(notes / 'notes/data/notes')


@pytest.mark.parametrize('problem', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_what_goes_wrong_while_tokenising_leaves_nothing(notes, monkeypatch, problem):
    ok('notes', '--tokenizer', 'bytes', cwd=notes)
    before = everything(notes / 'data')

    def encode(text):
        if text == 'fourth':
            raise problem
        return list(text.encode())

    decode = lambda ids: 'x'
    tokenizer = Tokenizer(encode, decode, lambda i: 1)
    monkeypatch.setattr(prepare, 'load_tokenizer', lambda *_: tokenizer)
    with pytest.raises(type(problem)):
        ok('notes', '--tokenizer', 'bytes', '--name', 'other', cwd=notes)
    assert everything(notes / 'data') == before and os.listdir(notes / 'data') == ['notes']


def killed_at(call, notes):
    """prepare.py on the notes, in a fork that dies at so many changes of files, as by SIGKILL.
    True if it did die."""
    pid = os.fork()
    if pid == 0:
        left = [call]

        def deadly(function):
            def counted(*args, **more):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return function(*args, **more)
            return counted

        for name in ('rename', 'unlink', 'rmdir', 'mkdir', 'sync'):
            setattr(os, name, deadly(getattr(os, name)))
        Path.write_text = deadly(Path.write_text)
        ok('notes', '--tokenizer', 'bytes', cwd=notes)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_the_whole_set_or_none(notes):
    data = notes / 'data'
    ok('notes', '--tokenizer', 'bytes', '--data_dir', 'other', cwd=notes)
    new = everything(notes / 'other/notes')
    call, found = 0, []
    died = True
    while died:
        call += 1
        died = killed_at(call, notes)
        found.append((data / 'notes').exists())
        if not found[-1]:
            ok('notes', '--tokenizer', 'bytes', cwd=notes)
        assert everything(data / 'notes') == new
        shutil.rmtree(data)
    assert found == sorted(found) and found.count(False) > 3 and found.count(True) > 1


def test_broken_data_sets(home, tmp_path):
    stops('python prepare.py nowhere', load_data, tmp_path / 'nowhere')
    good = everything(home / 'data/play_bytes')
    meta = json.loads(good['meta.json'])

    def broken(says, **files):
        folder = tmp_path / says.split()[0]
        folder.mkdir()
        for name, raw in (good | files).items():
            if raw is not None:
                (folder / name).write_bytes(raw)
        stops(says, load_data, folder)
        stops(f'python prepare.py {folder.name}', load_data, folder)

    wrong = lambda **change: json.dumps(meta | change).encode()
    broken('train.bin', **{'train.bin': None})
    broken('val.bin', **{'val.bin': None})
    broken('meta.json', **{'meta.json': None})
    broken('Expecting', **{'meta.json': good['meta.json'][:-20]})
    broken("KeyError: 'eos_id'", **{'meta.json': wrong().replace(b'eos_id', b'eos')})
    broken('bytes has not 300 tokens', **{'meta.json': wrong(vocab_size=300)})
    broken('bos_id,', **{'meta.json': wrong(bos_id=256)})
    broken('mmap', **{'train.bytes': good['train.bytes'][:-1]})
    broken('no numbers of bytes', **{'train.bytes': good['train.bytes'][:-8] + b'\xff' * 8})   # nan
    broken('argument', **{'meta.json': b'7'})
    n = meta['train_tokens']
    broken(f'{n - 1} tokens, not {n}', **{'train.bin': good['train.bin'][:-2]})
    broken('data', **{'train.bin': good['train.bin'][:-1]})  # half a token
    broken('empty', **{'val.bin': b''})


def test_tokens_that_the_tokenizer_lacks(home):
    folder = home / 'data/play_bytes'
    _, data = load_data(folder)
    check_tokens(data, 256, folder)
    stops('holds token 122, and the vocabulary has 122', check_tokens, data, 122, folder)


def test_fingerprint(home):
    tokens = np.arange(5000, dtype=np.uint16)
    of = lambda train, val: fingerprint({'train': (train, None), 'val': (val, None)})
    prints = [of(tokens, tokens), of(tokens[1:], tokens), of(tokens, tokens[:-1]),
              of(tokens, tokens + 1), of(tokens, tokens[:0]), of(tokens[:0], tokens)]
    assert len(set(prints)) == 6 and of(tokens.copy(), tokens.copy()) == prints[0]
