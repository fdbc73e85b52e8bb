"""
The authors' checkpoints into our format, and ours into theirs:

    python convert.py hf:s-sahoo/duo out-duo           # then: python sample.py --init_from=out-duo
    python convert.py duo.ckpt out-duo --objective=duo # the EMA weights; --weights=raw: the others
    python convert.py --export out theirs              # for their DUO.from_pretrained

Theirs is a folder or hub repository with config.json and model.safetensors, or a Lightning .ckpt,
of a Duo, UDLM, MDLM or AR model. What its config does not say is read off the tensors' shapes, or
assumed and printed; a .ckpt has no config.json, so --objective must say what it is. A .ckpt is a
pickle: nothing in it is executed, and one that asks for more than settings and tokenizers is
refused.
"""
import argparse
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import (INFO, UNREADABLE, build_model, fetch, has_entries, load_model, read_config,
                        read_torch, read_weights, write_model)
from configurator import UserError
from model import DiTConfig

# What their config.json calls the fields of DiTConfig, and our objectives for their models.
AUTHORS = dict(vocab_size='vocab_size', model_length='block_size', n_blocks='n_layer',
               n_heads='n_head', hidden_dim='n_embd', cond_dim='cond_dim', causal='causal')
OBJECTIVES = dict(duo='duo', duo_base='duo', distillation='duo', udlm='duo', mdlm='mdlm', ar='ar')
# Their two vocabularies: name, bos, eos and pad of the tokenizer, and the length trained on. Their
# networks may have one token more, [PAD] in Duo, a mask in AR: no text has it, so it is left out.
TOKENIZERS = {50257: ('gpt2', 50256, 50256, None, 1024), 30522: ('bert', 101, 102, 0, 128)}
PER_TOKEN = ('vocab_embed.embedding', 'output_layer.linear.weight', 'output_layer.linear.bias')
WRAPPERS = re.compile(r'\b(backbone|module|_orig_mod|model)\.')  # in front of parameters' names
# The modules of the settings and tokenizers that a .ckpt of theirs holds beside tensors.
HARMLESS = re.compile(r'(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|typing)\.'
                      r'|collections\.defaultdict$'
                      r'|builtins\.(dict|list|tuple|int|float|str|bool|object)$')


class Inert(dict):
    """Stands for any object of a pickle: takes its state, runs nothing of its class."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


def without_buffers(state):
    """state less RoPE's frequencies, which are no weights."""
    return {name: w for name, w in state.items() if not name.endswith('inv_freq')}


def read_lightning(path, weights):
    """{name: tensor} of a Lightning .ckpt. Its settings are not read: the shapes tell most."""
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE as error:
        raise UserError(f'{path} cannot be used: {error!r:.200}')
    payload = [name for name in strange if not HARMLESS.match(name)]
    if payload:
        raise UserError(f'{path} is a pickle that wants to run {", ".join(payload)}: not opened. '
                        'Ask for safetensors')
    with torch.serialization.safe_globals([(Inert, name) for name in strange]):
        ckpt = read_torch(path, mmap=True)
    if not has_entries(ckpt, dict(state_dict=dict)):
        raise UserError(f'{path} is no Lightning checkpoint: it has no state_dict')

    state = without_buffers(ckpt['state_dict'])
    if weights == 'ema':  # a list in the order of the parameters, which is that of the state dict
        shadow = (ckpt.get('ema') or {}).get('shadow_params') or []
        if [w.shape for w in shadow] != [w.shape for w in state.values()]:
            raise UserError(f'{path}: its moving average ({len(shadow)} tensors) is none of its '
                            f'{len(state)} weights: --weights=raw takes those')
        state = dict(zip(state, shadow))
    return state


