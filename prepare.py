"""
Text -> token files: data/NAME/{train,val}.bin and meta.json (data.py says what is in them).

    python prepare.py stdlib                          # Python's own source, found on this machine
    python prepare.py owt                             # a published set by its published rules
    python prepare.py zeroshot                        # all sets for zero-shot evaluation
    python prepare.py book.txt                        # your text: of one file, the end validates
    python prepare.py notes/ more.txt --name notes    # of many files, one in twenty
    python prepare.py dumps/*.jsonl.gz --name dumps --text_key body --tokenizer gpt2
    python prepare.py hf:org/name --tokenizer bert    # of the hub; or hf:org/name/some/*.parquet

A named file may be any UTF-8 text, or hold one document per record: .jsonl, .jsonl.gz, .jsonl.zst
or .parquet. Of a folder, every .txt, .md and record file is taken, at any depth.
"""
import fcntl
import fnmatch
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from configurator import UserError, configure, run
from data import LINE_ENDS, check_meta, guarded, load_tokenizer

name = ''                     # what to call it; '': as the set, or the first file or folder
tokenizer = ''                # bytes, bpe (learnt from the text), gpt2, bert, or the path of a
                              # tokenizer.json or a BERT vocab.txt; '': the published one, or bpe
vocab_size = 0                # of bpe; 0: 4096, less for under 1 MB of text
val_fraction = 0.05           # share that validates
data_dir = 'data'             # where the data sets are
text_key = 'text'             # where in a record the text is
revision = 'main'             # of hf:ORG/NAME
max_docs = 0                  # stop after so many documents
max_tokens = 0                # stop soon after so many training tokens
workers = os.cpu_count()      # threads
CHECKS = [
    ('vocab_size max_docs max_tokens workers', lambda v: v >= 0, 'at least 0'),
    ('val_fraction', lambda v: 0 < v < 1, 'between 0 and 1'),
]
VOCAB_SIZE = 4096             # of a BPE learnt here; a small text gets fewer tokens
LEARN_FROM = 100_000_000      # characters of the training text that teach a BPE
RECORD = 2 ** 26              # characters: a longer line is no record
PIECE = 2 ** 16               # characters: a longer text is tokenised in pieces
ROWS = 16                     # pieces that a thread is given at a time
PARTS = ('train', 'val')
FILES = set('train.bin val.bin train.idx val.idx train.bytes val.bytes meta.json tokenizer.json'
            .split())
TEXTS = ('.txt', '.md')
RECORDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet')
# Of the standard library: no tests, no generated tables, nothing that belongs to one machine.
LEFT_OUT = re.compile(r'/(test|tests|idle_test|encodings|pydoc_data|entities\.py|stringprep\.py|'
                      r'_casefix\.py|site-packages|dist-packages|sitecustomize\.py)(/|$)'
                      r'|_sysconfigdata')
# Of the tokenizers of others: what begins a document, ends it, pads a row.
SPECIAL = ('<|begin_of_text|> <s> <bos> [CLS]',
           '<|endoftext|> <|end_of_text|> </s> <eos> [SEP]',
           '[PAD] <pad>')
# What divides the text in a tokenizer.json like ours; of others nothing is known.
KINDS = {'ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)': 'bpe',
         'BertPreTokenizer()': 'bert'}

# --------------------------------------------------------------------------------------------------
# the published sets

