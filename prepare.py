"""
Text -> token files: data/NAME/{train,val}.bin and meta.json (data.py says what is in them).

    python prepare.py stdlib                          # Python's own source, found on this machine
    python prepare.py owt                             # a published set by its published rules; --list
    python prepare.py book.txt                        # your text: of one file, the end validates ...
    python prepare.py notes/ more.txt --name notes    # ... of many, each a document, one in twenty
    python prepare.py 'dumps/*.jsonl.gz' --name dumps --text_key body --tokenizer gpt2
    python prepare.py hf:org/name --tokenizer bert    # of the hub; or hf:org/name/some/*.parquet

A named file may be any UTF-8 text, or hold one document per record: .jsonl, .jsonl.gz, .jsonl.zst or
.parquet. Of a folder, every .txt, .md and record file is taken, at any depth.
"""
import argparse
import fnmatch
import functools
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import sysconfig
import time
from itertools import islice
from pathlib import Path

import numpy as np

from configurator import UserError, check
from data import LINE_ENDS, load_tokenizer

VOCAB_SIZE = 4096         # of a BPE learnt here; a small text gets fewer tokens, see make_tokenizer
FILES = {'train.bin', 'val.bin', 'train.idx', 'val.idx', 'meta.json', 'tokenizer.json'}
TEXTS = ('.txt', '.md')
RECORDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet')
# Of the standard library: no tests, no generated tables, nothing that belongs to one machine alone.
LEFT_OUT = set('test tests idle_test encodings pydoc_data entities.py stringprep.py _casefix.py '
               'site-packages dist-packages sitecustomize.py'.split())
PIECE = 2 ** 18           # characters: a longer text is tokenised in pieces
ROWS = 64                 # pieces handled at a time
PARTS = ('train', 'val')
LEARN_FROM = 100_000_000  # characters of the training text that teach a BPE
CHECKS = [
    ('vocab_size max_docs max_tokens workers', lambda v: v is None or v >= 1, 'at least 1'),
    ('val_fraction', lambda v: 0 < v < 1, 'between 0 and 1'),
]

# --------------------------------------------------------------------------------------------------
# the published sets

