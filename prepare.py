"""
Text -> token files: data/NAME/{train,val}.bin and meta.json (data.py says what is in them).

    python prepare.py stdlib                          # Python's own source, found on this machine
    python prepare.py owt                             # a published set by its published rules
    python prepare.py zeroshot                        # all sets for zero-shot evaluation
    python prepare.py book.txt                        # your text; its end is held out to validate
    python prepare.py notes/ more.txt --name notes    # many files; one in twenty is held out
    python prepare.py dumps/*.jsonl.gz --name dumps --text_key body --tokenizer gpt2
    python prepare.py hf:org/name --tokenizer bert    # from the Hugging Face hub
    python prepare.py 'hf:org/name/some/*.parquet' --name some

A named file may be any UTF-8 text, or hold one document per record: .jsonl, .jsonl.gz, .jsonl.zst
or .parquet. From a folder, every .txt, .md and record file is taken, at any depth.
"""
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
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from configurator import UserError, configure, progress, run

import numpy as np

from data import LINE_ENDS, guarded, load_tokenizer, token_dtype

name = ''                     # of the new data set; '': the set's, or the first file's or folder's
tokenizer = ''                # bytes, bpe (learnt from the text), gpt2, bert, or the path of a
                              # tokenizer.json or a BERT vocab.txt; '': the published one, or bpe
vocab_size = 0                # for bpe; 0: 4096, fewer for less than 1 MB of text
val_fraction = 0.05           # share held out for validation
data_dir = 'data'             # where the data sets are
text_key = 'text'             # where in a record the text is
max_docs = 0                  # stop after this many documents
max_tokens = 0                # stop at this many training tokens
CHECKS = [
    ('max_docs max_tokens', lambda v: 0 <= v < 2 ** 63, 'at least 0 and below 2^63'),
    ('vocab_size', lambda v: 0 <= v < 999_999, 'at least 0 and below 999,999'),
    ('val_fraction', lambda v: 0 < v < 1, 'between 0 and 1'),
]
VOCAB_SIZE = 4096             # of a BPE learnt here; a small text gets fewer tokens
LEARN_FROM = 100_000_000      # characters of the training text that teach a BPE
RECORD = 2 ** 26              # characters: a longer line is refused
PIECE = 2 ** 14               # characters: a longer text is tokenised in pieces
BATCH = 16                    # pieces in a task of the thread pool
QUEUE = 32                    # tasks that may wait
PARTS = ('train', 'val')
TEXTS = ('.txt', '.md')
RECORDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet')
# Left out of the standard library: tests, generated tables, and what belongs to one machine only.
LEFT_OUT = re.compile(r'/(test|tests|idle_test|encodings|pydoc_data|entities\.py|stringprep\.py|'
                      r'_casefix\.py|site-packages|dist-packages|sitecustomize\.py)(/|$)'
                      r'|_sysconfigdata')
# Pre-tokenizer of a tokenizer.json -> our name for its kind; its bos, eos (and pad) tokens.
TOKENIZER_KINDS = {
    'ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)':
        ('bpe', '<|endoftext|> <|endoftext|>'),
    'BertPreTokenizer()':
        ('bert', '[CLS] [SEP] [PAD]'),
}

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
# `datasets` runs no loading scripts: for sets with one, the hub's parquet conversion is used.
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
# documents: each is a pair (is it for validation?, its text)

def read_records(path, key):
    """Yield the records of a file. A plain text is one record, {key: text}, without a byte-order
    mark and with \\n for \\r\\n."""
    if path.endswith('.parquet'):
        import datasets
        yield from datasets.load_dataset('parquet', data_files=glob.escape(path), split='train',
                                         streaming=True)
    elif path.endswith(RECORDS):
        import pyarrow  # the 'json' loader turns texts into dates, and refuses late fields
        with pyarrow.input_stream(path) as file:
            text = io.TextIOWrapper(file, encoding='utf-8')
            while line := text.readline(RECORD):
                if len(line) == RECORD:
                    raise ValueError(f'a line of {RECORD:,} characters or more')
                if line.strip():
                    yield json.loads(line)
    else:
        with open(path, encoding='utf-8-sig', newline='') as file:
            text = file.read().replace('\r\n', '\n')
        if '\0' in text:
            raise ValueError('it holds a NUL byte')
        yield {key: text}


