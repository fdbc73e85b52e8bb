"""
Text -> token files: data/NAME/{train,val}.bin and meta.json (data.py says what is in them).

    python prepare.py stdlib                          # Python's own source, found on this machine: no download
    python prepare.py owt                             # a published set, with its published rules; --list shows all
    python prepare.py book.txt                        # your text: of one file, the end validates ...
    python prepare.py notes/ more.txt --name notes    # ... of many, each a document, one in twenty does
    python prepare.py 'dumps/*.jsonl.gz' --name dumps --text_key body --tokenizer gpt2
    python prepare.py hf:org/name --tokenizer bert    # of the Hugging Face hub; or hf:org/name/some/*.parquet

A file that you name may be any UTF-8 text, or one document per record: .jsonl, .jsonl.gz, .jsonl.zst or .parquet. Of a
folder I take every .txt, .md and such file, at any depth.
"""
import argparse
import base64
import codecs
import collections
import contextlib
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import queue
import re
import shutil
import signal
import sysconfig
import tempfile
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import LINE_ENDS, load_tokenizer

TOKENIZER, VOCAB_SIZE = 'bpe', 4096  # unless told otherwise; a small text gets fewer tokens (see make_tokenizer)
TOKENIZERS = ('bytes', 'char', 'bpe', 'gpt2', 'bert')
TEXT8 = ' abcdefghijklmnopqrstuvwxyz'
FILES = {'train.bin', 'val.bin', 'train.idx', 'val.idx', 'meta.json', 'tokenizer.json'}
TEXTS, RECORDS = ('.txt', '.md'), ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet')
# Of the standard library I want what people wrote: no tests, no generated tables, nothing of this machine alone.
LEFT_OUT = {'test', 'tests', 'idle_test', 'encodings', 'pydoc_data', 'entities.py', 'stringprep.py', '_casefix.py',
            'site-packages', 'dist-packages', 'sitecustomize.py'}
BATCH = 2 ** 20           # characters a worker gets at a time; a longer document comes in several pieces
WINDOW = 2 ** 16          # how far before the end of a piece I look for a place to cut
LEARN_FROM = 100_000_000  # characters of the training text that teach a BPE
# Where no tokenizer that I cut for joins anything: before a space between two words, or behind such a newline.
SAFE = re.compile(r'(?<=\S)(?= \S)|(?<=\S\n)(?=\S)')

# ---------------------------------------------------------------------------------------------------------------------
# the published sets

# Files are parquet. 'last': the last tenth validates, at most 100,000 documents; 'some': documents picked by a hash.
# 'joined' is 'packed' without an eos between documents, as zero-shot perplexities are published.
COLUMNS = ['set', 'hub id', 'training files', 'validation files', 'column', 'tokenizer', 'rule', 'detokeniser',
           'documents', 'GB', 'revision']
SETS = {row.split()[0]: row.split()[1:] for row in """\
owt Skylion007/openwebtext plain_text/train-* last text gpt2 packed - 8013769 24
lm1b billion-word-benchmark/lm1b plain_text/train/* plain_text/test/* text bert padded lm1b 30607716 2.6
lm1b_packed billion-word-benchmark/lm1b plain_text/train/* plain_text/test/* text bert packed lm1b 30607716 2.6
text8 afmck/text8 data/train-* data/validation-* text text8 packed - 2 0.05
fineweb_edu HuggingFaceFW/fineweb-edu sample/10BT/* some text gpt2 packed - 9672101 29
ptb ptb-text-only/ptb_text_only - penn_treebank/validation/* sentence gpt2 joined ptb 3370 0.001
wikitext2 Salesforce/wikitext - wikitext-2-raw-v1/validation-* text gpt2 joined wikitext 3760 0.001
wikitext103 Salesforce/wikitext - wikitext-103-raw-v1/validation-* text gpt2 joined wikitext 3760 0.001
lm1b_gpt2 billion-word-benchmark/lm1b - plain_text/test/* text gpt2 joined lm1b 306688 0.03
lambada EleutherAI/lambada_openai - default/*test* text gpt2 joined lambada 5153 0.002
ag_news fancyzhx/ag_news - data/test-* text gpt2 joined - 7600 0.002
pubmed armanc/scientific_papers - pubmed/validation/* article gpt2 joined papers 6633 0.06
arxiv armanc/scientific_papers - arxiv/validation/* article gpt2 joined papers 6436 0.1""".splitlines()}
ZEROSHOT = [name for name, row in SETS.items() if 'joined' in row]
# What was a loading script, `datasets` no longer runs: I take the hub's own conversion of it to parquet.
REVISIONS = {'Skylion007/openwebtext': 'b4325f019c648b1641a1784748667e8b74e5e064',
             'billion-word-benchmark/lm1b': '8d52bfd3cc2819fc1166dbb8144c328e2690de3e',
             'afmck/text8': '58c74e966ccc66eab2de6b52fad5b14ddb259fa4',
             'HuggingFaceFW/fineweb-edu': '87f09149ef4734204d70ed1d046ddc9ca3f2b8f9',
             'Salesforce/wikitext': 'b08601e04326c79dfdd32d625aee71d232d685c3',
             'EleutherAI/lambada_openai': '900124bf3b8235c6daf21033af9948b3f07346c4',
             'fancyzhx/ag_news': 'eb185aade064a813bc0b7f42de02595523103ca4',
             'ptb-text-only/ptb_text_only': 'refs/convert/parquet',
             'armanc/scientific_papers': 'refs/convert/parquet'}