# Files are parquet. 'last': the last tenth validates, at most 100,000 documents; 'some': documents
# picked by a hash. 'joined' is 'packed' without an eos between documents, as zero-shot perplexities
# are published. --help shows this table.
TABLE = """
SET  hub_id train_files val_files column tokenizer rule detokeniser documents GB
owt: Skylion007/openwebtext plain_text/train-* last text gpt2 packed - 8013769 24
lm1b: billion-word-benchmark/lm1b plain_text/train/* plain_text/test/*
    text bert padded lm1b 30607716 2.6
lm1b_packed: billion-word-benchmark/lm1b plain_text/train/* plain_text/test/*
    text bert packed lm1b 30607716 2.6
fineweb_edu: HuggingFaceFW/fineweb-edu sample/10BT/* some text gpt2 packed - 9672101 29
ptb: ptb-text-only/ptb_text_only - penn_treebank/validation/*
    sentence gpt2 joined ptb 3370 0.001
wikitext2: Salesforce/wikitext - wikitext-2-raw-v1/validation-*
    text gpt2 joined wikitext 3760 0.001
wikitext103: Salesforce/wikitext - wikitext-103-raw-v1/validation-*
    text gpt2 joined wikitext 3760 0.001
lm1b_gpt2: billion-word-benchmark/lm1b - plain_text/test/* text gpt2 joined lm1b 306688 0.03
lambada: EleutherAI/lambada_openai - default/*test* text gpt2 joined lambada 5153 0.002
ag_news: fancyzhx/ag_news - data/test-* text gpt2 joined - 7600 0.002
pubmed: armanc/scientific_papers - pubmed/validation/* article gpt2 joined papers 6633 0.06
arxiv: armanc/scientific_papers - arxiv/validation/* article gpt2 joined papers 6436 0.1
"""
__doc__ += TABLE
SETS = {key: row.split() for key, row in re.findall(r'^(\w+):(.*(?:\n .*)*)', TABLE, re.MULTILINE)}
ZEROSHOT = [name for name, row in SETS.items() if 'joined' in row]
# `datasets` runs no loading scripts: of sets that have one, the hub's conversion is taken.
REVISIONS = dict(row.split() for row in """\
Skylion007/openwebtext        b4325f019c648b1641a1784748667e8b74e5e064
billion-word-benchmark/lm1b   8d52bfd3cc2819fc1166dbb8144c328e2690de3e
HuggingFaceFW/fineweb-edu     87f09149ef4734204d70ed1d046ddc9ca3f2b8f9
Salesforce/wikitext           b08601e04326c79dfdd32d625aee71d232d685c3
EleutherAI/lambada_openai     900124bf3b8235c6daf21033af9948b3f07346c4
fancyzhx/ag_news              eb185aade064a813bc0b7f42de02595523103ca4
ptb-text-only/ptb_text_only   refs/convert/parquet
armanc/scientific_papers      refs/convert/parquet
google-bert/bert-base-uncased 86b5e0934494bd15c9632b12f734a8a67f723594""".splitlines())
BERT = 'google-bert/bert-base-uncased'

# Undo the tokenisation that a set was published in, as its published perplexities do. Each line is
# a regex and its replacement, with _ for a space; their order counts.
WIKITEXT = r"""
s_'                   s'
_@([-,.])@_           \1
_(:)_                 \1_
_(;)_                 \1_
_(\.)_                \1_
_(!)_                 \1_
_(\?)_                \1_
_(,)_                 \1_
\(\s*([^)]*?)\s*\)    (\1)
\[\s*([^\]]*?)\s*\]   [\1]
\{\s*([^}]*?)\s*\}    {\1}
"\s*([^"]*?)\s*"      "\1"
'\s*([^']*?)\s*'      '\1'
=_=_=_=               ====
=_=_=                 ===
=_=                   ==
_°_                   °
_\n                   \n
\n_                   \n
_N_                   _1_
_'s                   's"""
LM1B = r"""
(https?)_:_/_/_       \1://
_'(\w+)               '\1
_(\w+)_\._            _\1._
_(\w+)_\.$            _\1.
_\?_                  ?_
_\?$                  ?
_!_                   !_
_!$                   !
_,_                   ,_
_:_                   :_
_;_                   ;_
_/_                   /
"_([^"]+)_"           "\1"
'_([^']+)_'           '\1'
\(_([^()]+)_\)        (\1)
\[_([^\[\]]+)_\]      [\1]
\$_                   $
£_                    £"""
PTB = r"""
_'s                   's
s_'_                  s'_
_n't                  n't
_\n_                  \n
\\/                   /
(?<=_)N(?=_)          1
([$#])_1              \g<1>1
<unk>                 ?"""
LAMBADA = r"""
[“”]                  "
(?s)\A\s*(.*?)\s*\Z   \n\1"""

TABLES = {'-': '', 'wikitext': WIKITEXT, 'lm1b': LM1B, 'papers': WIKITEXT + LM1B, 'ptb': PTB,
          'lambada': LAMBADA}