def read_texts(paths, key):
    """Yield the texts of files: from a record file, the field or column named key."""
    for path in paths:
        number = 0
        try:
            for record in read_records(path, key):
                number += 1
                # JSON may hold half of a surrogate pair
                yield record[key].encode(errors='replace').decode()
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise UserError(f'{path}: no UTF-8 text under {key!r} (--text_key) after record '
                            f'{number}: {type(error).__name__}: {error!s:.200}')


def hash_share(key):
    """A number in [0, 1) made from the key alone: no other document changes it."""
    return int(hashlib.sha256(os.fsencode(key)).hexdigest()[:8], 16) / 2**32


def end_validates(text, val_fraction):
    """Split one text, the end for validation: before a paragraph, else a line, else a character."""
    raw = text.encode()
    cut = len(raw[:round(len(raw) * (1 - val_fraction))].decode(errors='replace'))
    near = round(len(text) * min(val_fraction, 1 - val_fraction) / 2)
    for end in ('\n\n', '\n', ''):
        place = text.rfind(end, max(0, cut - near), cut)
        if place >= 0:
            break
    cut = place + len(end)
    return [(True, text[cut:]), (False, text[:cut])]


def find_files(paths, text_key):
    """{name: path} of files, and of the texts and records in folders, at any depth, except hidden
    ones; names are relative to their common folder. Blank texts are left out."""
    files = []
    for path in paths:
        inside = glob.glob(f'{glob.escape(path)}/**', recursive=True)
        files += [file for file in inside if file.endswith(TEXTS + RECORDS)] or [path]
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f'{file!r} is no regular file, nor a folder with {TEXTS + RECORDS}')
    found = sorted(os.path.abspath(file) for file in files
                   if file.endswith(RECORDS) or next(read_texts([file], text_key)).strip())
    if not found:
        raise UserError(f'no text in {", ".join(paths)}')
    root = os.path.commonpath([os.path.dirname(file) for file in found])
    return {os.path.relpath(file, root): file for file in found}


def stdlib_files():
    """Paths of the standard library's source files, without those of LEFT_OUT."""
    root = os.path.dirname(os.__file__)
    paths = glob.glob(f'{root}/**/*.py', recursive=True)
    return [path for path in paths if not LEFT_OUT.search(path[len(root):])]