BERT = 'google-bert/bert-base-uncased', '86b5e0934494bd15c9632b12f734a8a67f723594'

# Undo the tokenisation that a set was published in, as its published perplexities do: regex, replacement, in this order
# (it matters: each sees what the ones before it left).
WIKITEXT = [("s '", "s'"), (' @([-,.])@ ', r'\1'), *((f' ({re.escape(c)}) ', r'\1 ') for c in ':;.!?,'),
            *((rf'\{a}\s*([^\{b}]*?)\s*\{b}', rf'{a}\1{b}') for a, b in ('()', '[]', '{}', '""', "''")),
            ('= = = =', '===='), ('= = =', '==='), ('= =', '=='), (' ° ', '°'), (' \n', '\n'), ('\n ', '\n'),
            (' N ', ' 1 '), (" 's", "'s")]
LM1B = [('(https?) : / / ', r'\1://'), (r" '(\w+)", r"'\1"), (r' (\w+) \. ', r' \1. '), (r' (\w+) \.$', r' \1.'),
        (r' \? ', '? '), (r' \?$', '?'), (' ! ', '! '), (' !$', '!'), (' , ', ', '), (' : ', ': '), (' ; ', '; '),
        (' / ', '/'), ('" ([^"]+) "', r'"\1"'), ("' ([^']+) '", r"'\1'"), (r'\( ([^()]+) \)', r'(\1)'),
        (r'\[ ([^\[\]]+) \]', r'[\1]'), (r'\$ ', '$'), ('£ ', '£')]
DETOKENISERS = {'-': [], 'wikitext': WIKITEXT, 'lm1b': LM1B, 'papers': WIKITEXT + LM1B,
                'ptb': [(" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (' \n ', '\n'), (r'\\/', '/'),
                        ('(?<= )N(?= )', '1'), (r'([$#]) 1', r'\g<1>1'), ('<unk>', '?')],
                'lambada': [('[“”]', '"'), (r'\A\s*', '\n'), (r'\s*\Z', '')]}


def detokenise(text, kind):
    for pattern, replacement in DETOKENISERS[kind]:
        text = re.sub(pattern, replacement, text)
    return text

# ---------------------------------------------------------------------------------------------------------------------
# documents: each is an iterable of its text, which may come in blocks

def blocks(path, start=0, stop=None):
    """The text of a UTF-8 file, or of some of its bytes: line ends made \\n, its byte order mark dropped."""
    decode = codecs.getincrementaldecoder('utf-8' if start else 'utf-8-sig')().decode
    at, held = start, ''
    with open(path, 'rb') as file:
        if start:  # a pipe cannot
            file.seek(start)
        while True:
            raw = file.read(BATCH if stop is None else min(BATCH, stop - at))
            if (nul := raw.find(b'\0')) >= 0:
                raise SystemExit(f'{path} is not text: it has a NUL at byte {at + nul}')
            try:
                text = held + decode(raw, final=not raw)
            except UnicodeDecodeError as error:  # of what it held back, and raw
                at += error.start + len(raw) - len(error.object)
                raise SystemExit(f'{path} is not UTF-8 from byte {at} on: convert it first')
            held = '\r' if raw and text.endswith('\r') else ''  # a \n may follow
            yield text[:len(text) - len(held)].replace('\r\n', '\n')
            at += len(raw)
            if not raw:
                return


def records(path, key):
    """The texts under a key of a .jsonl, or in a column of a .parquet, one by one."""
    import pyarrow.parquet
    number = 0
    try:
        if path.endswith('.parquet'):
            table = pyarrow.parquet.ParquetFile(path, buffer_size=BATCH)
            if key not in table.schema_arrow.names:
                raise SystemExit(f'{path} has no column {key!r} (--text_key): it has {table.schema_arrow.names}')
            texts = (text for rows in table.iter_batches(256, columns=[key]) for text in rows.column(0).to_pylist())
        else:
            lines = io.BufferedReader(pyarrow.input_stream(path, compression='detect'))
            texts = (json.loads(line)[key] for line in lines if line.strip())
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f'it is {text!r:.40}')
            number += 1
            yield text
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SystemExit(f'{path}: no text under {key!r} (--text_key) in record {number + 1} '
                         f'({type(error).__name__}: {" ".join(str(error).split())[:160]})')