RULES = {kind: [[cell.replace('_', ' ') for cell in row.split()]
                for row in table.strip().splitlines()]
         for kind, table in TABLES.items()}


def detokenise(text, kind):
    for pattern, replacement in RULES[kind]:
        text = re.sub(pattern, replacement, text)
    return text

# --------------------------------------------------------------------------------------------------
# documents: each is a pair (does it validate?, its text)

def read_text(path):
    """The text of a UTF-8 file, without a byte-order mark; line ends become \n."""
    try:
        text = Path(path).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text (byte {error.start}): convert it first')
    if '\0' in text:
        raise UserError(f'{path} is not text: it holds a NUL byte')
    return text.replace('\r\n', '\n')


def read_rows(path):
    """Yield the records of a .jsonl file, compressed or not, or of a .parquet file."""
    if path.endswith('.parquet'):
        import datasets
        yield from datasets.load_dataset('parquet', data_files=glob.escape(path), split='train',
                                         streaming=True)
        return
    import pyarrow  # the 'json' loader makes dates of texts, and refuses a field that appears late
    with pyarrow.input_stream(path) as file:
        text = io.TextIOWrapper(file, encoding='utf-8')
        while line := text.readline(RECORD):
            if len(line) == RECORD:
                raise ValueError(f'a line of {RECORD:,} characters or more')
            if line.strip():
                yield json.loads(line)


def read_file(path, key):
    """Yield the texts of a file: of a record file, what stands under a key or in a column."""
    if not path.endswith(RECORDS):
        yield read_text(path)
        return
    number = 0
    try:
        for row in read_rows(path):
            number += 1
            yield row[key].encode(errors='replace').decode()  # JSON may hold half a character
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f'{path}: no text under {key!r} (--text_key) after record {number}: '
                        f'{error!r:.200}')


def score(key):
    """A number in [0, 1) made from the key alone: no other document changes it."""
    return int(hashlib.sha256(os.fsencode(key)).hexdigest()[:8], 16) / 2**32


def end_validates(path, val_fraction):
    """One text in two parts, cut where a paragraph begins, or a line, or at least a character."""
    text = read_text(path)
    raw = text.encode()
    cut = len(raw[:round(len(raw) * (1 - val_fraction))].decode(errors='replace'))
    near = round(len(text) * min(val_fraction, 1 - val_fraction) / 2)
    for end in ('\n\n', '\n'):
        place = text.rfind(end, cut - near, cut)
        if place >= 0:
            cut = place + len(end)
            break
    return [(True, text[cut:]), (False, text[:cut])]


def find_files(paths):
    """{name: path} of files, and of the texts and records in folders, at any depth, but for hidden
    ones; names are relative to their common folder. Blank texts are left out."""
    found = []
    for path in paths:
        files = [path]
        if os.path.isdir(path):
            files = glob.glob(f'{glob.escape(path)}/**', recursive=True)
            files = [file for file in files if file.endswith(TEXTS + RECORDS)]
        for file in files:
            if not os.path.isfile(file):
                raise UserError(f'{file!r} is not there, or no regular file')
            if file.endswith(RECORDS) or read_text(file).strip():
                found.append(os.path.abspath(file))
    if not found:
        raise UserError(f'no text in {", ".join(paths)}: of folders, {TEXTS + RECORDS} are read')
    root = os.path.commonpath([os.path.dirname(file) for file in found])
    return {os.path.relpath(file, root): file for file in sorted(found)}


def stdlib_files():
    """{name: path} of the standard library's source, as people wrote it."""
    root = os.path.dirname(os.__file__)
    paths = glob.glob(f'{root}/**/*.py', recursive=True)
    return find_files([path for path in paths if not LEFT_OUT.search(path[len(root):])])


def split_files(files, val_fraction, text_key):
    """Documents of {name: path}; neither split stays empty."""
    if any(path.endswith(RECORDS) for path in files.values()):
        texts = (text for path in files.values() for text in read_file(path, text_key))
        return ((score(str(i)) < val_fraction, text) for i, text in enumerate(texts))
    if len(files) == 1:
        return end_validates(*files.values(), val_fraction)
    ranked = sorted(map(score, files))
    bar = min(max(val_fraction, ranked[0]), ranked[-2])
    return ((score(name) <= bar, read_text(path)) for name, path in files.items())


