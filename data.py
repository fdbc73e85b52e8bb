"""
Token files and tokenizers: what prepare.py writes, and train.py, sample.py and eval.py read.

A data set is a folder: train.bin and val.bin (a flat uint16 stream, every document ended by eos), meta.json
(the tokenizer, its size, its special ids, the counts) and, for a BPE of our own, tokenizer.json.
"""
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

# A byte-level BPE joins nothing across a newline that stands between two words, so I hand it lines: the very
# same tokens, where a book in one piece costs `tokenizers` several times the time, and gigabytes.
LINE_ENDS = re.compile(r'(?<=\S\n)(?=\S)')


class Tokenizer(NamedTuple):
    encode: Callable  # text -> list of ids, no special ones added
    decode: Callable  # list or 1-d array of ids -> text, never an error: eos is a blank line, broken bytes are U+FFFD


def load_tokenizer(meta, folder):
    """The Tokenizer that meta names; folder is where its tokenizer.json lies, if it has one."""
    name, eos = meta['tokenizer'], meta['eos_id']
    try:
        if name == 'bytes':
            encode = lambda text: list(text.encode())
            decode = lambda ids: bytes(ids).decode('utf-8', 'replace')
        elif name == 'bpe':
            import tokenizers
            bpe = tokenizers.Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
            bpe.encode_special_tokens = True  # an <|endoftext|> that stands in a text is text
            encode = lambda text: [i for line in LINE_ENDS.split(text) for i in bpe.encode(line).ids]
            decode = bpe.decode
        elif name == 'gpt2':
            import tiktoken
            gpt2 = tiktoken.get_encoding('gpt2')
            encode, decode = gpt2.encode_ordinary, gpt2.decode
        else:
            raise SystemExit(f'unknown tokenizer {name!r}: I know bytes, bpe and gpt2')
    except ImportError as error:
        raise SystemExit(f'the {name} tokenizer needs a package: pip install {error.name}')
    except Exception as error:  # `tokenizers` raises nothing finer, and a download fails in a dozen ways
        raise SystemExit(f'{folder}/tokenizer.json cannot be read ({error}): prepare the data again' if name == 'bpe'
                         else f'the gpt2 tokenizer could not be fetched ({type(error).__name__}): go online once, or '
                         'set TIKTOKEN_CACHE_DIR to a folder that has it')

    def decode_documents(ids):
        ids = np.asarray(ids)
        documents = np.split(ids, np.flatnonzero(ids == eos))  # all but the first start with their eos
        return '\n\n'.join(decode([i for i in document.tolist() if i != eos]) for document in documents)

    return Tokenizer(encode, decode_documents)


def same_tokenizer(meta, other):
    """Do two metas number the same words alike?"""
    return all(meta.get(key) == other.get(key) for key in ('tokenizer', 'tokenizer_sha256', 'vocab_size'))


def check_meta(meta):
    """ValueError if meta, or the data of a config.json, numbers its words as no tokenizer of mine does."""
    K, ids = meta['vocab_size'], [meta['bos_id'], meta['eos_id']]
    if set(map(type, [K, *ids])) != {int} or not 0 <= min(ids) <= max(ids) < K < 2**20:
        raise ValueError(f'bos_id and eos_id cannot be {ids!r:.40} of {K!r:.40} words')
    if {'bytes': 256, 'gpt2': 50257}.get(str(meta['tokenizer']), K) != K:
        raise ValueError(f'{meta["tokenizer"]} has not {K} words')


def load_data(folder):
    """-> meta, {'train': tokens, 'val': tokens}: the two streams, uint16, memory-mapped and checked against meta."""
    folder, data = Path(folder), {}
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        for key in ('tokenizer', 'tokenizer_sha256', 'vocab_size', 'bos_id', 'eos_id', 'dtype', 'train_tokens',
                    'val_tokens', 'train_bytes', 'val_bytes'):
            if key not in meta:
                raise ValueError(f'meta.json lacks {key}')
        check_meta(meta)
        if meta['dtype'] != 'uint16':
            raise ValueError(f'its dtype is {meta["dtype"]!r:.40}, I read uint16')
        for split in ('train', 'val'):
            data[split] = np.memmap(folder / f'{split}.bin', dtype=np.uint16, mode='r')
            if len(data[split]) != meta[f'{split}_tokens']:
                raise ValueError(f'{split}.bin holds {len(data[split])} tokens, not {meta[f"{split}_tokens"]!r:.40}')
            if type(size := meta[f'{split}_bytes']) is not int or size < 1:
                raise ValueError(f'{split}_bytes cannot be {size!r:.40}')
    except (OSError, ValueError, TypeError) as error:
        known = {'owt_t4': 'owt --max_docs 100000 --name owt_t4'}  # a recipe's, of another set
        raise SystemExit(f'no usable data set in {folder} ({error}): make it with python prepare.py '
                         f'{known.get(folder.name, folder.name)}, '
                         f'or from text of yours with python prepare.py FILE --name {folder.name}')
    return meta, data


def check_tokens(data, vocab_size, folder):
    """Ends in one line if a stream holds a word that the tokenizer has not. Reads all of it, gigabytes a second."""
    for split, tokens in data.items():
        most = max((int(tokens[i:i + 2**26].max()) for i in range(0, len(tokens), 2**26)), default=0)
        if most >= vocab_size:
            raise SystemExit(f'{folder}/{split}.bin holds token {most} of {vocab_size} words: prepare it again')


def fingerprint(data):
    """A checksum of the streams' lengths and of a thousand places in each: rewritten data will not have it."""
    digest = hashlib.sha256()
    for tokens in data.values():
        digest.update(str(len(tokens)).encode())
        for at in np.linspace(0, max(0, len(tokens) - 512), 1000).astype(np.int64):
            digest.update(np.ascontiguousarray(tokens[at:at + 512]))
    return digest.hexdigest()


def num_rows(tokens, block_size):
    """How many rows a stream gives; each takes block_size - 2 of its tokens, the remainder is dropped."""
    if not 0 < block_size - 2 <= len(tokens):
        raise SystemExit(f'{len(tokens)} tokens fill no row: block_size = {block_size} takes {block_size - 2} of them. '
                         'Change it, or prepare more text or, for validation, with a larger --val_fraction')
    return len(tokens) // (block_size - 2)


def get_rows(tokens, rows, block_size, meta):
    """-> int64 (len(rows), T), T = block_size: row r is bos, tokens[r * (T - 2) : (r + 1) * (T - 2)], eos."""
    rows, n = np.asarray(rows), block_size - 2
    out = np.empty((len(rows), block_size), dtype=np.int64)
    out[:, 0], out[:, -1] = meta['bos_id'], meta['eos_id']
    out[:, 1:-1] = tokens[rows[:, None] * n + np.arange(n)]
    return out


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def permutation(n_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def epoch_rows(index, n_rows, seed):
    """Row numbers for int64 sample counters 0, 1, 2, ... of the whole run: every epoch visits every row once, in an
    order made from (seed, epoch) alone, so a resumed run has no loader state to restore."""
    epochs, places = np.divmod(np.asarray(index), n_rows)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        rows[now] = permutation(n_rows, seed, int(epoch))[places[now]]
    return rows