def documents_of(paths, key):
    for path in paths:
        yield from ([text] for text in records(path, key)) if path.endswith(RECORDS) else [blocks(path)]


def score(key):
    """A number in [0, 1) made from the key alone, so that what comes or goes beside it moves nothing."""
    return int(hashlib.sha256(os.fsencode(key)).hexdigest()[:8], 16) / 2**32


def numbered(documents, val_fraction):
    return (('val' if score(str(number)) < val_fraction else 'train', document)
            for number, document in enumerate(documents))


def held_out(names, val_fraction):
    """The names that validate: of two or more, one at least on either side."""
    ranked = sorted(map(score, names))
    bar = min(max(val_fraction, ranked[0]), ranked[-2])
    return {name for name in names if score(name) <= bar}


def cut_point(path, val_fraction):
    """The byte from which on a text validates: where a paragraph begins, or a line, or at least a character."""
    size = os.stat(path).st_size
    goal, near = round(size * (1 - val_fraction)), round(size * min(val_fraction, 1 - val_fraction) / 2)
    near = min(near, BATCH)
    with open(path, 'rb') as file:
        file.seek(goal - near)
        around = file.read(near + 4)
    for end in (b'\n\n', b'\r\n\r\n', b'\n'):
        if (at := around.rfind(end, 0, near)) >= 0:
            return goal - near + at + len(end)
    return goal + next((i for i, byte in enumerate(around[near:]) if byte & 0xc0 != 0x80), 0)


def read_stdlib():
    """{name: path} of the standard library's source."""
    root, files = Path(sysconfig.get_paths()['stdlib']), {}
    for path in sorted(root.rglob('*.py')):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts) and not path.name.startswith('_sysconfigdata') and path.stat().st_size < 1e6:
            try:
                if ''.join(blocks(path)).strip():
                    files[name.as_posix()] = str(path)
            except SystemExit:
                pass  # not UTF-8, on purpose: Python allows it
    if len(files) < 2:
        raise SystemExit(f'the source of the standard library is not in {root}: prepare a text of yours instead')
    return files


def find_files(paths):
    """{name: path} of files and of folders' files; names are relative to the folder that holds them all."""
    files = {}
    for path in map(Path, itertools.chain(*(not os.path.exists(p) and glob.glob(p) or [p] for p in paths))):
        if not path.exists():
            raise SystemExit(f'{path}: no such file or folder')
        found = [path]
        if path.is_dir():  # hidden files stay out: .git, .venv, and what a Mac writes beside every file
            found = [f for f in path.rglob('*') if (f.suffix.lower() in TEXTS or f.name.endswith(RECORDS))
                     and f.is_file() and '/.' not in '/' + f.relative_to(path).as_posix()]
        found = [os.path.abspath(f) for f in found if f.name.endswith(RECORDS) or any(map(str.strip, blocks(f)))]
        if not found:
            raise SystemExit(f'{path} has no text in it' + f' ({" or ".join(TEXTS)} files)' * path.is_dir())
        files |= {file: file for file in found}
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return {name: path for name, path in sorted((Path(file).relative_to(root).as_posix(), file) for file in files)}