def hub_texts(repo, revision, pattern, key):
    """Texts of a hub set's files, each fetched when its turn comes: few texts need few files."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError
    try:
        info = HfApi().dataset_info(repo, revision=revision)
        names = sorted(file.rfilename for file in info.siblings)
        for name in fnmatch.filter(names, pattern or '*train*'):
            path = hf_hub_download(repo, name, repo_type='dataset', revision=info.sha)
            yield from read_file(path, key)
    except (OSError, ValueError, HTTPError) as error:       # ValueError: an impossible name
        raise UserError(f'{repo} ({revision}) is out of reach ({error!r:.99}): go online, or name '
                        'a mirror by HF_ENDPOINT')


def read_hub(row, revision, val_fraction, max_docs):
    """Documents of a hub set, by a row as in SETS; what validates by itself is never shortened."""
    repo, train, val, column, _, _, _, total, _ = row
    revision = REVISIONS.get(repo, revision)
    if '*' in val:
        for text in hub_texts(repo, revision, val, column):
            yield True, text
    if train != '-':
        total = min(int(total), max_docs or sys.maxsize)
        first = total - min(total // 10, 100_000)
        texts = islice(hub_texts(repo, revision, train, column), max_docs or None)
        for number, text in enumerate(texts):
            some = val == 'some' and score(str(number)) < val_fraction
            yield some or val == 'last' and number >= first, text

# --------------------------------------------------------------------------------------------------
# tokenizers

def train_bpe(texts, vocab_size, path):
    """Learn and save a byte-level BPE whose id 0 ends a document; -> its size, <= vocab_size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that any text can be spelled
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=['<|endoftext|>'],
                                  initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((line for text in texts for line in LINE_ENDS.split(text)), trainer)
    bpe.save(str(path))
    return bpe.get_vocab_size()