# Files are parquet. 'last': the last tenth validates, at most 100,000 documents; 'some': documents
# picked by a hash. 'joined' is 'packed' without an eos between documents, as zero-shot perplexities
# are published.
COLUMNS = 'set hub_id train_files val_files column tokenizer rule detokeniser documents GB revision'
SETS = {row.split()[0]: row.split()[1:] for row in """\
owt Skylion007/openwebtext plain_text/train-* last text gpt2 packed - 8013769 24
lm1b billion-word-benchmark/lm1b plain_text/train/* plain_text/test/* text bert padded lm1b 30607716 2.6
lm1b_packed billion-word-benchmark/lm1b plain_text/train/* plain_text/test/* text bert packed lm1b 30607716 2.6
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
# `datasets` runs no loading scripts: of sets that have one, the hub's conversion to parquet is taken.
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

# Undo the tokenisation that a set was published in, as its published perplexities do. Each line is a
# regex and its replacement, with _ for a space; their order counts.
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
\A\s*                 \n
\s*\Z"""

TABLES = {'-': '', 'wikitext': WIKITEXT, 'lm1b': LM1B, 'papers': WIKITEXT + LM1B, 'ptb': PTB,
          'lambada': LAMBADA}


@functools.cache
def rules(kind):
    """-> [[regex, replacement]] of such a table; where no replacement stands, it is ''."""
    cells = [(row.split() + [''])[:2] for row in TABLES[kind].strip().splitlines()]
    return [[cell.replace('_', ' ') for cell in pair] for pair in cells]


def detokenise(text, kind):
    for pattern, replacement in rules(kind):
        text = re.sub(pattern, replacement, text)
    return text

# --------------------------------------------------------------------------------------------------
# documents: each is a pair (does it validate?, its text)

def decode(raw, path):
    """The text of a UTF-8 file's bytes, without a byte-order mark; line ends become \n."""
    try:
        text = raw.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text (byte {error.start}): convert it first')
    if '\0' in text:
        raise UserError(f'{path} is not text: it holds a NUL byte')
    return text.replace('\r\n', '\n')


def read_text(path):
    return decode(Path(path).read_bytes(), path)


def read_records(path, key):
    """Yield the texts under a key of a .jsonl file, or in a column of a .parquet file."""
    from datasets import load_dataset
    # .jsonl is read as lines: the 'json' loader takes a text that looks like a date for one, and
    # refuses a field that first appears late in a file
    is_lines = not path.endswith('.parquet')
    number = 0
    try:
        for row in load_dataset('text' if is_lines else 'parquet', data_files=glob.escape(path),
                                split='train', streaming=True):
            number += 1
            if is_lines:
                row = json.loads(row['text'] or '{}')
            if row:
                yield row[key].encode(errors='replace').decode()  # JSON may hold half a character
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise UserError(f'{path}: no text under {key!r} (--text_key) in record {number}: '
                        f'{error!r:.200}')


def read_files(paths, key):
    for path in paths:
        if path.endswith(RECORDS):
            yield from read_records(path, key)
        else:
            yield read_text(path)


def score(key):
    """A number in [0, 1) made from the key alone: no other document changes it."""
    return int(hashlib.sha256(os.fsencode(key)).hexdigest()[:8], 16) / 2**32


def in_val(number, val_fraction):
    return score(str(number)) < val_fraction


def some_validate(texts, val_fraction):
    for number, text in enumerate(texts):
        yield in_val(number, val_fraction), text


def end_validates(path, val_fraction):
    """One text in two parts, cut where a paragraph begins, or a line, or at least a character."""
    raw = Path(path).read_bytes()
    cut = round(len(raw) * (1 - val_fraction))
    near = min(round(len(raw) * min(val_fraction, 1 - val_fraction) / 2), 2**20)
    for end in (b'\n\n', b'\r\n\r\n', b'\n'):
        place = raw.rfind(end, cut - near, cut)
        if place >= 0:
            cut = place + len(end)
            break
    while raw[cut:cut + 1] and raw[cut] & 0xc0 == 0x80:     # inside a character of UTF-8
        cut += 1
    return [(True, decode(raw[cut:], path)), (False, decode(raw[:cut], path))]


def find_files(paths, endings=TEXTS + RECORDS):
    """{name: path} of files, and of the files with such endings in folders, at any depth; names are
    relative to their common folder. Blank texts are left out."""
    found = []
    for path in paths:
        files = [path]
        if os.path.isdir(path):                             # glob leaves out what is hidden
            files = [file for file in glob.glob(f'{glob.escape(path)}/**', recursive=True)
                     if file.endswith(endings) and os.path.isfile(file)]
        found += [file for file in files if file.endswith(RECORDS) or read_text(file).strip()]
    if not found:
        raise UserError(f'no text in {", ".join(paths)} (of folders, {", ".join(endings)} are read)')
    found = [os.path.abspath(file) for file in found]
    root = os.path.commonpath([os.path.dirname(file) for file in found])
    return dict(sorted((os.path.relpath(file, root), file) for file in found))


def stdlib_files():
    """{name: path} of the standard library's source, as people wrote it."""
    root = sysconfig.get_paths()['stdlib']
    paths = [path for path in glob.glob(f'{root}/**/*.py', recursive=True)
             if LEFT_OUT.isdisjoint(path[len(root):].split('/')) and '_sysconfigdata' not in path
             and os.path.getsize(path) < 1e6]
    return find_files(paths)


def split_files(files, val_fraction, text_key):
    """Documents of {name: path}; neither split stays empty."""
    if any(path.endswith(RECORDS) for path in files.values()):
        return some_validate(read_files(files.values(), text_key), val_fraction)
    if len(files) == 1:
        return end_validates(*files.values(), val_fraction)
    ranked = sorted(map(score, files))
    bar = min(max(val_fraction, ranked[0]), ranked[-2])
    return ((score(name) <= bar, read_text(path)) for name, path in files.items())


def hub_texts(repo, revision, pattern, key):
    """Texts of a hub set's files, each fetched when its turn comes: few documents need few files."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError
    try:
        info = HfApi().dataset_info(repo, revision=revision)
        names = fnmatch.filter(sorted(file.rfilename for file in info.siblings), pattern)
        if not names:
            raise UserError(f'{repo} ({revision}) has no file {pattern}')
        for name in names:
            path = hf_hub_download(repo, name, repo_type='dataset', revision=info.sha)
            yield from read_files([path], key)
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(f'{repo} ({revision}) is out of reach ({error!r:.99}): go online, or name a '
                        'mirror by HF_ENDPOINT')


def read_published(name, val_fraction, max_docs):
    """Documents of a published set; max_docs does not shorten a validation set of its own."""
    repo, train, val, column, _, _, _, total, _ = SETS[name]
    total = min(int(total), max_docs or int(total))
    first_val = total
    if val == 'last':
        first_val -= min(total // 10, 100_000)
    elif val != 'some':
        texts = hub_texts(repo, REVISIONS[repo], val, column)
        for text in islice(texts, max_docs if train == '-' else None):
            yield True, text
    if train != '-':
        texts = hub_texts(repo, REVISIONS[repo], train, column)
        for number, text in enumerate(islice(texts, max_docs)):
            yield number >= first_val or val == 'some' and in_val(number, val_fraction), text

# --------------------------------------------------------------------------------------------------
# tokenizers

def train_bpe(texts, vocab_size, path):
    """Learn a byte-level BPE whose id 0 ends a document, save it; returns its size, <= vocab_size."""
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


def load_vocabulary(source):
    """-> 'bert' or 'json', and the `tokenizers` tokenizer of a vocab.txt or a tokenizer.json."""
    from huggingface_hub import hf_hub_download
    from tokenizers import BertWordPieceTokenizer, Tokenizer, models
    try:
        if source == 'bert':
            source = hf_hub_download(BERT, 'vocab.txt', revision=REVISIONS[BERT])
        if source.endswith('.txt'):
            return 'bert', BertWordPieceTokenizer(models.WordPiece.read_file(source))
        return 'json', Tokenizer.from_file(source)
    except Exception as error:                              # `tokenizers` raises nothing finer
        raise UserError(f'--tokenizer {source} is not to be had ({error!s:.120}): give bytes, bpe, '
                        'gpt2, bert (fetched from the hub once), a vocab.txt or a tokenizer.json')


def make_tokenizer(tokenizer, vocab_size, texts, path, rule):
    """Write a tokenizer's file to path, if it has one, and return what meta says of it.
    tokenizer: as --tokenizer; texts(): the training text; rule: as in SETS."""
    kind, bos, eos, pad = tokenizer, 0, 0, None
    if tokenizer == 'bytes':
        size = 256
    elif tokenizer == 'gpt2':
        size, bos, eos = 50257, 50256, 50256
    elif tokenizer == 'bpe':
        if not vocab_size:  # a small text cannot teach 4096 tokens: one for every 256 characters
            known = sum(map(len, head(texts(), VOCAB_SIZE * 256)))
            vocab_size = min(VOCAB_SIZE, max(512, known // 256))
        size = train_bpe(head(texts(), LEARN_FROM), vocab_size, path)
    else:
        kind, vocabulary = load_vocabulary(tokenizer)
        vocabulary.save(str(path))
        ids = vocabulary.get_vocab()
        size = 1 + max(ids.values())

        def pick(names):
            return next((ids[name] for name in names.split() if name in ids), None)

        eos = pick('<|endoftext|> <|end_of_text|> </s> <eos> [SEP]')
        bos = pick('<|begin_of_text|> <s> <bos> [CLS]') or eos
        if rule == 'padded':
            pad = pick('[PAD] <pad>')
        elif kind == 'bert':
            eos = bos  # a quirk of the published packed sets, kept so that numbers compare
        if eos is None:
            raise UserError(f'--tokenizer {tokenizer} has no token that ends a document, like </s>')
    if rule == 'padded' and pad is None:
        raise UserError(f'--tokenizer {tokenizer} has no [PAD]: take the packed form of this set')
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return dict(tokenizer=kind, tokenizer_sha256=digest, vocab_size=size, bos_id=bos, eos_id=eos,
                pad_id=pad, dtype='uint16' if size <= 65535 else 'uint32')

# --------------------------------------------------------------------------------------------------
# documents -> pieces of text -> tokens -> token files

def pieces(documents, piece):
    """Rows for `datasets`: text, ends (the document?), val. Long documents are cut between lines,
    where no tokenizer joins anything."""
    for val, text in documents:
        end = -1
        while end < len(text):
            start = max(end, 0)
            safe = LINE_ENDS.search(text, start + piece)
            end = safe.start() if safe else len(text)
            yield dict(text=text[start:end], ends=end == len(text), val=val)


def encode_batch(table, encode, detokeniser, meta):
    """Arrow tables: text, ends, val -> ids, size (in bytes), ends, val."""
    import pyarrow
    ids, size = [], []
    for text, ends in zip(table['text'].to_pylist(), table['ends'].to_pylist()):
        text = detokenise(text, detokeniser)
        eos = [meta['eos_id']] if ends and meta['rule'] == 'packed' else []
        ids.append(np.array(encode(text) + eos, meta['dtype']))
        size.append(len(text.encode()) + (ends and meta['rule'] != 'joined'))   # eos: one byte
    return pyarrow.table(dict(ids=ids, size=size, ends=table['ends'], val=table['val']))


def tokenise(rows, scratch, settings, stream, workers):
    """-> a Dataset of encode_batch's rows; an IterableDataset, tokenised as it is read, if stream."""
    from datasets import Dataset, IterableDataset
    from datasets.exceptions import DatasetGenerationError
    options = dict(batched=True, batch_size=ROWS, remove_columns=['text'], fn_kwargs=settings)
    if stream:
        return IterableDataset.from_generator(rows).with_format('arrow').map(encode_batch, **options)
    try:
        # with a fingerprint given, neither the documents nor the tokenizer are hashed
        text = Dataset.from_generator(rows, cache_dir=scratch, fingerprint='text',
                                      writer_batch_size=ROWS)
    except DatasetGenerationError as error:
        raise error.__cause__
    if text.data.nbytes < 2**23:
        workers = None                      # it is done before other processes have started
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'          # or `tokenizers` warns of the fork
    return text.with_format('arrow').map(encode_batch, num_proc=workers, new_fingerprint='tokens',
                                         cache_file_name=f'{scratch}/tokens.arrow', **options)


def rows_of(tokens):
    for table in tokens.with_format('arrow').iter(ROWS):
        yield from zip(*table.select(['ids', 'size', 'ends', 'val']))


def write_tokens(folder, tokens, padded, max_tokens):
    """Write the token files of both splits; returns meta's counts."""
    files = [open(folder / f'{part}.bin', 'wb') for part in PARTS]
    starts = [[0], [0]]                     # where documents begin, in tokens
    n_bytes = [0, 0]
    n_tokens = [0, 0]
    for ids, size, ends, val in rows_of(tokens):
        part = int(val.as_py())
        files[part].write(ids.values.to_numpy())
        n_tokens[part] += len(ids)
        n_bytes[part] += size.as_py()
        if ends.as_py():
            starts[part].append(n_tokens[part])
            if max_tokens and n_tokens[0] >= max_tokens:
                break
    counts = {}
    for i, part in enumerate(PARTS):
        files[i].close()
        if padded:
            np.array(starts[i], np.uint64).tofile(folder / f'{part}.idx')
        counts[f'{part}_tokens'] = n_tokens[i]
        counts[f'{part}_bytes'] = n_bytes[i]
        counts[f'{part}_documents'] = len(starts[i]) - 1
    return counts


def choose_target(paths, name, data_dir):
    """The folder of the new set; UserError where it may not be replaced."""
    if not name:
        name = re.sub(r'(\.jsonl)?\.\w+$', '', os.path.basename(os.path.abspath(paths[0])))
    if not re.fullmatch(r'[^./*][^/*]*', name) or name in SETS and paths != [name]:
        raise UserError(f'{name!r} will not do as the name of your data: choose another with --name')
    target = Path(data_dir, name)
    foreign = set(os.listdir(target)) - FILES if target.exists() else []
    if foreign:
        raise UserError(f'{target} holds {min(foreign)}, which is no part of a data set: choose '
                        'another --name')
    return target


def prepare(paths, name, tokenizer, vocab_size, val_fraction, data_dir, text_key, revision, max_docs,
            max_tokens, workers):
    """Write the data set and return its meta. An older one of that name stays until the new one is
    in its place, whatever goes wrong."""
    # 1. WHERE the documents come from, and the rules
    source = paths[0]
    usual, rule, detokeniser = SETS[source][4:7] if source in SETS else ('bpe', 'packed', '-')
    if source in SETS:
        if SETS[source][2] == 'last' and max_tokens:
            raise UserError(f'the last documents of {source} validate: limit it by --max_docs')
        documents = lambda: read_published(source, val_fraction, max_docs)
    elif source.startswith('hf:'):
        repo, pattern = re.fullmatch('hf:([^/]*/?[^/]*)/?(.*)', source).groups()
        texts = lambda: hub_texts(repo, revision, pattern or '*train*', text_key)
        documents = lambda: islice(some_validate(texts(), val_fraction), max_docs)
    else:
        files = stdlib_files() if paths == ['stdlib'] else find_files(paths)
        documents = lambda: islice(split_files(files, val_fraction, text_key), max_docs)
    target = choose_target(paths, name, data_dir)

    # 2. TOKENS, in a folder beside the target
    scratch, older = (target.with_name(f'.{target.name}.{what}') for what in ('unfinished', 'old'))
    if older.exists() and not target.exists():              # killed between the two renames below
        older.rename(target)
    shutil.rmtree(scratch, ignore_errors=True)
    new = scratch / 'new'
    try:
        new.mkdir(parents=True)
        training = lambda: (text for val, text in documents() if not val)
        meta = make_tokenizer(tokenizer or usual, vocab_size, training, new / 'tokenizer.json', rule)
        meta.update(name=target.name, source=source, revision=revision, rule=rule)
        settings = dict(encode=load_tokenizer(meta, new).encode, detokeniser=detokeniser, meta=meta)
        # rules and tokenizers of others may look across any place
        piece = PIECE if detokeniser == '-' and meta['tokenizer'] != 'json' else sys.maxsize // 2
        tokens = tokenise(lambda: pieces(documents(), piece), str(scratch), settings, max_tokens,
                          workers)
        meta |= write_tokens(new, tokens, rule == 'padded', max_tokens)
        for part in PARTS:
            if meta[f'{part}_tokens'] <= meta[f'{part}_documents'] and rule != 'joined':
                raise UserError('too little text to train and to validate on: prepare more')
        (new / 'meta.json').write_text(json.dumps(meta, indent=4) + '\n')
        # 3. IN PLACE
        if target.exists():
            target.rename(older)
        new.rename(target)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return meta


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('paths', nargs='+', metavar='stdlib|SET|zeroshot|PATH|hf:ORG/NAME|list', help='see above')
    add('--name', help='what to call it; default: as the set, or the first file or folder')
    add('--tokenizer', help='bytes, bpe, gpt2, bert, or the path of a tokenizer.json or a BERT '
        'vocab.txt; default: the published one, or bpe')
    add('--vocab_size', type=int, help='of bpe; default: 4096, less for under 1 MB of text')
    add('--val_fraction', type=float, default=0.05, help='share that validates; default: 0.05')
    add('--data_dir', default='data', help='where the data sets are; default: data')
    add('--text_key', default='text', help='where in a record the text is; default: text')
    add('--revision', default='main', help='of hf:ORG/NAME; default: main')
    add('--max_docs', type=int, help='stop after so many documents')
    add('--max_tokens', type=int, help='stop soon after so many training tokens; one process')
    add('--workers', type=int, default=os.cpu_count(), help='processes; default: one per core')
    options = vars(parser.parse_args())
    paths = options.pop('paths')
    check(options, CHECKS)
    if paths == ['list']:
        print(COLUMNS, *(' '.join([name, *row]) for name, row in SETS.items()), sep='\n')
        return
    os.environ['USE_TORCH'] = '0'                           # or `datasets` imports torch: seconds
    os.environ['HF_UPDATE_DOWNLOAD_COUNTS'] = '0'           # or a local file asks the network
    import datasets
    datasets.logging.set_verbosity(logging.CRITICAL)        # what goes wrong is told here
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for paths in [[name] for name in ZEROSHOT] if paths == ['zeroshot'] else [paths]:
        began = time.perf_counter()
        meta = prepare(paths, **options)
        print(f'{options["data_dir"]}/{meta["name"]}: {meta["train_tokens"]:,} tokens to train on, '
              f'{meta["val_tokens"]:,} to validate; {meta["tokenizer"]}, vocabulary '
              f'{meta["vocab_size"]:,}; {time.perf_counter() - began:.1f} s')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('stopped: nothing was written')
    except OSError as error:                                # no permission, no space, ...
        sys.exit(f'nothing was written: {error}')
    except UserError as error:
        sys.exit(str(error))