def read_files(files, val_fraction, text_key):
    """{name: path} -> what makes an iterator over (part, document); part is 'train' or 'val', neither stays empty."""
    if any(path.endswith(RECORDS) for path in files.values()):
        return lambda: numbered(documents_of(files.values(), text_key), val_fraction)
    if len(files) > 1:
        held = held_out(files, val_fraction)
        return lambda: (('val' if name in held else 'train', blocks(path)) for name, path in files.items())
    (path,) = files.values()  # I cannot see where its parts begin: its end validates
    cut = cut_point(path, val_fraction)
    return lambda: (('train', blocks(path, 0, cut)), ('val', blocks(path, cut)))


def hub_files(repo, revision, pattern, split, source):
    """Local paths of a hub data set's files, each fetched when its turn comes; source['revision'] tells the commit."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    try:
        try:
            info = HfApi().dataset_info(repo, revision=revision)
            names, commit, offline = [file.rfilename for file in info.siblings], info.sha, False
        except Exception:  # offline, in one of a dozen ways: what was fetched before will do
            root = Path(snapshot_download(repo, repo_type='dataset', revision=revision, local_files_only=True))
            names, commit, offline = [path.relative_to(root).as_posix() for path in root.rglob('*.*')], root.name, True
        source['revision'] = commit
        found = sorted(name for name in names if fnmatch(name, pattern) and name.endswith(TEXTS + RECORDS)
                       and (not split or split in re.split('[^a-z]+', name)))
        for name in found:
            yield hf_hub_download(repo, name, repo_type='dataset', revision=commit, local_files_only=offline)
    except Exception as error:
        raise SystemExit(f'{repo} ({revision}) is out of reach ({type(error).__name__}): go online once, or name a '
                         'mirror by HF_ENDPOINT or a copy by HF_HOME (with HF_HUB_OFFLINE=1 I look nowhere else)')
    shards = found and re.search(r'-of-(\d+)\.parquet$', found[-1])
    if not found or shards and len(found) < int(shards[1]):
        raise SystemExit(f'{repo} ({revision}) lacks files: {len(found)} of {pattern} {split} are there, among '
                         f'{", ".join(sorted(names)[:5])}; see --split and --revision (refs/convert/parquet, say)')

# ---------------------------------------------------------------------------------------------------------------------
# tokens

def train_bpe(texts, vocab_size, path):
    """Learn a byte-level BPE whose id 0 ends a document, save it; returns its size, at most vocab_size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=['<|endoftext|>'], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # so it can spell anything
    bpe.train_from_iterator((line for text in texts for line in LINE_ENDS.split(text)), trainer)
    bpe.save(str(path))
    return bpe.get_vocab_size()


def head(texts, characters):
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def bert_vocabulary():
    from huggingface_hub import hf_hub_download
    problem = None
    for repo, local in ((BERT[0], True), ('bert-base-uncased', True), (BERT[0], False)):  # a copy may bear its old name
        try:
            return hf_hub_download(repo, 'vocab.txt', revision=BERT[1], local_files_only=local)
        except Exception as error:
            problem = type(error).__name__
    raise SystemExit(f'the vocabulary of {BERT[0]} is out of reach ({problem}): go online once, name a copy by '
                     'HF_HOME, or give its vocab.txt as --tokenizer')


