"""
Token files and tokenizers: what prepare.py writes, and train.py, sample.py and eval.py read.

A data set is a folder: train.bin and val.bin, flat streams of uint16 (uint32 for more than 65,535 words), meta.json
(the tokenizer, its size, its special ids, the counts) and, for a tokenizer that has a file, tokenizer.json. Packed,
every document is ended by eos (save in the zero-shot sets), and rows are cut anywhere. Padded (pad_id is a number),
every document is a row, and train.idx and val.idx say where it begins: uint64, one more of them than documents.
"""
import base64
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from configurator import UserError

# A byte-level BPE joins nothing across a newline that stands between two words, nor does WordPiece, so I hand them
# lines: the very same tokens, where a book in one piece costs `tokenizers` several times the time, and gigabytes.
LINE_ENDS = re.compile(r'(?<=\S\n)(?=\S)')


class Tokenizer(NamedTuple):
    encode: Callable  # text -> list of ids, no special ones added
    decode: Callable  # list or 1-d array of ids -> text, never an error: eos is a blank line, broken bytes are U+FFFD
    array: Callable   # text -> the ids as an array, or whatever makes one soonest


def load_tokenizer(meta, folder):
    """The Tokenizer that meta names; folder is where its tokenizer.json lies, if it has one."""
    name, eos, path = meta['tokenizer'], meta['eos_id'], Path(folder, 'tokenizer.json')
    unseen, array = {meta.get('bos_id'), eos, meta.get('pad_id')}, None
    try:
        if (digest := meta.get('tokenizer_sha256')) and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError('it is not the one that these tokens were made with')
        if name == 'bytes':
            encode = lambda text: list(text.encode())
            decode = lambda ids: bytes(ids).decode('utf-8', 'replace')
        elif name == 'char':
            characters = json.loads(path.read_text(encoding='utf-8'))
            number = {c: i for i, c in enumerate(characters)}
            decode = lambda ids: ''.join(characters[i] for i in ids)

            def encode(text):
                ids = [number.get(c, number.get('\ufffd')) for c in text]
                if None in ids:
                    raise UserError(f'{text[ids.index(None)]!r} is none of the {len(number)} characters this data has')
                return ids
        elif name in ('bpe', 'bert', 'json'):
            import tokenizers
            words = tokenizers.Tokenizer.from_file(str(path))
            words.encode_special_tokens = True  # an <|endoftext|> that stands in a text is text
            words.no_truncation()
            words.no_padding()
            ids_of = lambda text: words.encode(text, add_special_tokens=False).ids
            encode = ids_of if name == 'json' else lambda text: [i for s in LINE_ENDS.split(text) for i in ids_of(s)]
            decode = lambda ids: words.decode(ids, skip_special_tokens=False)
        elif name in ('gpt2', 'tiktoken'):
            import tiktoken
            if name == 'gpt2':
                words = tiktoken.get_encoding('gpt2')
            else:
                parts = json.loads(path.read_text(encoding='utf-8'))
                ranks = {base64.b64decode(word): i for word, i in parts.pop('mergeable_ranks').items()}
                words = tiktoken.Encoding(path.parent.name, mergeable_ranks=ranks, **parts)
                unseen |= set(range(words.n_vocab)) - set(ranks.values()) - set(parts['special_tokens'].values())
            encode, decode = words.encode_ordinary, words.decode
            array = lambda text: words.encode_to_numpy(text, disallowed_special=())
        else:
            raise UserError(f'unknown tokenizer {name!r}: I know bytes, char, bpe, gpt2, bert, json and tiktoken')
        decode([meta.get('vocab_size', 1) - 1])  # a tokenizer of fewer words fails here, not in the middle of a text
    except ImportError as error:
        raise UserError(f'the {name} tokenizer needs a package: pip install {error.name}')
    except Exception as error:  # `tokenizers` raises nothing finer, and a download fails in a dozen ways
        raise UserError(f'the gpt2 tokenizer could not be fetched ({type(error).__name__}): go online once, or set '
                         'TIKTOKEN_CACHE_DIR to a folder that has it' if name == 'gpt2'
                         else f'{path} cannot be read ({" ".join(str(error).split())}): prepare the data again')

    def decode_documents(ids):
        ids = np.asarray(ids)
        documents = np.split(ids, np.flatnonzero(ids == eos))  # all but the first start with their eos
        return '\n\n'.join(decode([i for i in document.tolist() if i not in unseen]) for document in documents)

    return Tokenizer(encode, decode_documents, array or encode)


