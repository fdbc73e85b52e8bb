"""Published sets, tokenizers, records, processes, what goes wrong, and padded rows; with a hub that
is a folder behind a server of this machine."""
import contextlib
import gzip
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import diffusion
import prepare
import train
from checkpoint import load_model
from data import get_rows, load_data, load_tokenizer, loss_mask, num_rows
from diffusion import evaluate
from helpers import ROOT, TINY, good
from helpers import run as script
from model import DiT, DiTConfig
from test_data import (CACHE, WITH_GPT2, command, command_fails, everything, fails, needs_gpt2, ok,
                       one_line, stops)

VOCAB = ROOT / 'tests/data/bert-vocab-8000.txt'
STAND_IN = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
            *'abcdefghijklmnopqrstuvwxyz0123456789.,!?-\'"$:中文',
            *('##' + c for c in 'abcdefghijklmnopqrstuvwxyz'),
            'the', 'quick', 'brown', 'fox', 'cafe', '##ing', 'naive']
LEXICON = 'the quick brown fox jumps over a lazy dog and runs away'.split()
COMMIT = 'c0ffee' * 6 + 'abcd'


def lines(n, start=0):
    return [f'{" ".join(LEXICON[i % 5:i % 5 + 2 + i % 7])} , number {i} .'
            for i in range(start, start + n)]


def write_jsonl(path, texts, key='text'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({key: text}) + '\n' for text in texts))


def put(root, name, train, val):
    """Lay a published set of these texts into the folder of a hub: ORG/NAME/COMMIT/files."""
    repo, train_files, val_files, column = prepare.SETS[name][:4]
    revision = prepare.REVISIONS[repo]
    folder = root / repo / (COMMIT if '/' in revision else revision)
    for pattern, texts in ((train_files, train), (val_files, val)):
        if '*' not in pattern:
            continue
        half = len(texts) // 2
        for i, some in enumerate((texts[:half], texts[half:])):
            path = folder / pattern.replace('test*', 'test').replace('*', '')
            numbered = path.with_name(f'{path.name}{i:05}-of-00002.parquet')
            path = numbered if '-' in pattern else path / f'{i:04}.parquet'
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pyarrow.table({'id': range(len(some)), column: some})
            pyarrow.parquet.write_table(table, path)