def head(texts, characters):
    """The first of the texts, up to the one that reaches so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def write_vocabulary(source, path):
    """Write a vocab.txt or a tokenizer.json to path, as a tokenizer.json; -> its kind and ids."""
    from huggingface_hub import hf_hub_download
    from tokenizers import BertWordPieceTokenizer, Tokenizer, models
    if source == 'bert':
        source = hf_hub_download(BERT, 'vocab.txt', revision=REVISIONS[BERT])
    if source.endswith('.txt'):
        BertWordPieceTokenizer(models.WordPiece.read_file(source)).save(str(path))
    else:
        shutil.copyfile(source, path)
    vocabulary = Tokenizer.from_file(str(path))
    return KINDS.get(str(vocabulary.pre_tokenizer), 'json'), vocabulary.get_vocab()


def make_tokenizer(tokenizer, vocab_size, texts, path, rule):
    """Write a tokenizer's file to path, if it has one, and return what meta says of it.
    tokenizer: as --tokenizer; texts(): the training text; rule: as in SETS."""
    kind, size, bos, eos, pad = tokenizer, 256, 0, 0, 'none'
    if tokenizer == 'gpt2':
        size, bos, eos = 50257, 50256, 50256
    elif tokenizer == 'bpe':
        if not vocab_size:  # a small text cannot teach 4096 tokens: one for every 256 characters
            known = sum(map(len, head(texts(), VOCAB_SIZE * 256)))
            vocab_size = min(VOCAB_SIZE, max(512, known // 256))
        size = train_bpe(head(texts(), LEARN_FROM), vocab_size, path)
    elif tokenizer != 'bytes':
        kind, ids = guarded(f'--tokenizer {tokenizer} is not to be had: give bytes, bpe, gpt2, '
                            'bert (fetched from the hub once), a vocab.txt or a tokenizer.json',
                            write_vocabulary, tokenizer, path)
        size = 1 + max(ids.values())
        bos, eos, pad = (next((ids[name] for name in names.split() if name in ids), 'none')
                         for names in SPECIAL)
        bos = eos if bos == 'none' else bos
    if kind == 'bert' and rule != 'padded':
        eos = bos  # a quirk of the published packed sets, kept so that numbers compare
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    meta = dict(tokenizer=kind, tokenizer_sha256=digest, vocab_size=size, bos_id=bos, eos_id=eos,
                pad_id=pad if rule == 'padded' else None,
                dtype='uint16' if size <= 65535 else 'uint32')
    guarded(f'--tokenizer {tokenizer} will not do: it needs a token that ends a document, like '
            '</s>, and for an unpacked set one for the pads, like [PAD]', check_meta, meta)
    return meta

# --------------------------------------------------------------------------------------------------
# documents -> pieces of text -> tokens -> token files

def pieces(documents, length):
    """Yield rows: text, does it end a document?, does it validate? A document longer than length is
    cut between lines, where no tokenizer joins anything."""
    ends = False
    for val, text in documents:
        start, ends = 0, False
        while not ends:
            safe = LINE_ENDS.search(text, start + length)
            ends = safe is None
            end = len(text) if ends else safe.start()
            yield text[start:end], ends, val
            start = end
    if not ends:
        raise UserError('there is no document: check the path, and the names of the files')


def encode_row(row, encode, detokeniser, meta):
    """-> does it end a document?, does it validate?, its bytes, its tokens."""
    text, ends, val = row
    text = detokenise(text, detokeniser)
    eos = [meta['eos_id']] if ends and meta['rule'] == 'packed' else []
    size = len(text.encode()) + (ends and meta['rule'] != 'joined')     # a document's end is a byte
    return ends, val, size, np.array(encode(text) + eos, meta['dtype'])


def in_threads(function, rows, workers):
    """Yield function(row) of each row, in order; few rows are in memory. Threads suffice, as the
    tokenizers release the interpreter's lock."""
    many = lambda some: [function(row) for row in some]
    waiting = deque()
    with ThreadPoolExecutor(workers or 1) as pool:
        while some := list(islice(rows, ROWS)):
            waiting.append(pool.submit(many, some))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def write_tokens(folder, rows, sizes, max_tokens, meta):
    """Write the token files of both splits, and their counts into meta. sizes: bytes of each token.
    The document that reaches max_tokens is the last one, and a long one may be cut."""
    files = [open(folder / f'{part}.bin', 'wb') for part in PARTS]
    starts = [array('Q', [0]), array('Q', [0])]     # where documents begin, in tokens
    counts = np.zeros((2, 3), int)                  # of each split: tokens, bytes, bytes by sizes
    for ends, val, size, ids in rows:
        part = int(val)
        files[part].write(ids)
        counts[part] += len(ids), size, sizes[ids].sum()
        enough = 0 < max_tokens <= counts[0, 0]
        if ends or enough:
            starts[part].append(counts[part, 0])
        if enough:
            break
    for part, file, begin, (tokens, size, known) in zip(PARTS, files, starts, counts.tolist()):
        file.close()
        documents = len(begin) - 1
        if tokens <= documents and meta['rule'] != 'joined':
            raise UserError('too little text to train and to validate on: prepare more')
        meta.update({f'{part}_tokens': tokens, f'{part}_bytes': size,
                     f'{part}_documents': documents})
        if known:
            (sizes * (size / known)).tofile(folder / f'{part}.bytes')
        if meta['rule'] == 'padded':
            (folder / f'{part}.idx').write_bytes(begin)


def choose_target(name, data_dir):
    """The folder of the new set; UserError where it may not be replaced."""
    if not re.fullmatch(r'[^./*][^/*]*', name):
        raise UserError(f'{name!r} will not do as the name of a data set: choose another --name')
    target = Path(data_dir, name)
    foreign = set(os.listdir(target)) - FILES if target.exists() else []
    if foreign:
        raise UserError(f'{target} holds {min(foreign)}, which is no part of a data set: choose '
                        'another --name')
    return target


def settle(target, older):
    """Wherever the renames were stopped: the older set goes back, or goes if the new is there."""
    if older.exists() and not target.exists():
        older.rename(target)
    shutil.rmtree(older, ignore_errors=True)


