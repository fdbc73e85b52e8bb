"""Published sets, tokenizers, records, workers, and what goes wrong: prepare.py as users run it, the hub on a disk."""
import base64
import gzip
import hashlib
import http.server
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import prepare
import train
from checkpoint import load_model
from data import get_rows, load_data, load_tokenizer, loss_mask, num_rows, words_per_row
from diffusion import evaluate, loss_of, mean_and_error
from helpers import ROOT, TINY, good
from helpers import run as script
from model import DiT, DiTConfig
from test_data import CACHE, everything, fails, ok, one_line, stops

VOCAB = CACHE.parent / 'bert-base-uncased-vocab.txt'
STAND_IN = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz0123456789.,!?-\'"$:中文',
            *('##' + c for c in 'abcdefghijklmnopqrstuvwxyz'), 'the', 'quick', 'brown', 'fox', 'cafe', '##ing', 'naive']
WORDS = 'the quick brown fox jumps over a lazy dog and runs away'.split()


def lines(n, start=0):
    return [f'{" ".join(WORDS[i % 5:i % 5 + 2 + i % 7])} , number {i} .' for i in range(start, start + n)]


def put(home, name, **texts):
    """Lay a published set of these texts where huggingface_hub keeps what it has fetched."""
    repo, *patterns, column = prepare.SETS[name][:4]
    revision = commit = prepare.REVISIONS[repo]
    folder = home / 'hub' / f'datasets--{repo.replace("/", "--")}'
    if '/' in revision:
        commit = 'c0ffee' * 6 + 'abcd'
        (folder / 'refs' / revision).parent.mkdir(parents=True, exist_ok=True)
        (folder / 'refs' / revision).write_text(commit)
    for part, pattern in zip(('train', 'val'), patterns):
        if '*' in pattern:
            half = len(texts[part]) // 2
            for i, some in enumerate((texts[part][:half], texts[part][half:])):
                path = folder / 'snapshots' / commit / pattern.replace('test*', 'test').replace('*', '')
                path = (path.with_name(f'{path.name}{i:05}-of-00002.parquet') if '-' in pattern else
                        path / f'{i:04}.parquet')
                path.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pyarrow.table({'id': range(len(some)), column: some}), path)


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A folder with every published set, as HF_HOME: 200 documents to train on, 50 to validate, BERT's vocabulary."""
    home = tmp_path_factory.mktemp('hub')
    for name in prepare.SETS:
        put(home, name, train=lines(200), val=lines(50, 1000))
    put(home, 'text8', train=['the quick brown fox ' * 100, ''], val=['jumps over ' * 20, ''])
    vocab = home / 'hub/models--bert-base-uncased/snapshots' / prepare.BERT[1] / 'vocab.txt'
    vocab.parent.mkdir(parents=True)
    vocab.write_text('\n'.join(STAND_IN) + '\n')
    return home