def make_tokenizer(tokenizer, vocab_size, texts, path, rule):
    """Write a tokenizer's file to path, if it has one, and return what meta says of it. tokenizer: one of TOKENIZERS,
    or a vocab.txt, a tokenizer.json, a NAME.tiktoken; texts(): the training text in pieces; rule: as in SETS."""
    kind, bos, eos, pad = tokenizer, 0, 0, None
    if tokenizer == 'bytes':
        size = 256
    elif tokenizer == 'gpt2':
        size, bos, eos = 50257, 50256, 50256
    elif tokenizer in ('char', 'text8'):
        kind, words = 'char', set(TEXT8) if tokenizer == 'text8' else set('\ufffd').union(*texts())  # for all others
        path.write_text(json.dumps(['\0'] + sorted(words)))
        size = len(words) + 1
    elif tokenizer == 'bpe':  # a small text cannot teach 4096 tokens: one for every 256 characters
        fits = min(VOCAB_SIZE, max(512, sum(map(len, head(texts(), VOCAB_SIZE * 256))) // 256))
        size = train_bpe(head(texts(), LEARN_FROM), vocab_size or fits, path)
    elif tokenizer.endswith('.tiktoken'):
        kind, size, bos, eos = 'tiktoken', *copy_tiktoken(tokenizer, path)
    else:
        from tokenizers import BertWordPieceTokenizer, Tokenizer, models
        source = bert_vocabulary() if tokenizer == 'bert' else tokenizer
        try:
            kind, words = 'json', None
            if source.endswith('.txt'):
                kind, words = 'bert', BertWordPieceTokenizer(models.WordPiece.read_file(source))
            words = words or Tokenizer.from_file(source)
        except Exception as error:  # `tokenizers` raises nothing finer
            raise SystemExit(f'--tokenizer {source} is none of {", ".join(TOKENIZERS)}, and no vocab.txt or '
                             f'tokenizer.json either: {" ".join(str(error).split())[:120]}')
        words.save(str(path))
        size = 1 + max(words.get_vocab().values())
        pick = lambda *names: next((i for name in names if (i := words.token_to_id(name)) is not None), None)
        eos = pick('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[SEP]')
        bos = pick('<|begin_of_text|>', '<s>', '<bos>', '[CLS]') or eos
        pad = pick('[PAD]', '<pad>') if rule == 'padded' else None
        if kind == 'bert' and rule != 'padded':
            eos = bos  # a quirk of the published packed sets, kept so that numbers compare
        if eos is None:
            raise SystemExit(f'--tokenizer {source} has no token that ends a document, like <|endoftext|> or </s>')
    if rule == 'padded' and pad is None:
        raise SystemExit(f'--tokenizer {tokenizer} has no [PAD], and this set is padded: take its packed form')
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return dict(tokenizer=kind, tokenizer_sha256=digest, vocab_size=size, bos_id=bos, eos_id=eos, pad_id=pad,
                dtype='uint16' if size <= 65535 else 'uint32')


def copy_tiktoken(source, path):
    """A .tiktoken file has no regex and no special tokens: those are of the encoding that it is named after."""
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext import openai_public
    try:
        known, openai_public.load_tiktoken_bpe = openai_public.ENCODING_CONSTRUCTORS, lambda *_, **__: {}
        parts = known[Path(source).stem]()
        ranks = load_tiktoken_bpe(source)
        eos = parts['special_tokens']['<|endoftext|>']
    except Exception as error:
        raise SystemExit(f'--tokenizer {source} is none of {", ".join(known)} by its name and content: {error!r:.99}')
    path.write_text(json.dumps(dict(
        pat_str=parts['pat_str'], special_tokens=parts['special_tokens'],
        mergeable_ranks={base64.b64encode(word).decode(): i for word, i in ranks.items()})))
    return 1 + max([*ranks.values(), *parts['special_tokens'].values()]), eos, eos


def pieces(document, whole=False):
    """(text, does it end the document?), of BATCH characters or less and cut where SAFE; or whole, where not to cut."""
    held = ''
    for block in [''.join(document)] if whole else document:
        held, at = held + block, 0
        while len(held) - at > BATCH and not whole:  # where there is no safe place, any will do
            *_, cut = at + BATCH, *(m.start() for m in SAFE.finditer(held, at + BATCH - WINDOW, at + BATCH))
            yield held[at:cut], False
            at = cut
        held = held[at:]
    yield held, True


def batches(documents, whole):
    """Lists of (part, text, does it end a document?), of about BATCH characters: the same for any number of workers."""
    batch, size = [], 0
    for part, document in documents:
        for text, ends in pieces(document, whole):
            batch.append((part, text, ends))
            size += len(text) + 64
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def begin(*settings):
    """What encode_batch needs, once for each process: text to ids, kind of detokeniser, rule, eos, dtype."""
    global job
    meta, folder, kind = settings
    job = load_tokenizer(meta, folder).array, kind, meta['rule'], meta['eos_id'], meta['dtype']


def encode_batch(batch):
    """-> {part: (tokens, sizes)}; sizes (n,3): of each text its tokens, its bytes, and whether it ends a document."""
    (encode, kind, rule, eos, dtype), out = job, {}
    for part, text, ends in batch:
        raw = detokenise(text, kind).encode(errors='replace')  # a JSON may hold half a character
        ids = np.array(encode(raw.decode()), dtype)
        end = np.array([eos] if ends and rule == 'packed' else [], dtype)
        tokens, sizes = out.setdefault(part, ([], []))
        tokens += ids, end
        sizes.append((len(ids) + len(end), len(raw) + (ends and rule != 'joined'), ends))  # an eos counts as one byte
    return {part: (np.concatenate(tokens), np.array(sizes)) for part, (tokens, sizes) in out.items()}


def work(pipe, *settings):
    """A worker process: batches come in, results go out, until nobody is at the pipe's other end, for any reason."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    begin(*settings)
    inbox = queue.SimpleQueue()

    def receive():  # a thread of its own, or we might both be sending, and nobody read
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put(pipe.recv())
        os._exit(0)
    threading.Thread(target=receive, daemon=True).start()
    with contextlib.suppress(OSError):
        while True:
            try:
                result = encode_batch(inbox.get())
            except BaseException as error:
                result = error
            pipe.send(result)


def result_of(pipe):
    try:
        result = pipe.recv()
    except (EOFError, OSError):  # nothing comes, or half of it
        raise BrokenPipeError
    if isinstance(result, BaseException):
        raise result
    return result


def encoded(batches, workers, *settings):
    """encode_batch of each, in their order; never more than a few are in memory."""
    begin(*settings)
    few = list(itertools.islice(batches, 8))
    if workers == 1 or len(few) < 8:  # so little is done before the others have started
        yield from map(encode_batch, itertools.chain(few, batches))
        return
    spawn, pipes, waiting = multiprocessing.get_context('spawn'), [], collections.deque()
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit this: Ctrl-C is mine to handle
    for _ in range(workers):
        pipe, other = spawn.Pipe()
        spawn.Process(target=work, args=(other, *settings), daemon=True).start()
        other.close()
        pipes.append(pipe)
    signal.signal(signal.SIGINT, usual)
    try:
        for pipe, batch in zip(itertools.cycle(pipes), itertools.chain(few, batches)):
            if len(waiting) == 2 * workers:
                yield result_of(waiting.popleft())
            pipe.send(batch)
            waiting.append(pipe)
        yield from map(result_of, waiting)
    except (BrokenPipeError, ConnectionResetError):
        raise SystemExit('a worker died, out of memory perhaps: nothing was written; fewer --workers need less')
    finally:
        for pipe in pipes:
            pipe.close()


def write_tokens(folder, results, meta, expected, max_tokens):
    """Write encode_batch's results, and the counts into meta; -> (tokens, bytes) at the ends of the last documents."""
    last, began = collections.deque(maxlen=100_001), time.perf_counter()
    done, documents = {part: np.zeros(2, np.int64) for part in ('train', 'val')}, dict(train=0, val=0)  # tokens, bytes
    with contextlib.ExitStack() as stack:
        files = {(part, kind): stack.enter_context(open(folder / f'{part}.{kind}', 'wb'))
                 for part in done for kind in (('bin',) if meta['pad_id'] is None else ('bin', 'idx'))}
        for (_, kind), file in files.items():
            file.write(bytes(8 * (kind == 'idx')))  # the first document begins at 0
        progress = stack.enter_context(tqdm(total=expected, unit=' documents', unit_scale=True, disable=None))
        for result in results:
            for part, (ids, sizes) in result.items():
                files[part, 'bin'].write(ids)
                reached = done[part] + sizes[:, :2].cumsum(0)      # (n,2)
                ends = reached[sizes[:, 2] == 1]
                if (part, 'idx') in files:
                    files[part, 'idx'].write(ends[:, 0].astype(np.uint64))
                last.extend(ends.tolist())
                done[part], documents[part] = reached[-1], documents[part] + len(ends)
            progress.update(sum(documents.values()) - progress.n)
            tokens = int(sum(done.values())[0])
            progress.set_postfix_str(f'{tokens:,} tokens, {tokens / (time.perf_counter() - began):,.0f} tokens/s')
            if max_tokens and tokens >= max_tokens and all(sizes[-1, 2] for _, sizes in result.values()):
                break
    for part, (tokens, size) in done.items():
        meta |= {f'{part}_tokens': int(tokens), f'{part}_bytes': int(size), f'{part}_documents': documents[part]}
    return last


def cut_last(folder, meta, last):
    """The last tenth of the documents validates, at most 100,000: I move their tokens from train.bin to val.bin."""
    documents = min(meta['train_documents'] // 10, 100_000)
    if not documents:
        raise SystemExit(f'{meta["train_documents"]} documents are too few to keep a tenth for validation')
    tokens, size = last[-documents - 1]
    with open(folder / 'train.bin', 'rb+') as train, open(folder / 'val.bin', 'wb') as val:
        train.seek(tokens * np.dtype(meta['dtype']).itemsize)
        shutil.copyfileobj(train, val)
        train.truncate(tokens * np.dtype(meta['dtype']).itemsize)
    for key, value in (('tokens', tokens), ('bytes', size), ('documents', meta['train_documents'] - documents)):
        meta |= {f'train_{key}': value, f'val_{key}': meta[f'train_{key}'] - value}


def remove_stale(data_dir):
    """Remove what runs on this machine left behind that were killed."""
    for path in Path(data_dir).glob(f'.unfinished-{platform.node()}-*') if os.name == 'posix' else []:
        try:
            os.kill(int(path.name.split('-')[-2]), 0)  # no signal, only a look
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError):  # not mine to judge
            pass


def prepare(paths, name=None, tokenizer=None, vocab_size=None, val_fraction=0.05, data_dir='data', text_key='text',
            split='train', revision='main', max_docs=None, max_tokens=None, workers=1):
    """Write the data set and return its meta. If anything goes wrong, an older one of that name stays as it was."""
    known = 'stdlib', *SETS
    ours = paths[0] if len(paths) == 1 and paths[0] in known else None
    hub = re.fullmatch('hf:([^/]+/[^/]+)/?(.*)', paths[0]) if len(paths) == 1 else None
    first = Path(os.path.abspath(paths[0]))
    if name is None:
        name = ours or (hub[1].split('/')[1] if hub else first.name if first.is_dir() else
                        re.sub(r'(\.jsonl)?\.\w+$', '', first.name))
    if not name or name[0] == '.' or name != Path(name).name or '*' in name or name in known and name != ours:
        raise SystemExit(f'{name!r} will not do as the name of your data: choose another with --name')
    target = Path(data_dir, name)
    if target.exists() and (others := set(os.listdir(target)) - FILES):  # somebody's texts, say
        raise SystemExit(f'{target} holds {min(others)}, which is not mine to replace: choose another --name')
    if not 0 < val_fraction < 1:
        raise SystemExit(f'--val_fraction {val_fraction} must lie between 0 and 1')
    for flag, number in (('max_docs', max_docs), ('max_tokens', max_tokens), ('workers', workers)):
        if number is not None and number < 1:
            raise SystemExit(f'--{flag} {number} must be at least 1')

    usual, rule, kind, val, expected = TOKENIZER, 'packed', '-', None, max_docs
    if ours in SETS:
        repo, train, val, column, usual, rule, kind, expected, _ = SETS[ours]
        source, expected = dict(source=repo), min(int(expected), max_docs or int(expected))
        fetch = lambda files: documents_of(hub_files(repo, REVISIONS[repo], files, '', source), column)
        parts = [(part, files) for part, files in (('train', train), ('val', val)) if '*' in files]
        if len(parts) > 1 and max_tokens:
            raise SystemExit(f'--max_tokens would leave nothing of {ours} to validate: limit it by --max_docs')
        few = lambda part, files: itertools.islice(fetch(files), max_docs if part == parts[0][0] else None)
        documents = lambda: (numbered(fetch(train), val_fraction) if val == 'some' else
                             ((part, document) for part, files in parts for document in few(part, files)))
    elif hub:
        source = dict(source=hub[1])
        documents = lambda: numbered(documents_of(hub_files(hub[1], revision, hub[2] or '*', split, source), text_key),
                                     val_fraction)
    else:
        source = dict(source=ours or 'files', revision=None)
        documents = read_files(read_stdlib() if ours else find_files(paths), val_fraction, text_key)
    tokenizer = tokenizer or usual
    if vocab_size is not None and tokenizer != 'bpe':
        raise SystemExit(f'--vocab_size is for bpe: drop it, {tokenizer} has a size of its own')
    if vocab_size is not None and not 257 <= vocab_size <= 65535:
        raise SystemExit(f'--vocab_size {vocab_size} must be 257 (every byte, and eos) to 65535 (what uint16 holds)')
    some = lambda: itertools.islice(documents(), None if ours in SETS and val != 'some' else max_docs)
    # what a tokenizer learns from; of a whole set whose end validates, it never comes that far
    learn = lambda: itertools.islice(some(), max_docs * 9 // 10 if max_docs and val == 'last' else None)

    # I write beside the target and rename at the end, so that whatever stands there is whole.
    os.makedirs(data_dir, exist_ok=True)
    remove_stale(data_dir)
    prefix = f'.unfinished-{platform.node()}-{os.getpid()}-'
    with tempfile.TemporaryDirectory(prefix=prefix, dir=data_dir) as scratch:
        new = Path(scratch, 'new')
        new.mkdir()
        texts = lambda: (text for part, document in learn() if part == 'train' for text, _ in pieces(document))
        meta = dict(name=name, rule=rule) | make_tokenizer(tokenizer, vocab_size, texts, new / 'tokenizer.json', rule)
        whole = kind != '-' or meta['tokenizer'] == 'json'  # their rules may look across any place
        results = encoded(batches(some(), whole), workers, meta, new, kind)
        last = write_tokens(new, results, meta, expected, max_tokens)
        if val == 'last':
            cut_last(new, meta, last)
        for part in ('train', 'val'):
            if meta[f'{part}_tokens'] <= meta[f'{part}_documents'] and (part == 'val' or rule != 'joined'):
                raise SystemExit(f'too little text to keep {val_fraction:.0%} of it for validation: prepare more')
        digest = hashlib.sha256()  # of train.bin, then val.bin, as they are on the disk
        for part in ('train', 'val'):
            with open(new / f'{part}.bin', 'rb') as file:
                hashlib.file_digest(file, lambda: digest)
        meta |= source | dict(documents=meta['train_documents'] + meta['val_documents'], checksum=digest.hexdigest())
        (new / 'meta.json').write_text(json.dumps(meta, indent=4) + '\n')
        if target.exists():
            target.rename(Path(scratch, 'old'))
        new.rename(target)
    return meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'prepare.py: {message} (see --help)\n')  # one line, like the others
    add = parser.add_argument
    add('paths', nargs='*', help='what to prepare: see above', metavar='stdlib|SET|zeroshot|PATH|hf:ORG/NAME')
    add('--list', action='store_true', help='show the published sets, and stop; zeroshot is all that are joined')
    add('--name', help='what to call it; without it, as the set, or the first file or folder, is called')
    add('--tokenizer', help=f'{", ".join(TOKENIZERS)}, a tokenizer.json, a BERT vocab.txt or a .tiktoken; default: the '
        f'published one, or {TOKENIZER}')
    add('--vocab_size', type=int, help=f'of bpe; default: {VOCAB_SIZE}, less for under 1 MB of text')
    add('--val_fraction', type=float, default=0.05, help='share that validates; default: 0.05')
    add('--data_dir', default='data', help='where the data sets are; default: data')
    add('--text_key', default='text', help='where in a record the text is; default: text')
    add('--split', default='train', help='of hf:ORG/NAME; default: train')
    add('--revision', default='main', help='of hf:ORG/NAME; default: main')
    add('--max_docs', type=int, help='stop after so many documents')
    add('--max_tokens', type=int, help='stop soon after so many tokens')
    add('--workers', type=int, default=os.cpu_count(), help='processes; default: as many as there are cores')
    args = parser.parse_args()
    if args.list:
        for row in COLUMNS, *([name, *row, REVISIONS[row[0]]] for name, row in SETS.items()):
            print(*(f'{cell:{width}}' for cell, width in zip(row, (12, 28, 19, 32, 9, 9, 7, 11, 9, 6, 0))))
    elif not args.paths:
        parser.error('required: stdlib, a set that --list shows, or a text of yours')
    os.environ.setdefault('HF_HUB_VERBOSITY', 'error')  # it would list its retries
    for paths in [] if args.list else [[name] for name in ZEROSHOT] if args.paths == ['zeroshot'] else [args.paths]:
        begun, options = time.perf_counter(), {key: value for key, value in vars(args).items() if key != 'list'}
        try:
            meta = prepare(**options | dict(paths=paths))
        except KeyboardInterrupt:
            raise SystemExit('stopped: nothing was written')
        except ImportError as error:
            raise SystemExit(f'a package is missing: pip install {error.name}')
        except OSError as error:  # no permission, no space, ...
            raise SystemExit(f'nothing was written: {error}')
        tokens, size = (meta[f'train_{x}'] + meta[f'val_{x}'] for x in ('tokens', 'bytes'))
        print(f'{Path(args.data_dir, meta["name"])}: {meta["train_tokens"]:,} tokens to train on, '
              f'{meta["val_tokens"]:,} to validate; {meta["tokenizer"]}, vocabulary {meta["vocab_size"]:,}, '
              f'{size / tokens:.2f} bytes per token; documents: {meta["documents"]:,}; '
              f'{time.perf_counter() - begun:.1f} s')


if __name__ == '__main__':
    main()