@contextmanager
def replacing(target):
    """An empty folder, for this process alone, that takes the target's place at the end. Until then
    the older target stays, whatever goes wrong; the next start puts in order what a kill left."""
    scratch, older = (target.with_name(f'.{target.name}.{end}') for end in ('unfinished', 'old'))
    new = scratch / 'new'
    scratch.mkdir(parents=True, exist_ok=True)
    with open(scratch / 'lock', 'w') as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another prepare.py is at work in {scratch}: wait, or choose another '
                            '--name')
        except OSError:
            pass                                    # of a file system that has no locks
        try:
            settle(target, older)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            os.sync()                               # a machine may die, too
            if target.exists():
                target.rename(older)
            new.rename(target)
        finally:
            settle(target, older)
            shutil.rmtree(scratch, ignore_errors=True)


def prepare(paths, name, tokenizer, vocab_size, val_fraction, data_dir, text_key, revision,
            max_docs, max_tokens, workers):
    """Write the data set and return its meta. An older one of that name stays until the new one is
    in its place, whatever goes wrong."""
    # 1. WHERE the documents come from, and the rules
    source = paths[0]
    row = SETS.get(source, ['', '', 'some', text_key, 'bpe', 'packed', '-', 10**12, 0])
    _, _, val_files, _, usual, rule, detokeniser, _, _ = row
    if val_files == 'last' and max_tokens:
        raise UserError(f'the last documents of {source} validate: limit it by --max_docs')
    if source.startswith('hf:'):
        row[:2] = re.fullmatch('hf:([^/]*/?[^/]*)/?(.*)', source).groups()
    if row[0]:
        documents = lambda: read_hub(row, revision, val_fraction, max_docs)
    else:
        files = stdlib_files() if paths == ['stdlib'] else find_files(paths)
        documents = lambda: islice(split_files(files, val_fraction, text_key), max_docs or None)
    name = name or re.sub(r'(\.jsonl)?\.\w+$', '', Path(source).name)

    # 2. TOKENS
    with replacing(choose_target(name, data_dir)) as new:
        training = lambda: (text for val, text in documents() if not val)
        meta = make_tokenizer(tokenizer or usual, vocab_size, training, new / 'tokenizer.json',
                              rule)
        meta.update(name=name, source=source, rule=rule)
        encode, _, size = load_tokenizer(meta, new)
        work = partial(encode_row, encode=encode, detokeniser=detokeniser, meta=meta)
        # rules and tokenizers of others may look across any place
        by_pieces = detokeniser == '-' and meta['tokenizer'] != 'json'
        length = min(PIECE, max_tokens or PIECE) if by_pieces else sys.maxsize
        rows = in_threads(work, pieces(documents(), length), workers)
        sizes = np.array([size(i) for i in range(meta['vocab_size'])])
        sizes[meta['eos_id']] = 1
        write_tokens(new, rows, sizes, max_tokens, meta)
        (new / 'meta.json').write_text(json.dumps(meta, indent=4) + '\n')
    return meta


def main():
    paths, options = [], []
    args = iter(sys.argv[1:] or ['--help'])
    for arg in args:
        if arg.startswith('--') and '=' not in arg:
            arg = '='.join([arg, *islice(args, 1)])             # --name value
        (options if arg.startswith('-') else paths).append(arg)
    settings = configure(globals(), CHECKS, options)
    try:
        ''.join(sys.argv).encode()
    except UnicodeEncodeError:
        raise UserError('a name that is not UTF-8 text cannot be used: rename the file')
    # `datasets` would import torch, ask the network of a local file, warn of forks
    os.environ.update(USE_TORCH='0', HF_UPDATE_DOWNLOAD_COUNTS='0', TOKENIZERS_PARALLELISM='false')
    for sources in [[name] for name in ZEROSHOT] if paths == ['zeroshot'] else [paths]:
        meta = prepare(sources, **settings)
        print(f'{settings["data_dir"]}/{meta["name"]}: {meta["train_tokens"]:,} tokens to train '
              f'on, {meta["val_tokens"]:,} to validate; {meta["tokenizer"]}, vocabulary '
              f'{meta["vocab_size"]:,}')


if __name__ == '__main__':
    run(main)