@pytest.fixture
def offline(hub, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    return dict(HF_HOME=str(hub), HF_HUB_OFFLINE='1')


def as_words(texts):
    """The token file of texts in bytes."""
    return np.array([i for text in texts for i in text.encode() + b'\0'], dtype=np.uint16).tobytes()


def decoded(folder, split):
    meta, data = load_data(folder)
    return load_tokenizer(meta, folder).decode(data[split][0])


# ---------------------------------------------------------------------------------------------------------------------
# published sets

@pytest.fixture(scope='module')
def zeroshot(hub):
    """A folder with all zero-shot sets, made by one command."""
    if not CACHE.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {CACHE}')
    env = os.environ | dict(HF_HOME=str(hub), HF_HUB_OFFLINE='1', TIKTOKEN_CACHE_DIR=str(CACHE))
    done = subprocess.run([sys.executable, str(ROOT / 'prepare.py'), 'zeroshot'], cwd=hub, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 8
    assert set(os.listdir(hub / 'data')) == set(prepare.ZEROSHOT)
    return hub / 'data'


@pytest.mark.parametrize('name', prepare.SETS)
def test_every_set_by_its_rules(request, tmp_path, offline, name):
    repo, train_files, val_files, _, tokenizer, rule, kind, *_ = prepare.SETS[name]
    if rule == 'joined':
        folder = request.getfixturevalue('zeroshot') / name
    elif tokenizer == 'gpt2' and not CACHE.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {CACHE}')
    else:
        ok(name, cwd=tmp_path, **offline)
        folder = tmp_path / 'data' / name
    meta, data = load_data(folder)
    assert (meta['rule'], meta['source']) == (rule, repo) and len(meta['revision']) == 40
    assert meta['revision'] == prepare.REVISIONS[repo] or prepare.REVISIONS[repo] == 'refs/convert/parquet'
    counts = {'last': (180, 20), 'some': (meta['train_documents'], 200 - meta['train_documents'])}
    expected = counts.get(val_files, (200 if '*' in train_files else 0, 50)) if name != 'text8' else (2, 2)
    assert (meta['train_documents'], meta['val_documents']) == expected and meta['documents'] == sum(expected)
    if name == 'text8':
        assert meta['vocab_size'] == 28 and decoded(folder, 'val') == 'jumps over ' * 20 + '\n\n\n\n'
        return
    texts = {'last': lines(20, 180), 'some': [t for i, t in enumerate(lines(200)) if prepare.score(str(i)) < 0.05]}
    texts = [prepare.detokenise(text, kind) for text in texts.get(val_files, lines(50, 1000))]
    assert meta['val_bytes'] == sum(len(t.encode()) + (rule != 'joined') for t in texts)
    encode, eos = load_tokenizer(meta, folder).encode, meta['eos_id']
    tokens, starts = data['val']
    assert tokens.tolist() == sum((encode(t) + [eos] * (rule == 'packed') for t in texts), [])
    if rule == 'padded':
        assert starts.tolist() == [0, *np.cumsum([len(encode(t)) for t in texts])]
    else:
        assert starts is None and meta['bos_id'] == meta['eos_id'] and meta['pad_id'] is None


def test_a_zero_shot_set_has_nothing_to_train_on(zeroshot):
    stops('0 tokens fill no row', num_rows, load_data(zeroshot / 'ptb')[1]['train'], 16)


def test_some_documents_of_a_set_under_another_name_and_tokenizer(tmp_path, offline):
    ok('owt', '--max_docs', 50, '--name', 'owt_t4', '--tokenizer', 'bytes', cwd=tmp_path, **offline)
    assert decoded(tmp_path / 'data/owt_t4', 'val') == ''.join(text + '\n\n' for text in lines(5, 45))
    fails('9 documents are too few', 'owt', '--max_docs', 9, '--tokenizer', 'bytes', cwd=tmp_path, **offline)
    ok('fineweb_edu', '--max_tokens', 10, '--tokenizer', 'bytes', cwd=tmp_path, **offline)
    fails('has no [PAD]', 'lm1b', '--tokenizer', 'bytes', cwd=tmp_path, **offline)


def test_the_list_of_sets(tmp_path):
    said = subprocess.run([sys.executable, str(ROOT / 'prepare.py'), '--list'], capture_output=True, text=True).stdout
    for (name, row), line in zip(prepare.SETS.items(), said.splitlines()[1:], strict=True):
        assert line.split() == [name, *row, prepare.REVISIONS[row[0]]]


def test_a_hub_corpus_of_any_name(tmp_path, hub, offline):
    folder = tmp_path / 'hf'
    shutil.copytree(hub, folder)
    main = folder / 'hub/datasets--me--mine'
    (main / 'refs').mkdir(parents=True)
    (main / 'refs/main').write_text('abcdef0123' * 4)
    files = main / 'snapshots' / ('abcdef0123' * 4)
    (files / 'part').mkdir(parents=True)
    (files / 'part/train-0.jsonl').write_text(''.join(json.dumps({'body': text}) + '\n' for text in lines(100)))
    (files / 'part/test-0.jsonl').write_text(json.dumps({'body': 'never'}) + '\n')
    env = offline | dict(HF_HOME=str(folder))
    ok('hf:me/mine', '--text_key', 'body', '--tokenizer', 'bytes', cwd=tmp_path, **env)
    meta, _ = load_data(tmp_path / 'data/mine')
    assert (meta['documents'], meta['source'], meta['revision']) == (100, 'me/mine', 'abcdef0123' * 4)
    for says, *args in [('--split', 'hf:me/mine', '--split', 'validation'), ('--split', 'hf:me/mine/other/*'),
                        ("no text under 'text' (--text_key)", 'hf:me/mine'), ('HF_HOME', 'hf:nobody/nothing'),
                        ('HF_HOME', 'hf:me/mine', '--revision', 'other')]:
        fails(says, *args, cwd=tmp_path, **env)
    fails('HF_HOME', 'owt', cwd=tmp_path, **env | dict(HF_HOME=str(tmp_path / 'none')))
    fails('HF_HOME', 'lm1b', cwd=tmp_path, **env | dict(HF_HOME=str(main)))
    next((folder / 'hub').glob('*openwebtext/snapshots/*/*/*00001-of*')).unlink()
    fails('lacks files: 1 of plain_text/train-*', 'owt', '--tokenizer', 'bytes', cwd=tmp_path, **env)
    assert os.listdir(tmp_path / 'data') == ['mine']


def test_a_mirror_is_asked_only_for_the_files_that_are_needed(tmp_path, hub):
    """A hub of my own, at HF_ENDPOINT: owt's first file holds 100 documents."""
    root = next(hub.glob('hub/*openwebtext/snapshots/*'))
    names, asked = sorted(p.relative_to(root).as_posix() for p in root.rglob('*.parquet')), []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.split(f'/resolve/{root.name}/')[-1]
            files = [{'rfilename': name} for name in names]
            raw = json.dumps(dict(id='Skylion007/openwebtext', sha=root.name, siblings=files))
            raw = (root / name).read_bytes() if name in names else raw.encode()
            self.send_response(200)
            for header in (('Content-Length', len(raw)), ('ETag', f'"{hashlib.sha256(raw).hexdigest()}"'),
                           ('X-Repo-Commit', root.name)):
                self.send_header(*map(str, header))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(raw)
        do_HEAD = do_GET
        log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(HF_HOME=str(tmp_path / 'hf'), HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HUB_OFFLINE='0',
               HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    args = 'owt', '--tokenizer', 'bytes', '--max_docs'
    ok(*args, 50, cwd=tmp_path, **env)
    assert names[0] in str(asked) and names[1] not in str(asked)
    ok(*args, 150, cwd=tmp_path, **env)
    server.shutdown()
    assert names[1] in str(asked)
    meta, _ = load_data(tmp_path / 'data/owt')
    assert (meta['documents'], meta['val_documents'], meta['revision']) == (150, 15, root.name)
    ok(*args, 200, cwd=tmp_path, **env | dict(HF_HUB_OFFLINE='1'))  # what is fetched stays


@pytest.mark.parametrize('kind, text, plain', [
    ('wikitext', ' = Robert <unk> = \n', ' = Robert <unk> =\n'),
    ('wikitext', ' a guest @-@ star in a play , which cost 1 @,@ 000 \n', ' a guest-star in a play, which cost 1,000\n'),
    ('wikitext', ' the " Eagle " ( 1 @.@ 5 m ) : it \'s here ; so ? \n', ' the "Eagle" (1.5 m): it\'s here; so?\n'),
    ('wikitext', " the boys ' [ sic ] songs . See = = Plot = = \n", " the boys' [sic] songs. See == Plot ==\n"),
    ('wikitext', ' at 20 ° C , N N N votes ! ', ' at 20°C, 1 N 1 votes! '),  # as published: each second one
    ('ptb', "mr. <unk> is n't chairman of the n.v. group 's board", "mr. ? isn't chairman of the n.v. group's board"),
    ('ptb', "rose N N to $ N , the traders ' # N and 3\\/4", "rose 1 1 to $1 , the traders' #1 and 3/4"),
    ('lm1b', 'The U.S. Centers said " it is new " , he \'s sure .', 'The U.S. Centers said "it is new", he\'s sure.'),
    ('lm1b', 'Who ( or what ) ? At http : / / a.com : $ 5 / h ; now !', 'Who (or what)? At http://a.com: $5/h; now!'),
    ('lm1b', 'a b . c . d [ x y ] £ 5 .', 'a b. c . d [x y] £5.'),
    ('lambada', ' “ Yes , ” he said .  ', '\n" Yes , " he said .'),
    ('papers', 'study @xmath0 ( see fig . [ f1 ] ) .\nit \'s " new "', 'study @xmath0 (see fig. [f1]) .\nit\'s "new"'),
    ('-', 'AG news , as it is .', 'AG news , as it is .'),
])
def test_detokenisers(kind, text, plain):
    assert prepare.detokenise(text, kind) == plain


# ---------------------------------------------------------------------------------------------------------------------
# golden rows at T = 16

DOCUMENTS = ['Hello world!', 'The quick brown fox', 'the ' * 17 + 'end']


def prepared(tmp_path, offline, name, texts):
    """Prepare a published set that has these documents, to train and to validate."""
    home = tmp_path / 'home'
    put(home, name, train=texts, val=texts)
    env = offline | dict(HF_HOME=str(home))
    ok(name, *(['--tokenizer', str(VOCAB)] if name.startswith('lm1b') else []), cwd=tmp_path, **env)
    return load_data(tmp_path / 'data' / name)


def test_max_docs_leaves_a_published_validation_whole(tmp_path, offline):
    home = tmp_path / 'home'
    put(home, 'text8', train=['a b', 'c d', 'e f'], val=['g h', 'i j'])
    env = offline | dict(HF_HOME=str(home))
    ok('text8', '--max_docs', '2', cwd=tmp_path, **env)
    meta, _ = load_data(tmp_path / 'data/text8')
    assert (meta['train_documents'], meta['val_documents']) == (2, 2)
    fails('--max_docs', 'text8', '--max_tokens', '5', cwd=tmp_path, **env)


def test_golden_rows_of_bert(tmp_path, offline):
    if not VOCAB.exists():
        pytest.skip(f'no BERT vocabulary at {VOCAB}')
    the, quick, brown, fox, hello, world, bang, end = 1996, 4248, 2829, 4419, 7592, 2088, 999, 2203
    meta, data = prepared(tmp_path, offline, 'lm1b', DOCUMENTS)
    assert (meta['vocab_size'], meta['bos_id'], meta['eos_id'], meta['pad_id']) == (30522, 101, 102, 0)
    assert num_rows(data['val'], 16) == num_rows(data['val'], 4) == 3
    rows = get_rows(data['val'], [2, 0, 1], 16, meta)
    assert rows.dtype == np.int64 and rows.tolist() == [
        [101] + [the] * 14 + [102],  # three the's and end are dropped
        [101, hello, world, bang, 102] + [0] * 11,
        [101, the, quick, brown, fox, 102] + [0] * 10]
    assert get_rows(data['val'], [1], 4, meta).tolist() == [[101, the, quick, 102]]
    assert words_per_row(data['val'], range(3), 16) == 7 and words_per_row(data['val'], [1], 16) == 4
    text = load_tokenizer(meta, tmp_path / 'data/lm1b').decode(rows[1])
    assert text.strip() == 'hello world!'  # no [CLS], no [PAD]
    meta, data = prepared(tmp_path, offline, 'lm1b_packed', DOCUMENTS)
    assert (meta['bos_id'], meta['eos_id'], meta['pad_id']) == (101, 101, None)
    assert num_rows(data['val'], 16) == 2
    assert get_rows(data['val'], [0, 1], 16, meta).tolist() == [
        [101, hello, world, bang, 101, the, quick, brown, fox, 101, the, the, the, the, the, 101],
        [101] + [the] * 12 + [end, 101, 101]]  # the document's end, then the row's; nothing is left to drop


def test_golden_rows_of_gpt2(tmp_path, offline):
    if not CACHE.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {CACHE}')
    eos, (hello, world, bang), (the, quick, brown, fox) = 50256, (15496, 995, 0), (464, 2068, 7586, 21831)
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in DOCUMENTS[:2] * 12))
    ok('d.jsonl', '--tokenizer', 'gpt2', '--val_fraction', 1e-9 + min(prepare.score(str(i)) for i in range(24)),
       cwd=tmp_path, **offline)
    meta, data = load_data(tmp_path / 'data/d')
    assert (meta['train_documents'], meta['val_documents']) == (23, 1)
    first = min(range(24), key=lambda i: prepare.score(str(i)))
    documents = [[hello, world, bang], [the, quick, brown, fox]] * 12
    assert data['val'][0].tolist() == documents.pop(first) + [eos]
    stream = sum((words + [eos] for words in documents), [])
    assert get_rows(data['train'], [0, 1], 16, meta).tolist() == [
        [eos, *stream[:14], eos], [eos, *stream[14:28], eos]]
    meta, data = prepared(tmp_path, offline, 'ag_news', ['Hello world!'] * 6)  # zero-shot: no eos between documents
    assert get_rows(data['val'], [0], 16, meta).tolist() == [[eos, *([hello, world, bang] * 5)[:14], eos]]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

CJK = ((0x4e00, 0x9fff), (0x3400, 0x4dbf), (0x20000, 0x2a6df), (0x2a700, 0x2b73f), (0x2b740, 0x2b81f),
       (0x2b820, 0x2ceaf), (0xf900, 0xfaff), (0x2f800, 0x2fa1f))


def word_pieces(text, vocab):
    """BERT's uncased tokenizer, as its paper's code defines it, slowly."""
    out = ''
    for c in text:
        kind = unicodedata.category(c)
        if c in '\t\n\r' or kind == 'Zs':
            out += ' '
        elif ord(c) in (0, 0xfffd) or kind[0] == 'C':
            continue
        elif any(a <= ord(c) <= b for a, b in CJK):
            out += f' {c} '
        else:
            out += c
    out = ''.join(c for c in unicodedata.normalize('NFD', out) if unicodedata.category(c) != 'Mn').lower()
    out = ''.join(f' {c} ' if unicodedata.category(c)[0] == 'P' or c.isascii() and c.isprintable() and not c.isalnum()
                  and c != ' ' else c for c in out)
    ids = []
    for word in out.split():
        found, at = [], 0
        while at < len(word) <= 100:
            end = next((e for e in range(len(word), at, -1) if '##' * (at > 0) + word[at:e] in vocab), None)
            if end is None:
                break
            found.append(vocab['##' * (at > 0) + word[at:end]])
            at = end
        ids += found if at == len(word) else [vocab['[UNK]']]
    return ids


@pytest.mark.parametrize('real', [False, True], ids=['stand-in', 'bert'])
def test_bert_is_the_reference_word_piece(tmp_path, real):
    if real and not VOCAB.exists():
        pytest.skip(f'no BERT vocabulary at {VOCAB}')
    (tmp_path / 'vocab.txt').write_text(VOCAB.read_text() if real else '\n'.join(STAND_IN) + '\n')
    words = (tmp_path / 'vocab.txt').read_text().splitlines()
    vocab = dict(zip(words, range(len(words))))
    (tmp_path / 'text.txt').write_text('The quick brown fox.\n' * 9)
    ok('text.txt', '--tokenizer', 'vocab.txt', cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/text')
    assert (meta['tokenizer'], meta['vocab_size'], meta['pad_id']) == ('bert', len(words), None)
    encode, *_ = load_tokenizer(meta, tmp_path / 'data/text')
    for text in ('The quick brown fox!', 'Café NAÏVE, résumé', '中文quick中', 'a🙂b 🏽 e\u0301', 'ÅÄÖ ß İ ǆ', '[SEP] [MASK]',
                 'tab\tnew\nline\x00\x07\u200bx', 'x' * 100 + ' ' + 'y' * 101, "don't-stop... $5: #1", '\ufffdﬁ ½ ² ™',
                 '\u3000wide\xa0space\u2028line', '한국어 ひらがな ไทย', 'caféing unaffable jumping', 'end \ue000\U000e0001.'):
        assert encode(text) == word_pieces(text, vocab), text


def test_characters(tmp_path):
    (tmp_path / 'text.txt').write_text('one two\n' * 50 + 'naïve\n' * 3)  # what validates has two letters of its own
    ok('text.txt', '--tokenizer', 'char', cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/text')
    encode, decode, _ = load_tokenizer(meta, tmp_path / 'data/text')
    assert meta['vocab_size'] == 2 + len(set('one two\n')) and meta['tokenizer_sha256']
    assert decode(data['train'][0]).startswith('one two\none') and decode(encode('a tent')) == '\ufffd tent'
    assert '\ufffd' in decode(data['val'][0]) and data['train'][0][-1] == meta['eos_id'] == 0
    (tmp_path / 'data/text/tokenizer.json').write_text(json.dumps(['\0', 'a', 'b']))
    meta.update(tokenizer_sha256=None, vocab_size=3)
    stops("'c' is none of the 3 characters", load_tokenizer(meta, tmp_path / 'data/text').encode, 'abc')


@pytest.mark.parametrize('name, size', [('r50k_base', 50257), ('cl100k_base', 100277)])
def test_a_tiktoken_file(tmp_path, name, size):
    ranks = [bytes([i]) for i in range(256)] + [b'he', b'the', b' the', '字'.encode()[:2]]
    rows = (f'{base64.b64encode(word).decode()} {i}\n' for i, word in enumerate(ranks))
    (tmp_path / f'{name}.tiktoken').write_text(''.join(rows))
    (tmp_path / 'text.txt').write_text('The other the, the 字\n' * 20)
    ok('text.txt', '--tokenizer', f'{name}.tiktoken', cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/text')
    encode, decode, _ = load_tokenizer(meta, tmp_path / 'data/text')
    assert (meta['tokenizer'], meta['vocab_size']) == ('tiktoken', size)
    assert meta['dtype'] == ('uint16' if size < 65536 else 'uint32')
    assert data['train'][0].dtype == meta['dtype'] and data['train'][0][-1] == meta['eos_id'] > 50000
    assert encode('the the') == [257, 258] and decode(encode('字 the')) == '字 the'
    assert decode(data['train'][0]).startswith('The other the, the 字\nThe')
    for i in (*range(250, 300), *range(size - 30, size)):  # ids that no word has are passed over
        assert type(decode([i])) is str


def test_any_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({'a': 0, 'b': 1, '?': 2, '<s>': 3, '</s>': 4}, unk_token='?'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(2)
    words.enable_padding(length=9)
    words.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'text.txt').write_text('a b c\n' * 20)
    ok('text.txt', '--tokenizer', 'tokenizer.json', cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/text')
    assert (meta['vocab_size'], meta['bos_id'], meta['eos_id']) == (5, 3, 4)
    assert data['train'][0].tolist() == [0, 1, 2] * 19 + [4]
    (tmp_path / 'none.json').write_text((tmp_path / 'tokenizer.json').read_text().replace('</s>', 'end'))
    (tmp_path / 'half.json').write_text('{"half": ')
    (tmp_path / 'vocab.txt').write_text('a\nb\n')
    (tmp_path / 'my.tiktoken').write_text('YQ== 0\n')
    for name, says in (('none.json', 'no token that ends a document'), ('half.json', 'half.json'),
                       ('vocab.txt', 'vocab.txt'), ('my.tiktoken', 'cl100k_base'), ('missing.json', 'missing.json'),
                       ('words', 'bytes, char, bpe')):
        fails(says, 'text.txt', '--tokenizer', name, cwd=tmp_path)


@pytest.mark.parametrize('tokenizer', ['gpt2', 'bpe', 'bert'])
def test_pieces_of_a_document_give_the_tokens_of_the_whole(tmp_path, monkeypatch, tokenizer):
    if tokenizer == 'gpt2' and not CACHE.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {CACHE}')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    text = (ROOT / 'train.py').read_text() + 'naïve 字 \u3000 x\u2028y  \n\n z ' * 50
    (tmp_path / 'vocab.txt').write_text('\n'.join(STAND_IN))
    kind = str(tmp_path / 'vocab.txt') if tokenizer == 'bert' else tokenizer
    meta = prepare.make_tokenizer(kind, None, lambda: [text], tmp_path / 'tokenizer.json', 'packed')
    encode = load_tokenizer(meta, tmp_path).encode
    monkeypatch.setattr(prepare, 'BATCH', 300)
    monkeypatch.setattr(prepare, 'WINDOW', 200)
    cut = list(prepare.pieces([text[:5000], text[5000:]]))
    assert len(cut) > 50 and max(len(piece) for piece, _ in cut) <= 300 and ''.join(piece for piece, _ in cut) == text
    assert [ends for _, ends in cut] == [False] * (len(cut) - 1) + [True]
    assert sum((encode(piece) for piece, _ in cut), []) == encode(text)
    assert [len(piece) for piece, _ in prepare.pieces(['x' * 700])] == [300, 300, 100]  # no place is safe


# ---------------------------------------------------------------------------------------------------------------------
# your own corpora

def test_every_kind_of_record_file_is_the_same_corpus(tmp_path):
    texts = ['first', '', 'naïve 字\r\n', '\ud800 half a letter', *lines(60)]
    raw = ''.join(json.dumps({'body': text}) + '\n\n' for text in texts).encode()
    (tmp_path / 'a.jsonl').write_bytes(raw)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(raw[:90]) + gzip.compress(raw[90:]))
    with pyarrow.CompressedOutputStream(str(tmp_path / 'c.jsonl.zst'), 'zstd') as file:
        file.write(raw)
    texts[3] = '? half a letter'  # parquet holds none
    pyarrow.parquet.write_table(pyarrow.table({'n': range(64), 'body': texts}), tmp_path / 'd.parquet')
    for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst', 'd.parquet'):
        ok(name, '--text_key', 'body', '--tokenizer', 'bytes', '--name', name[0], '--val_fraction', 0.2, cwd=tmp_path)
    sets = [everything(tmp_path / 'data' / name) for name in 'abcd']
    assert all(sets[0][f] == other[f] for other in sets for f in ('train.bin', 'val.bin'))
    held = [int(hashlib.sha256(str(i).encode()).hexdigest()[:8], 16) / 2**32 < 0.2 for i in range(64)]
    for part, side in (('train', False), ('val', True)):
        assert sets[0][f'{part}.bin'] == as_words(t for t, h in zip(texts, held) if h == side)
    # all of them, by folder and by glob, are one corpus whose documents are counted on
    (tmp_path / 'all').mkdir()
    shutil.copy(tmp_path / 'a.jsonl', tmp_path / 'all')
    shutil.copy(tmp_path / 'd.parquet', tmp_path / 'all')
    (tmp_path / 'all/e.txt').write_text('a text among records')
    ok('all', '--text_key', 'body', '--tokenizer', 'bytes', cwd=tmp_path)
    ok('all/*', '--text_key', 'body', '--tokenizer', 'bytes', '--name', 'glob', cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/all')
    assert meta['documents'] == 129 and everything(tmp_path / 'data/all')['train.bin'] == everything(
        tmp_path / 'data/glob')['train.bin']


def test_records_that_are_none(tmp_path):
    (tmp_path / 'key.jsonl').write_text('{"text": "fine"}\n{"body": "x"}\n')
    (tmp_path / 'number.jsonl').write_text('{"text": 7}\n')
    (tmp_path / 'json.jsonl').write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / 'latin.jsonl').write_bytes('{"text": "naïve"}\n'.encode('latin-1'))
    (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(os.urandom(9999))[:-50])
    (tmp_path / 'no.jsonl.zst').write_bytes(b'no')
    (tmp_path / 'no.parquet').write_bytes(b'no')
    pyarrow.parquet.write_table(pyarrow.table({'body': ['x']}), tmp_path / 'column.parquet')
    pyarrow.parquet.write_table(pyarrow.table({'text': ['x', None]}), tmp_path / 'null.parquet')
    (tmp_path / 'empty.jsonl').write_text('\n')
    (tmp_path / 'blank.jsonl').write_text('{"text": ""}\n' * 99)
    for name, says in (('key.jsonl', 'in record 2 (KeyError'), ('number.jsonl', 'in record 1'),
                       ('json.jsonl', 'in record 2'), ('latin.jsonl', 'in record 1 (UnicodeDecodeError'),
                       ('cut.jsonl.gz', 'cut.jsonl.gz'), ('no.jsonl.zst', 'no.jsonl.zst'), ('no.parquet', 'no.parquet'),
                       ('column.parquet', "['body']"), ('null.parquet', 'in record 2'), ('*.json', 'no such file'),
                       ('empty.jsonl', 'too little text'), ('blank.jsonl', 'too little text')):
        fails(says, name, '--tokenizer', 'bytes', '--name', 'x', cwd=tmp_path)
    assert os.listdir(tmp_path / 'data') == []


def test_blocks_of_a_file(tmp_path, monkeypatch):
    raw = '\ufeffone\r\ntwo\r字🙂\r\n\ufeff'.encode() + b'end\r'
    (tmp_path / 'text').write_bytes(raw)
    for size in range(1, 12):
        monkeypatch.setattr(prepare, 'BATCH', size)
        assert ''.join(prepare.blocks(tmp_path / 'text')) == 'one\ntwo\r字🙂\n\ufeffend\r'
        assert ''.join(prepare.blocks(tmp_path / 'text', 8, 11)) == 'two'
        for bad, at in ((raw[:20] + b'\xff' + raw[20:], 20), (raw[:14], 12)):
            (tmp_path / 'bad').write_bytes(bad)
            stops(f'bad is not UTF-8 from byte {at} on', list, prepare.blocks(tmp_path / 'bad'))
        (tmp_path / 'bad').write_bytes(raw + b'\0')
        stops(f'NUL at byte {len(raw)}', list, prepare.blocks(tmp_path / 'bad'))


# ---------------------------------------------------------------------------------------------------------------------
# workers, and what stops them

def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    texts = [f'{i} ' * (i % 800) for i in range(6000)]  # 12 MB: more than one process keeps to itself
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    for workers in (1, 2, 3):
        ok('d.jsonl', '--tokenizer', 'bytes', '--workers', workers, '--data_dir', f'data{workers}', cwd=tmp_path)
    assert everything(tmp_path / 'data1') == everything(tmp_path / 'data2') == everything(tmp_path / 'data3')
    held = [prepare.score(str(i)) < 0.05 for i in range(6000)]
    assert (tmp_path / 'data2/d/val.bin').read_bytes() == as_words(t for t, h in zip(texts, held) if h)


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='looks at processes in /proc')
PEAK = 'import prepare; prepare.main(); print(*(row.split()[1] for row in open("/proc/self/status") if "VmHWM" in row))'


@needs_proc
def test_one_line_of_100_mb_in_flat_memory(tmp_path):
    peaks = []
    for megabytes in (10, 100):
        (tmp_path / 'line.txt').write_text('0123 5678 ' * (megabytes * 100_000))
        args = sys.executable, '-c', PEAK, 'line.txt', '--tokenizer', 'bytes', '--workers', '2'
        done = subprocess.run(args, text=True, cwd=tmp_path, capture_output=True,
                              env=os.environ | dict(PYTHONPATH=str(ROOT)))
        assert done.returncode == 0 and not done.stderr, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 30, peaks  # MB, of the process that reads and writes
    meta, data = load_data(tmp_path / 'data/line')
    assert meta['train_bytes'] + meta['val_bytes'] == 100_000_002
    assert bytes(data['train'][0][:10].astype(np.uint8)) == b'0123 5678 '


@pytest.fixture
def busy(tmp_path):
    """prepare.py, stopped in the middle: its workers run, and tokens are on the disk."""
    (tmp_path / 'big.jsonl').write_text((json.dumps({'text': 'x' * 2 ** 19}) + '\n') * 160)
    args = sys.executable, str(ROOT / 'prepare.py'), 'big.jsonl', '--tokenizer', 'bytes', '--workers', '2'
    process = subprocess.Popen(args, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not any(p.stat().st_size > 2 ** 20 for p in tmp_path.glob('data/.unfinished-*/new/train.bin')):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout
    yield tmp_path, process, [int(pid) for pid in children.split()]
    process.kill()
    process.communicate()


def gone(pid):
    for _ in range(500):
        try:
            if 'Z' in open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1][:3]:
                return True
            time.sleep(0.02)
        except (FileNotFoundError, ProcessLookupError):
            return True
    return False


@needs_proc
def test_kill_leaves_nothing_that_looks_finished(busy):
    folder, process, children = busy
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) >= 2 and all(map(gone, children))
    (left,) = os.listdir(folder / 'data')
    assert left.startswith('.unfinished-')
    stops('no usable data set', load_data, folder / 'data/big')
    (folder / f'data/{left.rsplit("-", 2)[0]}-{os.getpid()}-x').mkdir()  # of a process that lives
    (folder / 'a.txt').write_text('some text\n' * 9)
    ok('a.txt', '--tokenizer', 'bytes', cwd=folder)
    assert left not in os.listdir(folder / 'data') and len(os.listdir(folder / 'data')) == 2


@needs_proc
def test_ctrl_c_stops_the_workers_too(busy):
    folder, process, children = busy
    for pid in [process.pid, *children]:  # the terminal's ^C goes to all
        os.kill(pid, signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert process.returncode != 0 and not out and os.listdir(folder / 'data') == []
    one_line(err, 'stopped: nothing was written')
    assert all(map(gone, children))


@needs_proc
def test_a_worker_that_dies_is_one_line(busy):
    folder, process, children = busy
    for pid in children:
        if b'spawn_main' in open(f'/proc/{pid}/cmdline', 'rb').read():
            os.kill(pid, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert process.returncode != 0 and not out and os.listdir(folder / 'data') == []
    one_line(err, 'a worker died')


def test_a_full_disk_is_one_line(tmp_path):
    resource = pytest.importorskip('resource')
    (tmp_path / 'd.jsonl').write_text((json.dumps({'text': 'some text ' * 1000}) + '\n') * 1200)
    done = subprocess.run([sys.executable, str(ROOT / 'prepare.py'), 'd.jsonl', '--tokenizer', 'bytes'], cwd=tmp_path,
                          capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 22, 2 ** 22)))
    assert done.returncode != 0 and not done.stdout and os.listdir(tmp_path / 'data') == []
    one_line(done.stderr, 'nothing was written: ')


# ---------------------------------------------------------------------------------------------------------------------
# padded rows in training and validation

def test_evaluate_scores_no_pads():
    rng = np.random.default_rng(0)
    lengths, T, n = rng.integers(2, 12, size=37), 12, 37
    x0 = torch.ones(n, T, dtype=torch.long)
    for row, length in zip(x0, lengths):
        row[length:] = 7
    losses = torch.tensor(rng.gamma(2.0, size=(n, T)), dtype=torch.float64)
    for skip in (0, 1):  # an autoregressive model scores no first token
        nll = lambda x, t: losses[[int(i) for i in order]][:, skip:] + 0 * t
        calls = []

        def fetch(rows):
            nonlocal order
            order = list(rows)
            calls.append(order)
            return x0[order]
        order = []
        each = evaluate(nll, fetch, n, 5, pad_id=7)
        keep = (x0 != 7)[:, skip:]
        sums, counts = (losses[:, skip:] * keep).sum(1), keep.sum(1)
        mean, error = mean_and_error(each)
        assert math.isclose(mean, (sums.sum() / counts.sum()).item(), rel_tol=1e-12)
        jackknife = torch.stack([(sums.sum() - s) / (counts.sum() - c) for s, c in zip(sums, counts)])
        assert math.isclose(error, ((n - 1) ** 2 / n * jackknife.var()).sqrt().item(), rel_tol=0.05)
        packed = evaluate(nll, fetch, n, 5)
        assert torch.equal(packed, losses[:, skip:].mean(1))


@pytest.mark.parametrize('objective', ['duo', 'ar', 'dcd'])
def test_pads_carry_no_loss_in_training(monkeypatch, objective):
    monkeypatch.setattr(train, 'objective', objective)
    monkeypatch.setattr(train, 'curriculum_iters', 0)
    torch.manual_seed(0)
    model, teacher = (DiT(DiTConfig(20, 8, 1, 2, 16, 8, 0.0, causal=objective == 'ar')) for _ in range(2))
    for net in (model, teacher):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
    x0 = torch.randint(1, 20, (4, 8))
    x0[0, 3:] = x0[1, 6:] = 0
    mask, u = loss_mask(x0, 0), torch.rand(4, 1, dtype=torch.float64)
    assert loss_mask(x0, None) is None and mask.tolist() == [[float(i != 0) for i in row] for row in x0.tolist()]

    def loss(weights):
        torch.manual_seed(1)
        if objective == 'dcd':
            return train.distillation_loss(model, teacher, x0, u, 0, 20, weights)
        return train.training_loss(model, x0, u, 0, 20, weights, loss_fn=loss_of(objective, 20))
    one = lambda i, j: torch.zeros(4, 8).index_put((torch.tensor(i), torch.tensor(j)), torch.tensor(1.0))
    scored = [(i, j) for i in range(4) for j in range(objective == 'ar', 8) if mask[i, j]]
    each = torch.stack([loss(one(i, j)) for i, j in scored])  # every scored token's loss, alone
    assert torch.isclose(loss(mask), each.mean(), rtol=1e-4)
    assert not torch.isclose(loss(None), each.mean(), rtol=1e-4)


def test_padded_data_trains_and_validates(tmp_path, hub, offline):
    ok('lm1b', cwd=tmp_path, **offline)
    good(script(tmp_path, 'train.py', *TINY, '--dataset=lm1b', '--block_size=16', '--max_iters=4', '--objective=ar',
                '--out_dir=ar'))
    result = json.loads(good(script(tmp_path, 'eval.py', '--out_dir=ar', '--batch_size=7')).splitlines()[-1])
    model, _ = load_model(tmp_path / 'ar')
    meta, data = load_data(tmp_path / 'data/lm1b')
    x = torch.from_numpy(get_rows(data['val'], range(50), 16, meta))
    logp = model(x[:, :-1], None).log_softmax(-1)
    keep = x[:, 1:] != meta['pad_id']
    nats = -logp.gather(-1, x[:, 1:, None])[..., 0][keep]
    assert result['rows'] == 50 and math.isclose(result['nll'], nats.mean().item(), rel_tol=1e-4)
    words = keep.sum().item() - 50  # of text: eos is scored, too
    size = words * meta['val_bytes'] / meta['val_tokens']
    assert math.isclose(result['bits_per_byte'], nats.sum().item() / size / math.log(2), rel_tol=1e-4)


def test_broken_padded_sets(tmp_path, offline):
    ok('lm1b', cwd=tmp_path, **offline)
    folder = tmp_path / 'data/lm1b'
    index = (folder / 'val.idx').read_bytes()
    assert set(os.listdir(folder)) == {'train.bin', 'val.bin', 'train.idx', 'val.idx', 'meta.json', 'tokenizer.json'}
    for raw in (index[:-8], index[:-3], b''):
        (folder / 'val.idx').write_bytes(raw)
        stops('python prepare.py lm1b', load_data, folder)
    (folder / 'val.idx').unlink()
    stops('python prepare.py lm1b', load_data, folder)
