"""Token files: prepare.py through its command line, and data.py on what it wrote."""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from data import epoch_rows, get_rows, load_data, load_tokenizer, num_rows, same_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT.parent / 'shared' / 'tokenizers' / 'tiktoken_cache'
HARD = ('naïve café — 日本語 🙂🏽\n\n\n  def f(x):\n\treturn "x"  \n\x85\u2028é\x1c\nend\n  \n\nok\r\n'
        ' <|endoftext|>\nok\n')


def run(*args, cwd, **env):
    return subprocess.run([sys.executable, str(ROOT / 'prepare.py'), *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, **env})


def ok(*args, cwd, **env):
    done = run(*args, cwd=cwd, **env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done.stdout


def one_line(text, says):
    assert len(text.splitlines()) == 1 and 'Traceback' not in text and says in text, text


def fails(says, *args, cwd, **env):
    done = run(*args, cwd=cwd, **env)
    assert done.returncode != 0 and not done.stdout
    one_line(done.stderr, says)


def stops(says, function, *args, **more):
    with pytest.raises(SystemExit) as stop:
        function(*args, **more)
    one_line(str(stop.value), says)


def play(words=60_000):
    """Speeches like Tiny Shakespeare's: who, some lines, an empty line."""
    rng, speeches = random.Random(0), []
    lexicon = [''.join(rng.choices('abcdefghiklmnoprstuwy', k=rng.randint(1, 8))) for _ in range(3000)]
    while words > 0:
        lines = [' '.join(rng.choices(lexicon, weights=range(3000, 0, -1), k=7)) for _ in range(rng.randint(1, 6))]
        speeches.append(rng.choice(['ROMEO', 'JULIET', 'First Citizen']) + ':\n' + ',\n'.join(lines) + '.\n')
        words -= 7 * len(lines)
    return '\n'.join(speeches)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def documents(folder, split):
    """The way back: the documents of a split, decoded one by one from its token file."""
    meta, data = load_data(folder)
    ids, decode = np.array(data[split][0]), load_tokenizer(meta, folder).decode
    ends = np.flatnonzero(ids == meta['eos_id'])
    assert ends[-1] == len(ids) - 1  # every document is ended by eos, the last one too
    return [decode(piece[:-1]) for piece in np.split(ids, ends + 1)[:-1]]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with what many tests look at, prepared once: data/play (bpe), data/play_bytes, data/stdlib (bytes)."""
    home = tmp_path_factory.mktemp('home')
    (home / 'play.txt').write_text(play(), encoding='utf-8')
    ok('play.txt', cwd=home)
    ok('play.txt', '--tokenizer', 'bytes', '--name', 'play_bytes', cwd=home)
    ok('stdlib', '--tokenizer', 'bytes', cwd=home)
    return home


@pytest.fixture
def notes(tmp_path):
    """Five texts in a folder, beside things that are not mine to read."""
    for name, text in (('a.txt', 'first'), ('b.md', 'second\n'), ('deep/c.txt', '\ufeffthird\r\nline\r\n'),
                       ('deep/d.TXT', 'fourth'), ('e.txt', 'fifth'),
                       ('blank.txt', ' \n'), ('x.rst', 'no'), ('.git/f.txt', 'no'), ('._a.txt', '\0')):
        path = tmp_path / 'notes' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# what prepare.py writes

@pytest.mark.parametrize('name', ['play', 'play_bytes', 'stdlib'])
def test_meta_says_what_is_there(home, name):
    folder = home / 'data' / name
    meta, data = load_data(folder)
    bpe = name == 'play'
    assert set(os.listdir(folder)) == {'train.bin', 'val.bin', 'meta.json'} | ({'tokenizer.json'} if bpe else set())
    assert (meta['name'], meta['tokenizer'], meta['dtype']) == (name, 'bpe' if bpe else 'bytes', 'uint16')
    assert (meta['bos_id'], meta['eos_id'], meta['pad_id']) == (0, 0, None)
    assert meta['checksum'] == hashlib.sha256(b''.join((folder / f'{s}.bin').read_bytes() for s in data)).hexdigest()
    for split, (tokens, starts) in data.items():
        assert starts is None and tokens.dtype == np.uint16 and len(tokens) == meta[f'{split}_tokens'] > 0
        assert tokens.max() < meta['vocab_size']
        texts = documents(folder, split)
        assert meta[f'{split}_bytes'] == sum(len(text.encode()) + 1 for text in texts)
        if not bpe:
            assert meta[f'{split}_bytes'] == meta[f'{split}_tokens'] and meta['vocab_size'] == 256
    if bpe:
        raw = (folder / 'tokenizer.json').read_bytes()
        assert meta['tokenizer_sha256'] == hashlib.sha256(raw).hexdigest()
        assert 512 < meta['vocab_size'] < 4096  # play.txt is too small for 4096, by the rule in prepare()
        assert meta['vocab_size'] == len(documents(folder, 'train')[0]) // 256 == len(json.loads(raw)['model']['vocab'])
        assert meta['train_bytes'] / meta['train_tokens'] > 2  # it did learn


def test_stdlib_is_split_by_file(home):
    root = Path(sysconfig.get_paths()['stdlib'])
    train, val = (set(documents(home / 'data/stdlib', split)) for split in ('train', 'val'))
    meta, _ = load_data(home / 'data/stdlib')
    assert meta['documents'] >= len(train) + len(val) > 300 and not train & val
    assert 4e6 < meta['train_bytes'] < 3e7 and 0.02 < meta['val_bytes'] / meta['train_bytes'] < 0.1
    read = lambda name: (root / name).read_text(encoding='utf-8')
    for name in ('argparse.py', 'json/decoder.py', 'asyncio/base_events.py', 'wave.py', 'turtle.py', 'zipapp.py'):
        held = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < 0.05
        assert read(name) in (val if held else train)
    left_out = ['encodings/cp437.py', 'pydoc_data/topics.py', 'html/entities.py', 'stringprep.py']
    left_out += ['test/test_bool.py'] if (root / 'test/test_bool.py').exists() else []  # Debian has no tests
    assert not {read(name) for name in left_out} & (train | val)


def test_two_runs_write_the_same_bytes(home):
    ok('play.txt', '--data_dir', 'again', cwd=home)
    ok('stdlib', '--tokenizer', 'bytes', '--data_dir', 'again', cwd=home)
    for name in ('play', 'stdlib'):
        assert everything(home / 'again' / name) == everything(home / 'data' / name)


def test_one_file_is_cut_where_a_paragraph_begins(home):
    (train,), (val,) = (documents(home / 'data/play', split) for split in ('train', 'val'))
    text = play()
    assert train + val == text
    assert train.endswith('.\n\n') and val.split(':')[0] in ('ROMEO', 'JULIET', 'First Citizen')
    assert 0.05 <= len(val) / len(text) < 0.075


def test_one_file_without_paragraphs_or_lines(tmp_path):
    def split(text, val_fraction):
        (tmp_path / 'a').write_text(text)
        parts = prepare.read_files({'a': str(tmp_path / 'a')}, val_fraction, 'text')()
        return [''.join(document) for _, document in parts]
    assert split('line\n' * 100, 0.1) == ['line\n' * 90, 'line\n' * 10]
    assert split('字' * 100, 0.25) == ['字' * 75, '字' * 25]
    assert split('é' * 99, 0.26) == ['é' * 74, 'é' * 25]  # 147 bytes of 198: inside a letter, which stays whole
    train, val = split('One.\n\n' + 'x\n' * 100, 0.1)  # that paragraph is too far away
    assert train + val == 'One.\n\n' + 'x\n' * 100 and 20 <= len(val) <= 22


def test_a_folder_gives_one_document_per_file(notes):
    said = ok('notes', '--tokenizer', 'bytes', '--val_fraction', '0.3', cwd=notes)
    assert 'notes' in said and 'documents: 5' in said
    train, val = (documents(notes / 'data/notes', split) for split in ('train', 'val'))
    names = {'a.txt': 'first', 'b.md': 'second\n', 'deep/c.txt': 'third\nline\n', 'deep/d.TXT': 'fourth',
             'e.txt': 'fifth'}
    held = {n for n in names if int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) / 2**32 < 0.3}
    assert 0 < len(held) < 5  # or this would test nothing
    assert (train, val) == ([names[n] for n in names if n not in held], [names[n] for n in names if n in held])
    # The same files named one by one, in another order and from elsewhere, are the same data.
    (notes / 'else').mkdir()
    ok(*(f'../notes/{n}' for n in reversed(names)), '--name', 'notes', '--tokenizer', 'bytes', '--val_fraction', '0.3',
       cwd=notes / 'else')
    assert everything(notes / 'else/data/notes') == everything(notes / 'data/notes')


@pytest.mark.parametrize('val_fraction', [1e-6, 0.5, 1 - 1e-6])
@pytest.mark.parametrize('n', [2, 3, 20])
def test_neither_split_is_empty(n, val_fraction):
    names = [f'{i}.txt' for i in range(n)]
    val = prepare.held_out(names, val_fraction)
    train = set(names) - val
    assert train and val and val < set(names) and val == prepare.held_out(names[::-1], val_fraction)
    if n == 20:
        assert {1e-6: len(val) == 1, 0.5: 5 < len(val) < 15, 1 - 1e-6: len(train) == 1}[val_fraction]


def test_a_file_that_comes_moves_no_other():
    names = [f'{i}.txt' for i in range(100)]
    before, after = prepare.held_out(names, 0.2), prepare.held_out(names + ['new.txt'], 0.2)
    assert 10 < len(before) < 30 and after - {'new.txt'} == before


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

@pytest.fixture(params=['bytes', 'bpe', 'gpt2'])
def tokenizer(request, home, monkeypatch):
    """(meta, Tokenizer), of each kind."""
    if request.param == 'gpt2':
        if not CACHE.is_dir():
            pytest.skip(f'no GPT-2 BPE files in {CACHE}')
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
        meta, folder = dict(tokenizer='gpt2', vocab_size=50257, bos_id=50256, eos_id=50256), home
    else:
        folder = home / 'data' / {'bytes': 'play_bytes', 'bpe': 'play'}[request.param]
        meta = load_data(folder)[0]
    return meta, load_tokenizer(meta, folder)


def test_round_trip(tokenizer):
    meta, (encode, decode, array) = tokenizer
    for text in (HARD, play(500), '', '\n', 'é' * 3000):
        ids = encode(text)
        assert type(ids) is list and all(0 <= i < meta['vocab_size'] and i != meta['eos_id'] for i in ids)
        assert list(array(text)) == ids
        assert decode(ids) == text == decode(np.array(ids, dtype=np.uint16))


def test_decode_never_fails(tokenizer):
    meta, (encode, decode, _) = tokenizer
    assert decode([]) == ''
    for i in range(meta['vocab_size']):
        assert type(decode([i])) is str
    rng = np.random.default_rng(0)
    for _ in range(100):
        decode(rng.integers(meta['vocab_size'], size=50))
    ids = encode('é')
    if len(ids) > 1:
        assert '\ufffd' in decode(ids[:1])
    assert meta['tokenizer'] != 'bytes' or decode([0xff, 0x41]) == '\ufffdA'


def test_eos_shows_as_an_empty_line(tokenizer):
    meta, (encode, decode, _) = tokenizer
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
    ok('play.txt', '--vocab_size', 257, cwd=notes)  # bytes and eos: no merge at all
    meta, data = load_data(notes / 'data/play')
    assert meta['vocab_size'] == 257 and meta['train_bytes'] == meta['train_tokens']
    ok('notes', cwd=notes)  # so little text has no 512 tokens in it
    assert 257 < load_data(notes / 'data/notes')[0]['vocab_size'] < 512


def test_bpe_never_sees_the_validation_text(tmp_path):
    (tmp_path / 'text.txt').write_text(play(5000) + '\nROMEO:\n' + 'zyzzyva ' * 100)
    ok('text.txt', cwd=tmp_path)
    (train,), (val,) = (documents(tmp_path / 'data/text', split) for split in ('train', 'val'))
    assert 'zyzzyva' in val and 'zyzzyva' not in train
    words = json.loads((tmp_path / 'data/text/tokenizer.json').read_text())['model']['vocab']
    assert not any('zyzz' in word for word in words)


def test_gpt2(home):
    if not CACHE.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {CACHE}')
    ok('play.txt', '--tokenizer', 'gpt2', '--name', 'gpt2', cwd=home, TIKTOKEN_CACHE_DIR=str(CACHE))
    meta, data = load_data(home / 'data/gpt2')
    assert (meta['vocab_size'], meta['bos_id'], meta['eos_id']) == (50257, 50256, 50256)
    tokens, _ = data['train']
    assert tokens[-1] == 50256 and tokens.max() == 50256


def test_gpt2_out_of_reach_is_one_line(notes):
    (notes / 'empty').mkdir()
    dead = {key: 'http://127.0.0.1:9' for key in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy')}
    fails('TIKTOKEN_CACHE_DIR', 'notes', '--tokenizer', 'gpt2', cwd=notes, TIKTOKEN_CACHE_DIR=str(notes / 'empty'),
          NO_PROXY='', no_proxy='', **dead)
    assert not everything(notes / 'data')


def test_tokenizer_errors(tmp_path, monkeypatch):
    meta = dict(eos_id=0)
    stops("'words'", load_tokenizer, meta | dict(tokenizer='words'), tmp_path)
    stops(f'{tmp_path}/tokenizer.json', load_tokenizer, meta | dict(tokenizer='bpe'), tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{"half": ')
    stops(f'{tmp_path}/tokenizer.json', load_tokenizer, meta | dict(tokenizer='bpe'), tmp_path)
    for name, package in (('bpe', 'tokenizers'), ('gpt2', 'tiktoken')):
        monkeypatch.setitem(sys.modules, package, None)
        stops(f'pip install {package}', load_tokenizer, meta | dict(tokenizer=name), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# rows

def test_golden_rows():
    tokens, meta = (np.arange(1, 32, dtype=np.uint16), None), dict(bos_id=98, eos_id=99, pad_id=None)
    assert num_rows(tokens, 16) == 2  # 14 of its own each; 29, 30 and 31 are dropped
    rows = get_rows(tokens, [1, 0, 1], 16, meta)
    assert rows.dtype == np.int64 and rows.tolist() == [
        [98, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 99],
        [98, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 99],
        [98, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 99]]


def test_golden_rows_from_text(tmp_path):
    for name, text in (('a.txt', 'validates'), ('b.txt', 'the quick'), ('c.txt', 'brown fox jumps over')):
        (tmp_path / name).write_text(text)
    ok('a.txt', 'b.txt', 'c.txt', '--tokenizer', 'bytes', cwd=tmp_path)  # sha256('a.txt') is the smallest of the three
    meta, data = load_data(tmp_path / 'data/a')
    assert bytes(data['val'][0].astype(np.uint8)) == b'validates\0'
    assert num_rows(data['train'], 16) == 2
    rows = get_rows(data['train'], np.arange(2), 16, meta)
    assert [bytes(row.astype(np.uint8)) for row in rows] == [b'\0the quick\0brow\0', b'\0n fox jumps ov\0']  # no er\0


def test_same_tokenizer():
    meta = dict(tokenizer='bpe', tokenizer_sha256='a', vocab_size=300)
    assert same_tokenizer(meta, dict(meta)) and same_tokenizer(meta, meta | dict(tokenizer_sha256=None))
    for change in (dict(tokenizer='bert'), dict(tokenizer_sha256='b'), dict(vocab_size=301)):
        assert not same_tokenizer(meta, meta | change)


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
    # However it is asked: in pieces that span epochs, out of order, again, or more epochs than are kept.
    rows = rows.reshape(-1)
    for size in (1, 10, n, 100):
        assert np.array_equal(np.concatenate([epoch_rows(index[i:i + size], n, 3) for i in index[::size]]), rows)
    some = np.random.default_rng(0).permutation(index)
    assert np.array_equal(epoch_rows(some, n, 3), rows[some])


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one line, nothing written, and what was there stays

def test_bad_input(notes):
    ok('notes', '--tokenizer', 'bytes', cwd=notes)
    before = everything(notes / 'data')
    (notes / 'empty.txt').touch()
    (notes / 'binary.txt').write_bytes(b'text\0text')
    (notes / 'latin.txt').write_bytes('naïve'.encode('latin-1'))
    (notes / 'dot.txt').write_text('.')
    (notes / 'none').mkdir()
    (notes / 'stdlib').mkdir()
    (notes / 'stdlib/a.txt').write_text('text')
    for says, *args in [
        ('missing.txt: no such', 'missing.txt'),
        ('missing.txt: no such', 'notes', 'missing.txt'),
        ('empty.txt has no text', 'empty.txt'),
        ('NUL at byte 4', 'binary.txt'),
        ('not UTF-8 from byte 2', 'latin.txt'),
        ('too little text', 'dot.txt'),
        ('none has no text in it (.txt or .md files)', 'none'),
        ("'stdlib' will not do", './stdlib'),
        ("'stdlib' will not do", 'notes', '--name', 'stdlib'),
        ("'' will not do", 'notes', '--name', ''),
        ("'../up' will not do", 'notes', '--name', '../up'),
        ('--vocab_size 256', 'notes', '--vocab_size', 256),
        ('--vocab_size 65536', 'notes', '--vocab_size', 65536),
        ('--vocab_size is for bpe', 'notes', '--vocab_size', 300, '--tokenizer', 'bytes'),
        ('--val_fraction 0.0', 'notes', '--val_fraction', 0),
        ('--val_fraction 1.0', 'notes', '--val_fraction', 1),
        ('--val_fraction nan', 'notes', '--val_fraction', 'nan'),
        ('--val_fraction', 'notes', '--val_fraction', 'half'),
        ('--tokenizer', 'notes', '--tokenizer', 'words'),
        ('dot.txt', 'notes', '--data_dir', 'dot.txt'),
        ('required', ),
    ]:
        fails(says, *args, cwd=notes)
    assert everything(notes / 'data') == before and os.listdir(notes / 'data') == ['notes']


def test_a_folder_that_is_not_ours_is_not_replaced(notes):
    os.rename(notes / 'notes', notes / 'data')  # data/ holds the user's texts, and would-be targets
    fails('deep holds c.txt', 'data/deep', cwd=notes)
    fails('deep holds c.txt', 'data/a.txt', 'data/b.md', '--name', 'deep', cwd=notes)
    assert (notes / 'data/deep/c.txt').exists()


def test_a_new_set_replaces_the_old_one_whole(notes):
    ok('notes', cwd=notes)
    assert (notes / 'data/notes/tokenizer.json').exists()
    ok('notes', '--tokenizer', 'bytes', cwd=notes)
    assert load_data(notes / 'data/notes')[0]['tokenizer'] == 'bytes'
    assert not (notes / 'data/notes/tokenizer.json').exists() and os.listdir(notes / 'data') == ['notes']


def test_an_interrupt_while_writing_keeps_the_old_set(notes, monkeypatch, capsys):
    monkeypatch.chdir(notes)
    prepare.prepare(['notes'], tokenizer='bytes')
    before, encode, seen = everything('data'), prepare.load_tokenizer(dict(tokenizer='bytes', eos_id=0), '').encode, []

    def interrupted(text):
        if len(seen) == 2:
            raise problem
        seen.extend(path for path in Path('data').glob('*/*/train.bin'))
        return encode(text)

    monkeypatch.setattr(prepare, 'load_tokenizer', lambda *_: prepare.argparse.Namespace(array=interrupted))
    monkeypatch.setattr(sys, 'argv', ['prepare.py', 'notes', '--tokenizer', 'bytes'])
    for problem, says in ((KeyboardInterrupt(), 'stopped'), (OSError(28, 'No space left on device'), 'No space left')):
        seen.clear()
        stops(says, prepare.main)
        assert len(seen) == 2 and everything('data') == before and os.listdir('data') == ['notes']


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs a named pipe to hold prepare.py up')
def test_ctrl_c_is_one_line(tmp_path):
    os.mkfifo(tmp_path / 'slow.txt')
    process = subprocess.Popen([sys.executable, str(ROOT / 'prepare.py'), 'slow.txt'], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # a background job would ignore SIGINT
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pipe = None
    while pipe is None and process.poll() is None:  # until prepare.py has opened it, too, and waits for text
        try:
            pipe = os.open(tmp_path / 'slow.txt', os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    os.close(pipe)
    assert process.returncode != 0 and not out
    one_line(err, 'stopped: nothing was written')


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
    broken('lacks eos_id', **{'meta.json': wrong().replace(b'eos_id', b'eos')})
    broken('uint8,', **{'meta.json': wrong(dtype='uint8')})
    broken('argument', **{'meta.json': b'7'})
    broken(f'{meta["train_tokens"] - 1} tokens, not {meta["train_tokens"]}', **{'train.bin': good['train.bin'][:-2]})
    broken('data', **{'train.bin': good['train.bin'][:-1]})  # half a token
    broken('empty', **{'val.bin': b'', 'meta.json': wrong(val_tokens=0)})