def same_tokenizer(meta, other):
    """Do two metas number the same words alike? A model of the authors' names its tokenizer, and has no file of it."""
    files = {m.get('tokenizer_sha256') for m in (meta, other)} - {None}
    return len(files) < 2 and all(meta[key] == other[key] for key in ('tokenizer', 'vocab_size'))


def check_meta(meta):
    """ValueError if meta, or the data of a config.json, numbers its words as no tokenizer of mine does."""
    K, ids = meta['vocab_size'], [meta['bos_id'], meta['eos_id']] + [meta['pad_id']] * (meta['pad_id'] is not None)
    if set(map(type, [K, *ids])) != {int} or not 0 <= min(ids) <= max(ids) < K < 2**20:
        raise ValueError(f'bos_id, eos_id and pad_id cannot be {ids!r:.40} of {K!r:.40} words')
    if {'bytes': 256, 'gpt2': 50257}.get(str(meta['tokenizer']), K) != K:
        raise ValueError(f'{meta["tokenizer"]} has not {K} words')


def load_data(folder):
    """-> meta, {'train': stream, 'val': stream}, memory-mapped and checked against meta. A stream is what num_rows and
    get_rows take: tokens, uint16 or uint32; and where each document begins, int64, or None of a packed set."""
    folder, data = Path(folder), {}
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        for key in ('tokenizer', 'tokenizer_sha256', 'vocab_size', 'bos_id', 'eos_id', 'pad_id', 'dtype',
                    'train_tokens', 'val_tokens', 'train_bytes', 'val_bytes'):
            if key not in meta:
                raise ValueError(f'meta.json lacks {key}')
        check_meta(meta)
        if meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'its dtype is {meta["dtype"]!r:.40}, I read uint16 and uint32')
        for split in ('train', 'val'):
            starts, tokens = None, np.empty(0, meta['dtype'])
            if meta[f'{split}_tokens'] or split == 'val':  # a zero-shot set has nothing to train on
                tokens = np.memmap(folder / f'{split}.bin', dtype=meta['dtype'], mode='r')
            if len(tokens) != meta[f'{split}_tokens']:
                raise ValueError(f'{split}.bin holds {len(tokens)} tokens, not {meta[f"{split}_tokens"]!r:.40}')
            if type(size := meta[f'{split}_bytes']) is not int or size < (len(tokens) > 0):
                raise ValueError(f'{split}_bytes cannot be {size!r:.40}')
            if meta['pad_id'] is not None:
                starts = np.memmap(folder / f'{split}.idx', dtype=np.uint64, mode='r').view(np.int64)
                if starts[0] or starts[-1] != len(tokens) or (starts[1:] < starts[:-1]).any():
                    raise ValueError(f'{split}.idx does not divide the {len(tokens)} tokens of {split}.bin')
            data[split] = tokens, starts
    except (OSError, ValueError, TypeError) as error:
        known = {'owt_t4': 'owt --max_docs 100000 --name owt_t4',  # recipes', of another set
                 'stdlib_bytes': 'stdlib --tokenizer bytes --name stdlib_bytes'}
        raise UserError(f'no usable data set in {folder} ({error}): make it with python prepare.py '
                         f'{known.get(folder.name, folder.name)}, or from text of yours (prepare.py --help)')
    return meta, data


