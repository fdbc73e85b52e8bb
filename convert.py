"""
The authors' checkpoints into our format, and ours into theirs:

    python convert.py hf:s-sahoo/duo out-duo           # then: python sample.py --out_dir=out-duo
    python convert.py duo.ckpt out-duo --objective=duo # the moving average of a Lightning .ckpt
    python convert.py --export out theirs              # for their DUO.from_pretrained

Theirs is a folder or hub repository with config.json and model.safetensors, or a Lightning .ckpt,
of a Duo or UDLM (--objective=duo), or, with GPT-2's tokens, of an MDLM or AR model. What
config.json does not say is read off the tensors' shapes, or assumed and printed; --objective says
what a .ckpt is, which has no config.json. A .ckpt is a pickle: nothing in it is executed, and one
that asks for more than settings and tokenizers is refused.
"""
import argparse
import re
from pathlib import Path

from configurator import UserError, run

import torch

from checkpoint import (INFO, UNREADABLE, build_model, fetch, has_entries, load_model,
                        read_config, read_torch, read_weights, write_model)
from model import DiTConfig

# What their config.json calls the fields of DiTConfig.
AUTHORS = dict(vocab_size='vocab_size', model_length='block_size', n_blocks='n_layer',
               n_heads='n_head', hidden_dim='n_embd', cond_dim='cond_dim', causal='causal')
# Their two vocabularies: name, bos, eos and pad of the tokenizer, and the length trained on. Their
# networks may have one token more, [PAD] in Duo, a mask in AR: no text has it, so it is left out.
TOKENIZERS = {50257: ('gpt2', 50256, 50256, None, 1024), 30522: ('bert', 101, 102, 0, 128)}
# The modules of the settings and tokenizers that their .ckpt files hold besides tensors.
HARMLESS = re.compile(r'(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|typing)\.'
                      r'|collections\.defaultdict$'
                      r'|builtins\.(dict|list|tuple|int|float|str|bool|object)$')


class Inert(dict):
    """Stands for any object of a pickle, and runs nothing of its class."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def our_names(state):
    """state without wrapper prefixes in its names, and without RoPE's frequencies: no weights."""
    return {name.replace('backbone.', '').replace('_orig_mod.', ''): w
            for name, w in state.items() if not name.endswith('inv_freq')}


def read_lightning(path):
    """{name: tensor} of a Lightning .ckpt: the moving average, where it has one. Its settings are
    not read: the shapes tell most."""
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE as error:
        raise UserError(f'{path} cannot be used: {error!r:.200}')
    payload = [name for name in strange if not HARMLESS.match(name)]
    if payload:
        raise UserError(f'{path} is a pickle that wants to run {", ".join(payload)}: not opened. '
                        'Ask for safetensors')
    with torch.serialization.safe_globals([(Inert, name) for name in strange]):
        ckpt = read_torch(path, dict(state_dict=dict))
    state = our_names(ckpt['state_dict'])
    if not has_entries(ckpt, dict(ema=dict)):
        print(f'{path} has no moving average: its weights are taken as they are')
        return state
    # A list in the order of the parameters, which is that of the state dict.
    shadow = ckpt['ema'].get('shadow_params') or []
    if [w.shape for w in shadow] != [w.shape for w in state.values()]:
        raise UserError(f'{path}: its moving average ({len(shadow)} tensors) does not fit its '
                        f'{len(state)} weights')
    return dict(zip(state, shadow))