class Hub(http.server.ThreadingHTTPServer):
    """A hub of a folder, as much of one as `huggingface_hub` asks for. env: what makes it the hub
    of a process."""
    daemon_threads = True

    def __init__(self, root, home):
        super().__init__(('127.0.0.1', 0), Answer)
        self.root, self.asked = root, []
        self.env = dict(HF_ENDPOINT=f'http://127.0.0.1:{self.server_port}', HF_HOME=str(home),
                        HF_HUB_OFFLINE='0', HF_HUB_DISABLE_PROGRESS_BARS='1',
                        NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        root = self.server.root
        self.server.asked.append(self.path)
        listed = re.match(r'/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?$', self.path)
        file = re.match(r'(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.path)
        raw, commit = None, ''
        if listed:
            for folder in root.glob(f'{listed[1]}/*'):
                if listed[2] in (None, folder.name, 'main', 'refs%2Fconvert%2Fparquet'):
                    names = sorted(path.relative_to(folder).as_posix()
                                   for path in folder.rglob('*') if path.is_file())
                    files = [dict(rfilename=name) for name in names]
                    commit = folder.name
                    raw = json.dumps(dict(id=listed[1], sha=commit, siblings=files)).encode()
        elif file and root.joinpath(*file.groups()).is_file():
            raw, commit = root.joinpath(*file.groups()).read_bytes(), file[2]
        self.send_response(404 if raw is None else 200)
        raw = raw or b''
        self.send_header('Content-Length', str(len(raw)))
        self.send_header('ETag', f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header('X-Repo-Commit', commit)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(raw)

    do_HEAD = do_GET
    log_message = lambda *_: None


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A hub that has every published set: 200 documents to train on, 50 to validate; and BERT's
    vocabulary, and a set of somebody's."""
    root = tmp_path_factory.mktemp('hub')
    for name in prepare.SETS:
        put(root, name, lines(200), lines(50, 1000))
    vocab = root / prepare.BERT / prepare.REVISIONS[prepare.BERT] / 'vocab.txt'
    vocab.parent.mkdir(parents=True)
    vocab.write_text('\n'.join(STAND_IN) + '\n')
    write_jsonl(root / 'me/mine' / COMMIT / 'part/train-0.jsonl', lines(100), 'body')
    write_jsonl(root / 'me/mine' / COMMIT / 'part/test-0.jsonl', ['never'], 'body')
    server = Hub(root, tmp_path_factory.mktemp('home'))
    yield server
    server.shutdown()


def from_hub(hub, *args, cwd, **env):
    done = command(*args, cwd=cwd, **hub.env | env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def as_tokens(texts):
    """The token file of texts in bytes."""
    return np.array([i for text in texts for i in text.encode() + b'\0'], np.uint16).tobytes()


def decoded(folder, split):
    meta, data = load_data(folder)
    return load_tokenizer(meta, folder).decode(data[split][0])


# --------------------------------------------------------------------------------------------------
# published sets

@pytest.fixture(scope='module')
def published(hub, tmp_path_factory):
    """A folder with all published sets, the zero-shot ones made by one command; in bytes where they
    have GPT-2's tokens, which need a file."""
    home = tmp_path_factory.mktemp('published')
    said = from_hub(hub, 'zeroshot', '--tokenizer', 'bytes', cwd=home)
    assert len(said.splitlines()) == 8 and set(os.listdir(home / 'data')) == set(prepare.ZEROSHOT)
    for name in ('lm1b', 'lm1b_packed'):
        from_hub(hub, name, cwd=home)
    from_hub(hub, 'fineweb_edu', '--tokenizer', 'bytes', cwd=home)
    # without it, the 100,000 last of its 8,013,769 documents would validate
    from_hub(hub, 'owt', '--tokenizer', 'bytes', '--max_docs', 200, cwd=home)
    return home / 'data'


@pytest.mark.parametrize('name', prepare.SETS)
def test_every_set_by_its_rules(published, name):
    _, train_files, val_files, _, _, rule, kind, *_ = prepare.SETS[name]
    folder = published / name
    meta, data = load_data(folder)
    assert (meta['rule'], meta['source']) == (rule, name)
    texts = lines(50, 1000)
    train = lines(200) if '*' in train_files else []
    if val_files == 'last':
        train, texts = lines(180), lines(20, 180)
    elif val_files == 'some':
        texts = [text for i, text in enumerate(train) if prepare.hash_share(str(i)) < 0.05]
        train = [text for text in train if text not in texts]
    assert (meta['train_documents'], meta['val_documents']) == (len(train), len(texts))
    texts = [prepare.detokenise(text, kind) for text in texts]
    eos_bytes = 0 if rule == 'joined' else 1
    assert meta['val_bytes'] == sum(len(text.encode()) + eos_bytes for text in texts)
    encode = load_tokenizer(meta, folder).encode
    eos = [meta['eos_id']] if rule == 'packed' else []
    tokens, starts, _ = data['val']
    assert tokens.tolist() == sum((encode(text) + eos for text in texts), [])
    if rule == 'padded':
        assert starts.tolist() == [0, *np.cumsum([len(encode(text)) for text in texts])]
    else:
        assert starts is None and meta['bos_id'] == meta['eos_id'] and meta['pad_id'] is None


def test_a_zero_shot_set_has_nothing_to_train_on(published):
    stops('0 tokens fill no row', num_rows, load_data(published / 'ptb')[1]['train'], 16)


def test_some_documents_of_a_set_under_another_name(tmp_path, hub):
    from_hub(hub, 'owt', '--max_docs', 50, '--name', 'owt_t4', '--tokenizer', 'bytes', cwd=tmp_path)
    assert decoded(tmp_path / 'data/owt_t4', 'val') == ''.join(f'{t}\n\n' for t in lines(5, 45))
    command_fails('--max_docs', 'owt', '--max_tokens', 9, cwd=tmp_path, **hub.env)
    command_fails('[PAD]', 'lm1b', '--tokenizer', 'bytes', cwd=tmp_path, **hub.env)
    command_fails('prepare lambada by another', 'owt', 'lambada', cwd=tmp_path, **hub.env)


def test_max_docs_leaves_a_published_validation_whole(tmp_path, hub):
    from_hub(hub, 'lm1b_packed', '--max_docs', 2, cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/lm1b_packed')
    assert (meta['train_documents'], meta['val_documents']) == (2, 50)


def test_max_tokens_cuts_the_document_that_reaches_them(tmp_path):
    texts = [text for i, text in enumerate(lines(200)) if prepare.hash_share(str(i)) >= 0.05]
    write_jsonl(tmp_path / 'd.jsonl', lines(200))
    ok('d.jsonl', '--max_tokens', 5000, '--tokenizer', 'bytes', cwd=tmp_path)
    assert (tmp_path / 'data/d/train.bin').read_bytes() == as_tokens(texts)[:10_000]
    meta, _ = load_data(tmp_path / 'data/d')
    assert meta['train_tokens'] == 5000 and meta['val_documents'] > 0
    ends = np.cumsum([len(as_tokens([text])) // 2 for text in texts])
    assert meta['train_documents'] == 1 + (ends < 5000).sum()            # nor is more read


def test_the_end_of_a_text_validates_whatever_its_bytes():
    text = 1000 * '🙂' + 1000 * 'a b\n'
    for share in (0.05, 0.5, 0.9):
        (_, held), (_, rest) = prepare.end_validates(text, share)
        assert rest + held == text
        assert len(held.encode()) == pytest.approx(share * len(text.encode()), rel=0.3)


@pytest.mark.parametrize('end', ['\n', '\n\n'])
@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe', *WITH_GPT2])
def test_max_tokens_of_one_long_text(tmp_path, monkeypatch, tokenizer, end):
    """The document is cut there; what validates is whole."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    text = end.join(lines(20_000))
    (tmp_path / 'd.txt').write_text(text)
    ok('d.txt', '--tokenizer', tokenizer, '--data_dir', 'all', cwd=tmp_path)
    ok('d.txt', '--tokenizer', tokenizer, '--max_tokens', 5000, cwd=tmp_path)
    cut, whole = everything(tmp_path / 'data/d'), everything(tmp_path / 'all/d')
    assert cut['val.bin'] == whole['val.bin'] and whole['train.bin'].startswith(cut['train.bin'])
    meta, data = load_data(tmp_path / 'data/d')
    assert meta['train_tokens'] == 5000 and meta['train_documents'] == 1
    read = decoded(tmp_path / 'data/d', 'train')
    assert text.startswith(read) and meta['train_bytes'] == pytest.approx(len(read), rel=0.02)


def test_a_hub_corpus_of_any_name(tmp_path, hub):
    body = '--text_key', 'body', '--tokenizer', 'bytes'
    from_hub(hub, 'hf:me/mine', *body, cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/mine')
    assert (meta['train_documents'] + meta['val_documents'], meta['source']) == (100, 'hf:me/mine')
    from_hub(hub, 'hf:me/mine/*/train-0.jsonl', *body, '--name', 'part', cwd=tmp_path)
    for part in ('train', 'val'):
        one, other = (tmp_path / 'data' / name / f'{part}.bin' for name in ('mine', 'part'))
        assert one.read_bytes() == other.read_bytes()
    for says, *args in [('too little text', 'hf:me/mine/other/*'),
                        ("no UTF-8 text under 'text' (--text_key)", 'hf:me/mine'),
                        ('HF_ENDPOINT', 'hf:me/none')]:
        command_fails(says, *args, '--tokenizer', 'bytes', '--name', 'x', cwd=tmp_path, **hub.env)
    offline = hub.env | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'none'))
    command_fails('HF_ENDPOINT', 'ptb', '--tokenizer', 'bytes', cwd=tmp_path, **offline)
    command_fails('--tokenizer bert is not to be had', 'lm1b', cwd=tmp_path, **offline)
    assert sorted(os.listdir(tmp_path / 'data')) == ['mine', 'part']


def test_a_mirror_is_asked_only_for_the_files_that_are_needed(tmp_path, hub):
    """owt's first file holds 100 documents; what is fetched is not fetched again."""
    home = dict(HF_HOME=str(tmp_path / 'home'))
    first, second = (f'train-{i:05}-of-00002.parquet' for i in range(2))
    for n, wanted in ((50, [first]), (150, [second]), (200, [])):
        hub.asked.clear()
        from_hub(hub, 'owt', '--tokenizer', 'bytes', '--max_docs', n, '--name', n, cwd=tmp_path,
                 **home)
        asked = [path for path in hub.asked if '/resolve/' in path]
        assert {name for name in (first, second) if name in str(asked)} >= set(wanted)
        assert (second in str(asked)) <= (n > 100)
        meta, _ = load_data(tmp_path / f'data/{n}')
        assert (meta['train_documents'], meta['val_documents']) == (n - n // 10, n // 10)


@pytest.mark.parametrize('kind, text, plain', [
    ('wikitext', ' = Robert <unk> = \n', ' = Robert <unk> =\n'),
    ('wikitext', ' a guest @-@ star in a play , which cost 1 @,@ 000 \n',
     ' a guest-star in a play, which cost 1,000\n'),
    ('wikitext', ' the " Eagle " ( 1 @.@ 5 m ) : it \'s here ; so ? \n',
     ' the "Eagle" (1.5 m): it\'s here; so?\n'),
    ('wikitext', " the boys ' [ sic ] songs . See = = Plot = = \n",
     " the boys' [sic] songs. See == Plot ==\n"),
    ('wikitext', ' at 20 ° C , N N N votes ! ', ' at 20°C, 1 N 1 votes! '),  # as published
    ('ptb', "mr. <unk> is n't chairman of the n.v. group 's board",
     "mr. ? isn't chairman of the n.v. group's board"),
    ('ptb', "rose N N to $ N , the traders ' # N and 3\\/4",
     "rose 1 1 to $1 , the traders' #1 and 3/4"),
    ('lm1b', 'The U.S. Centers said " it is new " , he \'s sure .',
     'The U.S. Centers said "it is new", he\'s sure.'),
    ('lm1b', 'Who ( or what ) ? At http : / / a.com : $ 5 / h ; now !',
     'Who (or what)? At http://a.com: $5/h; now!'),
    ('lm1b', 'a b . c . d [ x y ] £ 5 .', 'a b. c . d [x y] £5.'),
    ('lambada', ' “ Yes , ” he said .  ', '\n" Yes , " he said .'),
    ('lambada', 'Two\n\nlines \n', '\nTwo\n\nlines'),
    ('papers', 'study @xmath0 ( see fig . [ f1 ] ) .\nit \'s " new "',
     'study @xmath0 (see fig. [f1]) .\nit\'s "new"'),
    ('-', 'AG news , as it is .', 'AG news , as it is .'),
])
def test_detokenisers(kind, text, plain):
    assert prepare.detokenise(text, kind) == plain


# --------------------------------------------------------------------------------------------------
# golden rows at T = 16

DOCUMENTS = ['Hello world!', 'The quick brown fox', 'the ' * 17 + 'end']


def prepared(tmp_path, hub, name, texts, *options, **env):
    """Prepare a published set that has these documents, to train and to validate."""
    put(tmp_path / 'hub', name, texts, texts)
    some = Hub(tmp_path / 'hub', tmp_path / 'home')
    from_hub(some, name, *options, cwd=tmp_path, **env)
    some.shutdown()
    return load_data(tmp_path / 'data' / name)


def test_golden_rows_of_bert(tmp_path, hub):
    the, quick, brown, fox, hello, world, bang, end = 1996, 4248, 2829, 4419, 7592, 2088, 999, 2203
    meta, data = prepared(tmp_path, hub, 'lm1b', DOCUMENTS, '--tokenizer', VOCAB)
    assert (meta['bos_id'], meta['eos_id'], meta['pad_id']) == (101, 102, 0)
    assert num_rows(data['val'], 16) == num_rows(data['val'], 4) == 3
    rows = get_rows(data['val'], [2, 0, 1], 16, meta)
    assert rows.dtype == np.int64 and rows.tolist() == [
        [101] + [the] * 14 + [102],  # three the's and end are dropped
        [101, hello, world, bang, 102] + [0] * 11,
        [101, the, quick, brown, fox, 102] + [0] * 10]
    assert get_rows(data['val'], [1], 4, meta).tolist() == [[101, the, quick, 102]]
    decode = load_tokenizer(meta, tmp_path / 'data/lm1b').decode
    assert decode(rows[1]).strip() == 'hello world!'  # no [CLS], no [PAD]
    assert decode([the, 0, quick, 101, brown]).strip() == 'the quick brown'
    meta, data = prepared(tmp_path, hub, 'lm1b_packed', DOCUMENTS, '--tokenizer', VOCAB)
    assert (meta['bos_id'], meta['eos_id'], meta['pad_id']) == (101, 101, None)
    assert num_rows(data['val'], 16) == 2
    assert get_rows(data['val'], [0, 1], 16, meta).tolist() == [
        [101, hello, world, bang, 101, the, quick, brown, fox, 101, the, the, the, the, the, 101],
        [101] + [the] * 12 + [end, 101, 101]]  # the document's end, then the row's


@needs_gpt2
def test_golden_rows_of_gpt2(tmp_path, hub, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    (hello, world, bang), (the, quick, brown, fox) = (15496, 995, 0), (464, 2068, 7586, 21831)
    eos, scores = 50256, [prepare.hash_share(str(i)) for i in range(24)]
    write_jsonl(tmp_path / 'd.jsonl', DOCUMENTS[:2] * 12)
    ok('d.jsonl', '--tokenizer', 'gpt2', '--val_fraction', 1e-9 + min(scores), cwd=tmp_path)
    meta, data = load_data(tmp_path / 'data/d')
    assert (meta['vocab_size'], meta['bos_id'], meta['eos_id']) == (50257, eos, eos)
    assert (meta['train_documents'], meta['val_documents']) == (23, 1)
    documents = [[hello, world, bang], [the, quick, brown, fox]] * 12
    assert data['val'][0].tolist() == documents.pop(scores.index(min(scores))) + [eos]
    stream = sum((tokens + [eos] for tokens in documents), [])
    assert data['train'][0].tolist() == stream
    assert get_rows(data['train'], [0, 1], 16, meta).tolist() == [
        [eos, *stream[:14], eos], [eos, *stream[14:28], eos]]
    # zero-shot: no eos between documents
    meta, data = prepared(tmp_path, hub, 'ag_news', ['Hello world!'] * 6)
    rows = get_rows(data['val'], [0], 16, meta).tolist()
    assert rows == [[eos, *([hello, world, bang] * 5)[:14], eos]]


# --------------------------------------------------------------------------------------------------
# tokenizers

CJK = ((0x4e00, 0x9fff), (0x3400, 0x4dbf), (0x20000, 0x2a6df), (0x2a700, 0x2b73f),
       (0x2b740, 0x2b81f), (0x2b820, 0x2ceaf), (0xf900, 0xfaff), (0x2f800, 0x2fa1f))


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
    bare = (c for c in unicodedata.normalize('NFD', out) if unicodedata.category(c) != 'Mn')
    out = ''
    for c in ''.join(bare).lower():
        sign = c.isascii() and c.isprintable() and not c.isalnum() and c != ' '
        out += f' {c} ' if unicodedata.category(c)[0] == 'P' or sign else c
    ids = []
    for word in out.split():
        found, at = [], 0
        while at < len(word) <= 100:
            mark = '##' if at else ''
            ends = [e for e in range(len(word), at, -1) if mark + word[at:e] in vocab]
            if not ends:
                break
            end = ends[0]
            found.append(vocab[mark + word[at:end]])
            at = end
        ids += found if at == len(word) else [vocab['[UNK]']]
    return ids


@pytest.mark.parametrize('real', [False, True], ids=['stand-in', 'bert'])
def test_bert_is_the_reference_word_piece(tmp_path, real):
    (tmp_path / 'vocab.txt').write_text(VOCAB.read_text() if real else '\n'.join(STAND_IN) + '\n')
    tokens = (tmp_path / 'vocab.txt').read_text().splitlines()
    vocab = dict(zip(tokens, range(len(tokens))))
    (tmp_path / 'text.txt').write_text('The quick brown fox.\n' * 9)
    ok('text.txt', '--tokenizer', 'vocab.txt', cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/text')
    assert (meta['tokenizer'], meta['vocab_size'], meta['pad_id']) == ('bert', len(tokens), None)
    encode, *_ = load_tokenizer(meta, tmp_path / 'data/text')
    for text in ('The quick brown fox!', 'Café NAÏVE, résumé', '中文quick中', 'a🙂b 🏽 e\u0301',
                 'ÅÄÖ ß İ ǆ', '[SEP] [MASK]', 'tab\tnew\nline\x00\x07\u200bx',
                 'x' * 100 + ' ' + 'y' * 101, "don't-stop... $5: #1", '\ufffdﬁ ½ ² ™',
                 '\u3000wide\xa0space\u2028line', '한국어 ひらがな ไทย',
                 'caféing unaffable jumping', 'end \ue000\U000e0001.'):
        assert encode(text) == word_pieces(text, vocab), text


def test_tokenizers_that_are_not_to_be_had(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    (tmp_path / 'text.txt').write_text('a b c\n' * 20)
    other = Tokenizer(models.WordLevel({'<s>': 0, 'a': 1, '?': 2, '</s>': 3}, unk_token='?'))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save(str(tmp_path / 'other.json'))
    other = Tokenizer(models.BPE({'a': 0}, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.save(str(tmp_path / 'no_end.json'))
    (tmp_path / 'half.json').write_text('{"half": ')
    (tmp_path / 'vocab.txt').write_text('a\nb\n')
    for name, says in (('other.json', 'Whitespace'), ('no_end.json', '<|endoftext|>'),
                       ('half.json', 'half.json'), ('vocab.txt', 'vocab.txt'),
                       ('missing.json', 'missing.json'), ('words', 'give bytes, bpe')):
        fails(says, 'text.txt', '--tokenizer', name, cwd=tmp_path)


def test_zeroshot_has_names_of_its_own(tmp_path):
    fails('--name', 'zeroshot', '--name', 'x', cwd=tmp_path)
    fails('what to prepare', '--name', 'x', cwd=tmp_path)
    fails('--vocab_size is for a new BPE', 'stdlib', '--vocab_size', '300', '--tokenizer', 'bytes',
          cwd=tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('part, value, says', [
    ('normalizer', dict(type='Precompiled', precompiled_charsmap='AAAA'), 'Precompiled'),
    ('pre_tokenizer', dict(type='FixedLength', length=0), 'FixedLength'),
    ('model', dict(type='WordLevel', vocab={'<|endoftext|>': 1}, unk_token='?'), 'Missing [UNK]')])
def test_a_hostile_tokenizer_json(tmp_path, part, value, says):
    """`tokenizers` panics, at once or when it is used; that is not even an Exception."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    plain = Tokenizer(models.BPE({'a': 0, '<|endoftext|>': 1}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / 'bad.json').write_text(json.dumps(json.loads(plain.to_str()) | {part: value}))
    (tmp_path / 'text.txt').write_text('a b c\n' * 20)
    fails(says, 'text.txt', '--tokenizer', 'bad.json', cwd=tmp_path)
    assert os.listdir(tmp_path / 'data') == []


@pytest.mark.parametrize('rule', ['packed', 'padded'])
def test_the_tokenizer_json_of_a_bert_set_makes_the_same(tmp_path, rule):
    """As of a model: its copy gives the same tokenizer, and the same special tokens by rule."""
    first = prepare.make_tokenizer(str(VOCAB), 0, None, tmp_path / 'tokenizer.json', rule)
    again = prepare.make_tokenizer(str(tmp_path / 'tokenizer.json'), 0, None,
                                   tmp_path / 'again.json', rule)
    assert first == again and first['tokenizer'] == 'bert'
    assert first['eos_id'] == (101 if rule == 'packed' else 102)


@pytest.mark.parametrize('kind', [*WITH_GPT2, 'bpe', 'bert'])
def test_pieces_of_a_document_give_the_tokens_of_the_whole(tmp_path, monkeypatch, kind):
    text = (ROOT / 'train.py').read_text() + 'naïve 字 \u3000 x\u2028y  \n\n z ' * 50
    if kind == 'gpt2':
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    name = str(VOCAB) if kind == 'bert' else kind
    meta = prepare.make_tokenizer(name, 0, [text], tmp_path / 'tokenizer.json', 'packed')
    encode = load_tokenizer(meta, tmp_path).encode
    *cut, long, empty = prepare.cut_documents([(False, text), (True, 'x' * 700), (False, '')], 300)
    assert len(cut) > 10 and min(len(part) for part, _, _ in cut[:-1]) >= 300
    assert ''.join(part for part, _, _ in cut) == text
    assert [ends for _, ends, _ in cut] == [False] * (len(cut) - 1) + [True]
    assert sum((encode(part) for part, _, _ in cut), []) == encode(text)
    assert long == ('x' * 700, True, True)  # no place is safe
    assert empty == ('', True, False)


def test_a_bpe_learns_from_a_long_word(tmp_path):
    """In a second, where its length squared would be hours."""
    prepare.train_bpe(['x' * 3_000_000], 0, tmp_path / 'tokenizer.json')
    vocab = json.loads((tmp_path / 'tokenizer.json').read_text())['model']['vocab']
    assert 'x' * 1024 in vocab and len(vocab) < 300


# --------------------------------------------------------------------------------------------------
# your own corpora

def test_every_kind_of_record_file_is_the_same_corpus(tmp_path):
    texts = ['first', '', 'naïve 字\r\n', '\ud800 half a letter', *lines(60)]
    raw = ''.join(json.dumps({'body': text}) + '\n\n' for text in texts).encode()
    (tmp_path / 'a.jsonl').write_bytes(raw)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(raw[:90]) + gzip.compress(raw[90:]))
    with pyarrow.CompressedOutputStream(str(tmp_path / 'c.jsonl.zst'), 'zstd') as file:
        file.write(raw)
    texts[3] = '? half a letter'  # parquet holds none
    table = pyarrow.table({'n': range(64), 'body': texts})
    pyarrow.parquet.write_table(table, tmp_path / 'd.parquet')
    for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst', 'd.parquet'):
        ok(name, '--text_key', 'body', '--tokenizer', 'bytes', '--name', name[0],
           '--val_fraction', 0.2, cwd=tmp_path)
    sets = [everything(tmp_path / 'data' / name) for name in 'abcd']
    assert all(sets[0][f] == other[f] for other in sets for f in ('train.bin', 'val.bin'))
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(64)]
    held = [int(digest[:8], 16) / 2**32 < 0.2 for digest in digests]
    for part, side in (('train', False), ('val', True)):
        expected = [text for text, h in zip(texts, held) if h == side]
        assert sets[0][f'{part}.bin'] == as_tokens(expected)
    # a folder of records and a text is one corpus whose documents are counted on
    (tmp_path / 'all').mkdir()
    shutil.copy(tmp_path / 'a.jsonl', tmp_path / 'all')
    shutil.copy(tmp_path / 'd.parquet', tmp_path / 'all')
    (tmp_path / 'all/e.txt').write_text('a text among records')
    ok('all', '--text_key', 'body', '--tokenizer', 'bytes', cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/all')
    assert meta['train_documents'] + meta['val_documents'] == 129


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
    deep = '[' * 200_000 + ']' * 200_000
    (tmp_path / 'deep.jsonl').write_text(f'{{"text": "fine"}}\n{deep}\n')
    (tmp_path / 'empty.jsonl').write_text('\n')
    (tmp_path / 'blank.jsonl').write_text('{"text": ""}\n' * 99)
    for name, says in (('key.jsonl', 'after record 2: KeyError'),
                       ('number.jsonl', 'after record 1'),
                       ('json.jsonl', 'after record 1'), ('latin.jsonl', 'UnicodeDecodeError'),
                       ('cut.jsonl.gz', 'cut.jsonl.gz'), ('no.jsonl.zst', 'no.jsonl.zst'),
                       ('no.parquet', 'no.parquet'), ('column.parquet', "KeyError: 'text'"),
                       ('null.parquet', 'after record 2'),
                       ('deep.jsonl', 'after record 1: Recursion'),
                       ('empty.jsonl', 'too little text'),
                       ('blank.jsonl', 'too little text')):
        fails(says, name, '--tokenizer', 'bytes', '--name', 'x', cwd=tmp_path)
    assert os.listdir(tmp_path / 'data') == []


@pytest.mark.parametrize(
    'packed', [gzip.compress, lambda raw: pyarrow.compress(raw, 'zstd').to_pybytes()],
    ids=['gz', 'zst'])
def test_a_bomb_takes_little_memory(tmp_path, monkeypatch, packed):
    """A line that unpacks to 64 MB, of which a thousandth may be a record."""
    monkeypatch.setattr(prepare, 'RECORD', 2**16)
    path = tmp_path / ('bomb.jsonl.gz' if packed is gzip.compress else 'bomb.jsonl.zst')
    path.write_bytes(packed(b'{"text": "fine"}\n{"text": "' + b'x' * 2**26 + b'"}\n'))
    tracemalloc.start()
    fails('after record 1: ValueError: a line of 65,536', path.name, '--tokenizer', 'bytes',
          cwd=tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22 and os.listdir(tmp_path / 'data') == []


def test_lines_that_a_loader_may_stumble_over(tmp_path):
    """A text that looks like a date, a field that appears late, a name with signs of a pattern."""
    rows = [{'text': '2020-01-01'}] + [{'text': 'x' * 10_000, 'id': 1}] * 1100
    rows.append({'text': 'the end', 'late': {'a': 1}})
    path = tmp_path / 'some [1] rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    ok(path.name, '--tokenizer', 'bytes', '--name', 'rows', cwd=tmp_path)
    meta, _ = load_data(tmp_path / 'data/rows')
    assert meta['train_documents'] + meta['val_documents'] == 1102
    texts = decoded(tmp_path / 'data/rows', 'train') + decoded(tmp_path / 'data/rows', 'val')
    assert '2020-01-01' in texts and 'the end' in texts


def test_the_text_of_a_file(tmp_path):
    path, raw = tmp_path / 'text', '\ufeffone\r\ntwo\r字🙂\r\n\ufeff'.encode() + b'end\r'
    path.write_bytes(raw)
    assert list(prepare.read_texts([str(path)], 'text')) == ['one\ntwo\r字🙂\n\ufeffend\r']
    raw = raw[3:]
    for bad, says in ((raw[:17] + b'\xff' + raw[17:], 'position 17'), (raw[:11], 'position 9')):
        path.write_bytes(bad)
        stops(says, list, prepare.read_texts([str(path)], 'text'))


# --------------------------------------------------------------------------------------------------
# threads, and what stops them

def test_threads_keep_the_order(tmp_path):
    texts = [f'{i} ' * (i % 800) for i in range(1200)]
    write_jsonl(tmp_path / 'd.jsonl', texts)
    ok('d.jsonl', '--tokenizer', 'bytes', cwd=tmp_path)
    for part, side in (('train', False), ('val', True)):
        some = [text for i, text in enumerate(texts) if (prepare.hash_share(str(i)) < 0.05) == side]
        assert (tmp_path / f'data/d/{part}.bin').read_bytes() == as_tokens(some)


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/status'),
                                reason='looks at processes in /proc')
PEAK = '''
import re, threading, time, prepare
def watch():
    while True:
        with open("/proc/self/status") as status:
            peak.append(int(re.search("RssAnon:\\\\s+([0-9]+)", status.read())[1]))
        time.sleep(0.01)
peak = []
threading.Thread(target=watch, daemon=True).start()
prepare.main()
print(max(peak) // 1024)
'''  # mapped files are left out: the system drops them when it needs the room


@needs_proc
def test_memory_is_flat(tmp_path):
    """Four times the records take no more of it, in the process that reads and writes."""
    peaks = []
    for megabytes in (10, 40):
        write_jsonl(tmp_path / 'd.jsonl', ['0123 5678 ' * 1000] * (100 * megabytes))
        done = subprocess.run([sys.executable, '-c', PEAK, 'd.jsonl', '--tokenizer', 'bytes',
                               '--name', str(megabytes)],
                              cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)),
                              text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 20, peaks  # MB
    meta, data = load_data(tmp_path / 'data/40')
    assert meta['train_bytes'] + meta['val_bytes'] == 4000 * 10_001
    assert bytes(data['train'][0][:10].astype(np.uint8)) == b'0123 5678 '


@pytest.fixture
def busy(tmp_path):
    """prepare.py, stopped in the middle, with tokens on the disk."""
    write_jsonl(tmp_path / 'big.jsonl', ['x' * 2**14] * 4000)
    args = sys.executable, ROOT / 'prepare.py', 'big.jsonl', '--tokenizer=bytes'
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    process = subprocess.Popen(args, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=listen)
    size = lambda: sum(path.stat().st_size for path in tmp_path.glob('data/.*/new/train.bin'))
    while size() < 2**20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    yield tmp_path, process
    process.kill()
    process.communicate()


def test_kill_leaves_nothing_that_looks_finished(busy):
    folder, process = busy
    process.kill()
    process.wait()
    (left,) = os.listdir(folder / 'data')
    assert left.startswith('.unfinished-')
    stops('no usable data set', load_data, folder / 'data/big')
    write_jsonl(folder / 'big.jsonl', lines(99))
    ok('big.jsonl', '--tokenizer', 'bytes', cwd=folder)
    assert set(os.listdir(folder / 'data')) == {'big', left}


def test_ctrl_c_is_one_line(busy):
    folder, process = busy
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not out and os.listdir(folder / 'data') == []
    one_line(err, 'stopped')


def test_two_at_once_of_one_name(busy):
    """The set that is there first stays; the other run says so."""
    folder, process = busy
    write_jsonl(folder / 'd.jsonl', lines(99))
    ok('d.jsonl', '--tokenizer', 'bytes', '--name', 'big', cwd=folder)
    before = everything(folder / 'data/big')
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not out
    one_line(err, 'big')
    assert everything(folder / 'data/big') == before and os.listdir(folder / 'data') == ['big']


def test_a_full_disk_is_one_line(tmp_path):
    resource = pytest.importorskip('resource')
    write_jsonl(tmp_path / 'd.jsonl', ['some text ' * 1000] * 1200)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))
    done = subprocess.run([sys.executable, ROOT / 'prepare.py', 'd.jsonl', '--tokenizer', 'bytes'],
                          cwd=tmp_path, capture_output=True, text=True, preexec_fn=small)
    assert done.returncode == 1 and not done.stdout and os.listdir(tmp_path / 'data') == []
    one_line(done.stderr, 'File too large')


# --------------------------------------------------------------------------------------------------
# padded rows in training and validation

def test_evaluate_scores_no_pads(monkeypatch):
    rng = np.random.default_rng(0)
    lengths, T, n = rng.integers(2, 12, size=37), 12, 37
    x0 = torch.ones(n, T, dtype=torch.long)
    for row, length in zip(x0, lengths):
        row[length:] = 7
    losses = torch.tensor(rng.gamma(2.0, size=(n, T)), dtype=torch.float64)
    order = []

    def fetch(rows):
        order[:] = rows
        return x0[order]

    for skip in (0, 1):  # an autoregressive model scores no first token
        monkeypatch.setattr(diffusion, 'token_nll', lambda *_: losses[order][:, skip:])
        each = evaluate(None, 'duo', 9, fetch, n, 5, pad_id=7)
        keep = (x0 != 7)[:, skip:]
        sums, counts = (losses[:, skip:] * keep).sum(1), keep.sum(1)
        mean, error = each.mean().item(), each.std().item() / math.sqrt(n)
        assert math.isclose(mean, (sums.sum() / counts.sum()).item(), rel_tol=1e-12)
        left_out = [(sums.sum() - s) / (counts.sum() - c) for s, c in zip(sums, counts)]
        jackknife = ((n - 1) ** 2 / n * torch.stack(left_out).var()).sqrt()
        assert math.isclose(error, jackknife.item(), rel_tol=0.05)
        packed = evaluate(None, 'duo', 9, fetch, n, 5)
        assert torch.allclose(packed, losses[:, skip:].mean(1), rtol=1e-12)


@pytest.mark.parametrize('objective', ['duo', 'ar', 'dcd'])
def test_pads_carry_no_loss_in_training(monkeypatch, objective):
    monkeypatch.setattr(train, 'objective', objective)
    monkeypatch.setattr(train, 'curriculum_frac', 0.0)
    torch.manual_seed(0)
    config = DiTConfig(20, 8, 1, 2, 16, 8, 0.0, causal=objective == 'ar')
    model, teacher = DiT(config), DiT(config)
    for net in (model, teacher):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
    x0 = torch.randint(1, 20, (4, 8))
    x0[0, 3:] = x0[1, 6:] = 0
    mask, u = loss_mask(x0, 0), torch.rand(4, 1, dtype=torch.float64)
    assert loss_mask(x0, None) is None
    assert mask.tolist() == [[float(i != 0) for i in row] for row in x0.tolist()]

    def loss(weights):
        torch.manual_seed(1)
        loss_fn = train.loss_of(objective, 20)
        return train.training_loss(model, x0, u, 0, 20, loss_fn, teacher, weights)

    def one(i, j):
        weights = torch.zeros(4, 8)
        weights[i, j] = 1
        return weights

    first = 1 if objective == 'ar' else 0
    scored = [(i, j) for i in range(4) for j in range(first, 8) if mask[i, j]]
    each = torch.stack([loss(one(i, j)) for i, j in scored])  # every scored token's loss, alone
    assert torch.isclose(loss(mask), each.mean(), rtol=1e-4)
    assert not torch.isclose(loss(None), each.mean(), rtol=1e-4)


def test_padded_data_trains_and_validates(tmp_path, published):
    shutil.copytree(published / 'lm1b', tmp_path / 'data/lm1b')
    good(script(tmp_path, 'train.py', *TINY, '--dataset=lm1b', '--block_size=64',
                '--max_iters=4', '--objective=ar', '--out_dir=ar', '--num_samples=0'))
    said = good(script(tmp_path, 'eval.py', '--out_dir=ar', '--batch_size=7'))
    result = json.loads(said.splitlines()[-1])
    model, _ = load_model(tmp_path / 'ar')
    meta, data = load_data(tmp_path / 'data/lm1b')
    x = torch.from_numpy(get_rows(data['val'], range(50), 64, meta))
    logp = model(x[:, :-1], None).log_softmax(-1)
    keep = x[:, 1:] != meta['pad_id']
    nats = -logp.gather(-1, x[:, 1:, None])[..., 0][keep]
    assert result['rows'] == 50
    assert math.isclose(result['nll'], nats.mean().item(), rel_tol=1e-4)
    assert keep[:, -1].sum() == 0  # no row is cut
    bits = nats.sum().item() / math.log(2)
    assert math.isclose(result['bpb'], bits / meta['val_bytes'], rel_tol=1e-4)


def test_broken_padded_sets(tmp_path, published):
    folder = shutil.copytree(published / 'lm1b', tmp_path / 'lm1b')
    index = (folder / 'val.idx').read_bytes()
    for raw in (index[:-8], index[:-3], b''):
        (folder / 'val.idx').write_bytes(raw)
        stops('python prepare.py lm1b', load_data, folder)
    (folder / 'val.idx').unlink()
    stops('no usable data set', load_data, folder)