def check_tokens(data, vocab_size, folder):
    """Ends in one line if a stream holds a word that the tokenizer has not. Reads all of it, gigabytes a second."""
    for split, (tokens, _) in data.items():
        most = max((int(tokens[i:i + 2**26].max()) for i in range(0, len(tokens), 2**26)), default=0)
        if most >= vocab_size:
            raise UserError(f'{folder}/{split}.bin holds token {most} of {vocab_size} words: prepare it again')


def fingerprint(data):
    """A checksum of the streams' lengths and of a thousand places in each: rewritten data will not have it."""
    digest = hashlib.sha256()
    for part in (part for stream in data.values() for part in stream if part is not None):
        digest.update(str(len(part)).encode())
        for at in np.linspace(0, max(0, len(part) - 512), 1000).astype(np.int64):
            digest.update(np.ascontiguousarray(part[at:at + 512]))
    return digest.hexdigest()


def num_rows(stream, block_size):
    """How many rows a stream gives. A padded one: its documents; a packed one: each row takes block_size - 2 of its
    tokens, the remainder is dropped."""
    tokens, starts = stream
    if not 0 < block_size - 2 <= (len(tokens) if starts is None else block_size * (len(starts) > 1)):
        raise UserError(f'{len(tokens)} tokens fill no row: block_size = {block_size} takes {block_size - 2} of them. '
                         'Change it, or prepare more text or, for validation, with a larger --val_fraction')
    return len(tokens) // (block_size - 2) if starts is None else len(starts) - 1


def spans(stream, rows, block_size):
    """Where the words of rows stand in their stream, bos and eos not counted: begin, length, int64 (len(rows),)."""
    tokens, starts = stream
    rows, n = np.asarray(rows), block_size - 2
    return (rows * n, np.full_like(rows, n)) if starts is None else (
        starts[rows], np.minimum(starts[rows + 1] - starts[rows], n))


def get_rows(stream, rows, block_size, meta):
    """-> int64 (len(rows), T), T = block_size: bos, the row's words, eos. A packed row has T - 2 words; a padded one at
    most, and pads behind its eos."""
    begin, length = (v[:, None] for v in spans(stream, rows, block_size))  # (rows, 1)
    place = np.arange(block_size) - 1                                      # (T,): bos stands before the first word
    out = np.where(place < length, meta['bos_id'], meta['eos_id'])
    out[place > length] = meta['pad_id'] or 0                              # nowhere in a packed row
    words = (place >= 0) & (place < length)
    out[words] = stream[0][(begin + place)[words]]
    return out


def words_per_row(stream, rows, block_size):
    """How many words of text a row holds, on average: bits per byte are of these."""
    return spans(stream, rows, block_size)[1].mean().item()


def loss_mask(x0, pad_id):
    """(B,T) 1 where a token is scored, 0 where it pads; None where nothing does. x0 (B,T)."""
    return None if pad_id is None else (x0 != pad_id).float()


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


def get_batch(stream, rows, block_size, meta, device):
    """get_rows on a device, x0 (B,T); the CPU does not wait for the copy."""
    import torch
    x0 = torch.from_numpy(get_rows(stream, rows, block_size, meta))
    if device.startswith('cuda'):
        return x0.pin_memory().to(device, non_blocking=True)
    return x0.to(device)


def likelihood_figures(nats, objective, stream, rows, block_size, meta, split):
    import math
    mean, n = nats.mean().item(), len(nats)
    if not math.isfinite(mean):
        raise UserError(f'the validation loss is {mean}')
    error = (nats.std() / math.sqrt(n)).item() if n > 1 else math.nan
    tokens = words_per_row(stream, rows, block_size)
    scored = tokens + 2 - (objective == 'ar')
    bpd = mean / math.log(2)
    ppl = math.exp(min(mean, 99))
    bpb = bpd * scored / tokens * meta[f'{split}_tokens'] / meta[f'{split}_bytes']
    line = f'{mean:.4f} +- {error:.4f} nats, {bpd:.4f} bits per token, PPL {ppl:.2f}, {bpb:.4f} bits per byte'
    return line, dict(loss=mean, error=error, bpd=bpd, ppl=ppl, bpb=bpb)