def infer_info(config, state, where):
    """Our config.json from theirs and, where it is silent, from the shapes of the tensors. Leaves
    the token that no text has out of state."""
    if 'vocab_embed.embedding' not in state:
        raise UserError(f'{where} holds no DiT: vocab_embed.embedding is missing')
    K, C = state['vocab_embed.embedding'].shape
    if config.get('vocab_size', K) != K:
        raise UserError(f"{where}: its config says vocab_size {config['vocab_size']}, "
                        f"its tensors {K}")
    cond_dims = [w.size(1) for name, w in state.items() if name.endswith('adaLN_modulation.weight')]
    causal = not cond_dims                                # only an autoregressive one has no adaLN
    theirs = 'ar' if causal else str(config.get('model_type')).lower()
    objective = OBJECTIVES.get(theirs)
    has_time = objective == 'duo'
    if objective is None or K == 30522 and not has_time:  # BERT's own mask is not the last token
        raise UserError(f'{where} is a {theirs} model of {K} tokens: only Duo, and MDLM and AR '
                        "with GPT-2's vocabulary, can be converted; --objective tells of a .ckpt")
    if config.get('time_conditioning', has_time) != has_time:
        raise UserError(f'{where} is {objective} with time_conditioning {not has_time}: no such '
                        'model can be converted')

    mask = 1 if objective == 'mdlm' else 0
    n_tokens = K - mask
    notes = []
    if n_tokens - 1 in TOKENIZERS:
        n_tokens -= 1
        notes.append('the last token is in no text, left out')
        for name in PER_TOKEN:
            if name in state:
                state[name] = state[name][:n_tokens + mask]
    tokenizer, bos, eos, pad, length = TOKENIZERS.get(
        n_tokens, (f'of {n_tokens} tokens', 0, 0, None, 1024))
    assumed = dict(n_heads=max(1, C // 64), model_length=length)
    notes += [f'{key} {value}' for key, value in assumed.items() if key not in config]
    n_blocks = len({name.split('.')[1] for name in state if name.startswith('blocks.')})
    print(f'{where}: {objective}, {n_blocks} layers of {C}, tokenizer {tokenizer}; assumed: '
          f'{", ".join(notes) or "nothing"}')
    assumed |= dict(n_blocks=n_blocks, hidden_dim=C, causal=causal,
                    cond_dim=max(cond_dims, default=DiTConfig.cond_dim))
    config = assumed | config | dict(vocab_size=n_tokens + mask)
    return dict(
        objective=objective,
        model={ours: config[theirs] for theirs, ours in AUTHORS.items()},
        data=dict(tokenizer=tokenizer, tokenizer_sha256=None, vocab_size=n_tokens, bos_id=bos,
                  eos_id=eos, pad_id=pad),
        settings={},
    )


def find_file(where):
    """The Path of the model's file: `where` itself, or one in that folder or repository."""
    for pattern in ('model.safetensors', '*.ckpt'):  # gigabytes: the second only without the first
        path = fetch(where, '*.json', pattern)
        found = [path] if path.is_file() else list(path.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise UserError(f'no model in {where}, or several: name a folder, hf:ORG/NAME or a .ckpt')


def write_new(folder, weights, info, tokenizer_from):
    """write_model into a folder that holds none."""
    if Path(folder, 'model.safetensors').exists():
        raise UserError(f'{folder} holds a model already: name another folder')
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write into {folder}: {error.strerror}')
    write_model(folder, weights, info, tokenizer_from)
    print(f'wrote {folder}')


def convert(where, folder, weights='ema', objective=None):
    """Their model into one of our folders. objective: of a .ckpt, which does not say it."""
    path = find_file(where)
    config = read_config(path.parent)
    if path.suffix == '.ckpt':
        state = read_lightning(path, weights)
        config['model_type'] = objective
    elif weights == 'raw':
        raise UserError(f'{path} holds one set of weights: --weights=raw is for a .ckpt')
    else:
        state = read_weights(path)
    state = {WRAPPERS.sub('', name): w for name, w in without_buffers(state).items()}
    if has_entries(config, INFO):  # written by export
        info = {key: value for key, value in config.items() if key not in AUTHORS}
    else:
        info = infer_info(config, state, where)
    model = build_model(info, state, where)
    write_new(folder, model.state_dict(), info | dict(model=asdict(model.config)), path.parent)


def export(where, folder, weights='ema'):
    """Our model with the authors' names, layout and config.json, which has our entries as well."""
    model, info = load_model(where, weights)
    c, source = info['model'], info.pop('folder')
    state = {f'backbone.{name}': w for name, w in model.state_dict().items()}
    head_dim = c['n_embd'] // c['n_head']
    inv_freq = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    config = info | {theirs: c[ours] for theirs, ours in AUTHORS.items()}
    config.update(model_type=info['objective'], architectures=['DUO'])
    write_new(folder, state | {'backbone.rotary_emb.inv_freq': inv_freq}, config, source)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source')
    parser.add_argument('folder')
    parser.add_argument('--weights', choices=('ema', 'raw'), default='ema')
    parser.add_argument('--objective', choices=('duo', 'mdlm', 'ar'))
    parser.add_argument('--export', action='store_true')
    args = parser.parse_args()
    if args.export:
        export(args.source, args.folder, args.weights)
    else:
        convert(args.source, args.folder, args.weights, args.objective)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