def infer_info(config, state, where):
    """Our config.json from theirs and, where it is silent, from the shapes of the tensors. Leaves
    the token that no text has out of state."""
    if 'vocab_embed.embedding' not in state:
        raise UserError(f'{where} holds no DiT: vocab_embed.embedding is missing')
    K, C = state['vocab_embed.embedding'].shape
    adaln = 'output_layer.adaLN_modulation.weight'
    causal = adaln not in state                          # only an autoregressive one has no adaLN
    cond_dim = DiTConfig.cond_dim if causal else state[adaln].size(1)
    n_blocks = len({name.split('.')[1] for name in state if name.startswith('blocks.')})
    found = dict(vocab_size=K, n_blocks=n_blocks, hidden_dim=C, causal=causal)
    for name, value in found.items():
        if config.get(name, value) != value:
            raise UserError(f'{where}: its config.json says {name} {config[name]}, its tensors '
                            f'{value}')
    objective = 'ar' if causal else str(config.get('model_type')).lower()
    has_time = objective == 'duo'
    known = has_time or objective in ('mdlm', 'ar') and K != 30522  # BERT's mask is not the last
    if not known or config.get('time_conditioning', has_time) != has_time:
        raise UserError(
            f'{where} is a {objective} model of {K} tokens: only Duo (and UDLM, by --objective=duo)'
            " with time_conditioning, MDLM and AR without it and with GPT-2's tokens can be "
            'converted; --objective says what a .ckpt is')

    mask = 1 if objective == 'mdlm' else 0
    n_tokens = K - mask
    if n_tokens - 1 in TOKENIZERS:                       # one token more than the tokenizer has
        n_tokens -= 1
        for name, w in state.items():
            if w.shape[:1] == (K,):                      # the embedding and the head
                state[name] = w[:n_tokens + mask]
    tokenizer, bos, eos, pad, length = TOKENIZERS.get(
        n_tokens, (f'of {n_tokens} tokens', 0, 0, None, 1024))
    assumed = dict(n_heads=C // 64 or 1, model_length=length)
    shown = [f'{name} {value}' for name, value in assumed.items() if name not in config]
    print(f'{where}: {objective}, {n_blocks} layers of {C}, tokenizer {tokenizer} ({n_tokens} of '
          f'the {K} tokens); assumed: {", ".join(shown) or "nothing"}')
    config = {'cond_dim': cond_dim} | assumed | config | found | {'vocab_size': n_tokens + mask}
    return dict(
        objective=objective,
        model={ours: config[theirs] for theirs, ours in AUTHORS.items()},
        data=dict(tokenizer=tokenizer, tokenizer_sha256=None, vocab_size=n_tokens, bos_id=bos,
                  eos_id=eos, pad_id=pad),
        settings={},
    )


def write_new(folder, weights, info, tokenizer_from):
    """write_model into a folder without a model."""
    if Path(folder, 'model.safetensors').exists():
        raise UserError(f'{folder} holds a model already: name another folder')
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_model(folder, weights, info, tokenizer_from)
    print(f'wrote {folder}')


def convert(where, folder, objective=None):
    """Their model into one of our folders. objective: what it is, where it has no config.json."""
    path = Path(where)
    if path.suffix == '.ckpt':
        source = path.parent
        state = read_lightning(path)
    else:
        source = fetch(where)
        state = our_names(read_weights(source / 'model.safetensors')[0])
    config = read_config(source)
    if objective:
        config['model_type'] = objective
    info = config.get('nanoduo')
    if not has_entries(info, INFO):                      # not written by export
        info = infer_info(config, state, where)
    build_model(info, state, where)                      # nothing is written that does not load
    write_new(folder, state, info, source)


def export(where, folder):
    """Our model with the authors' names, layout and config.json, which has ours as an entry."""
    model, info = load_model(where)
    c = model.config
    source = info.pop('folder')
    state = {f'backbone.{name}': w for name, w in model.state_dict().items()}
    head_dim = c.n_embd // c.n_head
    state['backbone.rotary_emb.inv_freq'] = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    config = {theirs: getattr(c, ours) for theirs, ours in AUTHORS.items()}
    config.update(model_type=info['objective'], architectures=['DUO'], nanoduo=info)
    write_new(folder, state, config, source)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('source')
    parser.add_argument('folder')
    parser.add_argument('--objective')
    parser.add_argument('--export', action='store_true')
    args = parser.parse_args()
    if args.export:
        export(args.source, args.folder)
    else:
        convert(args.source, args.folder, args.objective)


if __name__ == '__main__':
    run(main)