def hub_files(repo, pattern):
    """Paths of a hub set's files, each fetched when its turn comes: few texts need few files."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError
    try:
        info = HfApi().dataset_info(repo, revision=REVISIONS.get(repo))
        names = fnmatch.filter((file.rfilename for file in info.siblings), pattern or '*train*')
        for name in sorted(names):
            yield hf_hub_download(repo, name, repo_type='dataset', revision=info.sha)
    except (OSError, ValueError, HTTPError) as error:       # ValueError: an impossible name
        raise UserError(f'{repo} cannot be reached ({error!r:.99}): go online, or set a mirror in '
                        'HF_ENDPOINT')


def read_documents(rules, files, val_fraction, max_docs):
    """Documents of a set, by rules as in SETS: from the hub, or from files {name: path}. Published
    validation files are never shortened; of several texts, each split gets at least one."""
    repo, train, val, column, *_, total, _ = rules
    paths = hub_files(repo, train) if repo else files.values()
    texts = islice(read_texts(paths, column), max_docs or None)
    if '*' in val:
        held = read_texts(hub_files(repo, val), column)
        return chain(((True, text) for text in held), ((False, text) for text in texts))
    if val == 'last':
        total = min(int(total), max_docs or sys.maxsize)
        first = total - min(total // 10, 100_000)
        return ((number >= first, text) for number, text in enumerate(texts))
    if repo or any(name.endswith(RECORDS) for name in files):
        return ((hash_share(str(number)) < val_fraction, text)
                for number, text in enumerate(texts))
    if len(files) == 1:
        return end_validates(*texts, val_fraction)
    ranked = sorted(map(hash_share, files))
    bar = min(max(val_fraction, ranked[0]), ranked[-2])
    return zip((hash_share(name) <= bar for name in files), texts)

# --------------------------------------------------------------------------------------------------
# tokenizers

def train_bpe(texts, vocab_size, path):
    """Learn and save a byte-level BPE of at most vocab_size tokens, whose id 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    taught, size = [], 0
    for text in progress(texts, 'reading'):
        taught.append(text)
        size += len(text)
        if size >= LEARN_FROM:
            break
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or min(VOCAB_SIZE, max(512, size // 256)),
        special_tokens=['<|endoftext|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),   # so that any text can be spelled
        show_progress=sys.stderr.isatty())
    # in parts: learning from a long word, such as a genome, takes time by its length squared
    bpe.train_from_iterator((part for text in taught for line in LINE_ENDS.split(text)
                             for part in re.findall('(?s).{1,9999}', line)), trainer)
    bpe.save(str(path))


def write_tokenizer(source, path):
    """Write source, a vocab.txt or a tokenizer.json, to path as a tokenizer.json ('bpe': train_bpe
    has done so); -> its kind, its size, its special ids."""
    from huggingface_hub import hf_hub_download
    from tokenizers import BertWordPieceTokenizer, Tokenizer, models
    if source == 'bert':
        source = hf_hub_download(BERT, 'vocab.txt', revision=REVISIONS[BERT])
    if source.endswith('.txt'):
        BertWordPieceTokenizer(models.WordPiece.read_file(source)).save(str(path))
    elif source != 'bpe':
        shutil.copyfile(source, path)
    tokenizer = Tokenizer.from_file(str(path))
    kind, special = TOKENIZER_KINDS[str(tokenizer.pre_tokenizer)]
    ids = tokenizer.get_vocab()
    return kind, 1 + max(ids.values()), [ids[token] for token in special.split()]


def make_tokenizer(tokenizer, vocab_size, texts, path, rule):
    """Write a tokenizer's file to path, if it has one, and return what meta says of it.
    tokenizer: as --tokenizer; texts: the training text; rule: as in SETS."""
    if tokenizer == 'bpe':
        train_bpe(texts, vocab_size, path)
    kind, size, special = tokenizer, 256, [0, 0]
    if tokenizer == 'gpt2':
        size, special = 50257, [50256, 50256]
    elif tokenizer != 'bytes':
        kind, size, special = guarded(
            f'--tokenizer {tokenizer} is not to be had: give bytes, bpe, gpt2, bert (fetched from '
            'the hub once), a vocab.txt of BERT or a tokenizer.json like those of bpe and bert',
            write_tokenizer, tokenizer, path)
    bos, eos, *pads = special
    if rule == 'padded' and not pads:
        raise UserError(f'--tokenizer {tokenizer} has no [PAD], which a set of padded rows needs')
    if rule != 'padded' and kind == 'bert':
        eos = bos  # a quirk of the published packed sets, kept so that numbers compare
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return dict(tokenizer=kind, tokenizer_sha256=digest, vocab_size=size, bos_id=bos, eos_id=eos,
                pad_id=pads[0] if rule == 'padded' else None)

# --------------------------------------------------------------------------------------------------
# documents -> pieces of text -> tokens -> token files

def cut_documents(documents, length):
    """Yield pieces: text, does it end a document?, is it for validation? A document longer than
    length is cut between lines, where no tokenizer merges anything."""
    for val, text in documents:
        start, safe = 0, True
        while safe:
            safe = LINE_ENDS.search(text, start + length)
            end = safe.start() if safe else len(text)
            yield text[start:end], not safe, val
            start = end


def in_threads(function, pieces):
    """Yield function(piece) of each, in order; few are in memory. Threads suffice, as the
    tokenizers release the interpreter's lock."""
    many = lambda some: [function(piece) for piece in some]
    waiting = deque()
    with ThreadPoolExecutor() as pool:
        while some := list(islice(pieces, BATCH)):
            waiting.append(pool.submit(many, some))
            if len(waiting) > QUEUE:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def write_tokens(folder, pieces, sizes, max_tokens, meta):
    """Write the token files of both splits, and their counts into meta. pieces: what encode_piece
    returns; sizes: bytes of each token. The document that reaches max_tokens is cut there."""
    files = [open(folder / f'{part}.bin', 'wb') for part in PARTS]
    starts = [array('q', [0]), array('q', [0])]     # where documents begin, in tokens
    counts = np.zeros((2, 3), int)                  # of each split: tokens, bytes, bytes by sizes
    for ends, val, size, ids in progress(pieces, 'tokenising'):
        part = int(val)
        if max_tokens and not val:
            kept = ids[:max_tokens - counts[0, 0]]
            size = round(size * sizes[kept].sum() / max(1, sizes[ids].sum()))
            ids = kept
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
        if tokens <= documents and (part == 'val' or meta['rule'] != 'joined'):
            raise UserError('too little text to train and to validate on: prepare more')
        meta.update({f'{part}_tokens': tokens, f'{part}_bytes': size,
                     f'{part}_documents': documents})
        if known:
            (sizes * (size / known)).tofile(folder / f'{part}.bytes')
        if meta['rule'] == 'padded':
            (folder / f'{part}.idx').write_bytes(begin)


def prepare(paths, name, tokenizer, vocab_size, val_fraction, data_dir, text_key, max_docs,
            max_tokens):
    """Write the data set and return its meta. It appears as a whole or not at all, and never takes
    the place of something else."""
    # 1. WHERE the documents come from, and the rules
    source = paths[0]
    rules = SETS.get(source, ['', '', 'some', text_key, 'bpe', 'packed', '-', 0, 0])
    if source.startswith('hf:'):
        rules[:2] = re.fullmatch('hf:([^/]*/?[^/]*)/?(.*)', source).groups()
    repo, _, val, _, usual, rule, detokeniser, _, _ = rules
    if repo and paths[1:]:
        raise UserError(f'{source} is a whole data set: prepare {paths[1]} by another command')
    tokenizer = tokenizer or usual
    if vocab_size and tokenizer != 'bpe':
        raise UserError(f'--vocab_size is for a new BPE, not for --tokenizer={tokenizer}')
    if val == 'last' and max_tokens:
        raise UserError(f'the last documents of {source} are for validation: use --max_docs')
    files = {}
    if not repo:
        files = find_files(stdlib_files() if paths == ['stdlib'] else paths, text_key)
    documents = lambda: read_documents(rules, files, val_fraction, max_docs)
    name = name or Path(source).resolve().name.split('.')[0]
    if not re.fullmatch(r'[^./*][^/*]*', name):
        raise UserError(f'{name!r} will not do as the name of a data set: choose another --name')
    target = Path(data_dir, name)
    if target.exists():
        raise UserError(f'{target} is there already: remove it, or choose another --name')
    target.parent.mkdir(parents=True, exist_ok=True)

    # 2. TOKENS
    with TemporaryDirectory(prefix='.unfinished-', dir=target.parent) as scratch:
        new = Path(scratch, 'new')
        new.mkdir()
        training = (text for val, text in documents() if not val)
        meta = make_tokenizer(tokenizer, vocab_size, training, new / 'tokenizer.json', rule)
        meta.update(name=name, source=source, rule=rule)
        encode, _, size_of = load_tokenizer(meta, new)
        dtype = token_dtype(meta['vocab_size'])

        def encode_piece(piece):
            """-> does it end a document?, is it for validation?, its bytes, its tokens."""
            text, ends, val = piece
            text = detokenise(text, detokeniser)
            eos = [meta['eos_id']] if ends and rule == 'packed' else []
            size = len(text.encode()) + (ends and rule != 'joined')  # a document's end is a byte
            return ends, val, size, np.array(encode(text) + eos, dtype)

        length = PIECE if detokeniser == '-' else sys.maxsize       # rules may match across a cut
        encoded = in_threads(encode_piece, cut_documents(documents(), length))
        sizes = np.array([size_of(i) for i in range(meta['vocab_size'])])
        sizes[meta['eos_id']] = 1
        write_tokens(new, encoded, sizes, max_tokens, meta)
        (new / 'meta.json').write_text(json.dumps(meta, indent=4) + '\n')
        os.sync()                                                   # in case the machine crashes
        new.rename(target)
    return meta


def main():
    paths = []
    settings = configure(globals(), CHECKS, sys.argv[1:] or ['--help'], paths)
    # `datasets` would import torch, go online for a local file, and warn about forks
    os.environ.update(USE_TORCH='0', HF_UPDATE_DOWNLOAD_COUNTS='0', TOKENIZERS_PARALLELISM='false')
    if not paths:
        raise UserError('what to prepare? A text, a folder, or a data set of --help')
    sets = [paths]
    if paths == ['zeroshot']:
        if settings['name']:
            raise UserError('zeroshot makes several data sets: give no --name')
        sets = [[name] for name in ZEROSHOT if not Path(settings['data_dir'], name).exists()]
    for sources in sets:
        meta = prepare(sources, **settings)
        print(f'{settings["data_dir"]}/{meta["name"]}: {meta["train_tokens"]:,} tokens to train '
              f'on, {meta["val_tokens"]:,} to validate')


if __name__ == '__main__':
    run(main)
