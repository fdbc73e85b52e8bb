"""eval.py and the baselines through the command line."""
import json
import math

import pytest
import torch

from data import get_rows, load_data, load_tokenizer, num_rows
from eval import diversity, hub_judge, our_judge, prior_term
from helpers import TINY, good, log, one_line, run


def last_json(said):
    return json.loads(said.strip().splitlines()[-1])


@pytest.fixture(scope='module')
def baselines(work):
    for objective in ('ar', 'mdlm'):
        good(run(work, 'train.py', *TINY, f'--objective={objective}', f'--out_dir=out-{objective}', '--max_iters=40',
                 '--learning_rate=1e-2', '--eval_interval=40'))
    return work


def test_likelihood_of_each_objective(baselines):
    for objective in ('ar', 'mdlm', 'duo'):
        folder = 'out' if objective == 'duo' else f'out-{objective}'
        said = good(run(baselines, 'eval.py', f'--out_dir={folder}', '--draws=2'))
        r = last_json(said)
        assert r['objective'] == objective and ('at most' in said) == (objective != 'ar') and r['rows'] > 8
        assert r['ppl'] == pytest.approx(math.exp(r['nll'])) and r['ppl_error'] == pytest.approx(r['ppl'] * r['error'])
        assert r['bpd'] == pytest.approx(r['nll'] / math.log(2))
        assert 0 < r['error'] < 0.5 * r['nll']
        val_loss, val_error = (log(baselines / folder, key)[-1] for key in ('val_loss', 'val_error'))
        assert abs(r['nll'] - val_loss) < 5 * (r['error'] + val_error)
        assert ('prior_term' in r) == (objective == 'duo')


def test_two_processes_evaluate_as_one(baselines):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    one = last_json(good(run(baselines, 'eval.py', '--max_rows=40')))
    two = last_json(good(run(baselines, 'eval.py', '--max_rows=40', launcher=torchrun)))
    assert two['nll'] == pytest.approx(one['nll'], rel=1e-6) and two['error'] == pytest.approx(one['error'], rel=1e-6)


def test_samples_are_judged_by_our_own_ar_model(baselines):
    for folder in ('out', 'out-mdlm', 'out-ar'):
        results = last_json(good(run(baselines, 'eval.py', f'--out_dir={folder}', '--gen_ppl=out-ar', '--steps=1,4',
                                     '--num_samples=5', '--batch_size=3', '--temperature=0.5,1')))
        assert len(results) == (2 if folder == 'out-ar' else 4)
        assert all(r['gen_ppl'] > 1 and 0 <= r['repetition'] < 1 and r['samples_per_s'] > 0 for r in results)
        assert [r['calls'] for r in results] == ([31] * 2 if folder == 'out-ar' else [2, 2, 5, 5])
        cold, warm = results[0], results[1]
        assert cold['temperature'] == 0.5 and cold['entropy'] < warm['entropy'] + 0.5
        assert len((baselines / folder / 'gen.jsonl').read_text().splitlines()) == len(results)


def test_the_judge_agrees_with_its_own_perplexity(baselines):
    """Real held-out text, scored as samples are, has the AR model's own validation perplexity."""
    info = json.loads((baselines / 'out-ar' / 'config.json').read_text())
    meta, tokens = load_data(baselines / 'data' / 'tiny')
    rows = get_rows(tokens['val'], range(num_rows(tokens['val'], 32)), 32, meta).tolist()
    mean = our_judge(str(baselines / 'out-ar'), info, 'cpu')(rows)
    nll = last_json(good(run(baselines, 'eval.py', '--out_dir=out-ar')))['nll']
    assert mean == pytest.approx(nll, rel=1e-5)


def test_a_hub_judge_by_the_published_rules(baselines):
    """A GPT-2 of transformers, made here, against a loop over its tokens: cut to its context, and of end-of-text
    tokens only the first is scored."""
    transformers = pytest.importorskip('transformers', reason='the hub judge needs transformers')
    import tokenizers
    alphabet = {chr(c): c - 32 for c in range(32, 127)} | {'\n': 95, '<|endoftext|>': 96, '?': 97}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token='?'))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
    hub_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='<|endoftext|>', unk_token='?')
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=98, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=96, eos_token_id=96,
        initializer_range=0.5)).eval()
    for part in (hub_tokenizer, gpt2):
        part.save_pretrained(baselines / 'judge')

    folder = baselines / 'data' / 'tiny'
    tokenizer = load_tokenizer(json.loads((folder / 'meta.json').read_text()), folder)
    rows = [[0, *b'This is line 3', 0, 0, *b'and 9 is its square.'], [*b'no end at all, and long'], [0] * 9]
    mean = hub_judge(str(baselines / 'judge'), tokenizer, 0, 'cpu')(rows)
    expected, scored = 0.0, 0
    for row in rows:
        ids = [96 if i == 0 else alphabet[chr(i)] for i in row][:24]
        logp = gpt2(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for at in range(1, len(ids)):
            if ids[at] != 96 or 96 not in ids[:at]:
                expected, scored = expected - logp[at - 1, ids[at]].item(), scored + 1
    assert mean == pytest.approx(expected / scored, rel=1e-4)
    r = last_json(good(run(baselines, 'eval.py', '--gen_ppl=judge', '--steps=2', '--num_samples=2')))
    assert r[0]['gen_ppl'] > 1 and r[0]['judge'] == 'judge'


def test_sampling_from_the_baselines(baselines):
    assert '32 tokens' in good(run(baselines, 'sample.py', '--out_dir=out-mdlm', '--steps=4', '--prompt=This'))
    said = good(run(baselines, 'sample.py', '--out_dir=out-ar', '--prompt=This', '--num_samples=1'))
    assert said.split('-' * 80 + '\n')[1].strip('\n').startswith('This') and '31 network calls' in said
    one_line(run(baselines, 'sample.py', '--out_dir=out-ar', '--suffix=end'), 'suffix')


def test_a_repeated_token_has_no_entropy():
    """Why entropy stands beside Gen-PPL: a judge finds one repeated token most likely."""
    dull, rich = diversity([[7] * 64]), diversity([list(range(64))])
    assert dull['entropy'] == 0 and dull['repetition'] > 0.9
    assert rich['entropy'] == pytest.approx(math.log(64)) and rich['repetition'] == 0
    assert diversity([[7] * 64, list(range(64))])['entropy'] == pytest.approx(math.log(64) / 2)
    assert diversity([[1, 2, 3, 4, 1, 2, 3, 4]])['repetition'] == pytest.approx(1 / 5)


def test_prior_term_by_hand():
    alpha, K = 1e-3, 4
    q = [alpha + (1 - alpha) / K] + [(1 - alpha) / K] * (K - 1)
    assert prior_term(K) == pytest.approx(sum(p * math.log(p * K) for p in q), rel=1e-9)


@pytest.mark.parametrize('args, words', [
    (['--split=test'], ['split']), (['--out_dir=nowhere'], ['nowhere']), (['--dataset=none'], ['prepare.py']),
    (['--gen_ppl=out'], ['out', 'autoregressive']), (['--gen_ppl=out-ar', '--steps=some'], ['steps']),
    (['--gen_ppl=out-ar', '--steps=8,0'], ['steps']), (['--gen_ppl=out-ar', '--eta=2'], ['eta']),
    (['--dataset=other'], ['tokenizer']), (['--gen_ppl=out-ar', '--temperature=0'], ['temperature']),
    (['--gen_ppl=out-ar', '--temperature=1,nan'], ['temperature']), (['--draws=0'], ['draws', 'at least 1']),
    (['--sampler=psi', '--out_dir=out-ar', '--gen_ppl=out-ar'], ['psi', 'ar']), (['--length=1'], ['length']),
    (['--gen_ppl=out-ar', '--psi=some'], ['psi', 'rescale']), (['--gen_ppl=out-other'], ['vocabulary'])])
def test_eval_refuses_in_one_line(baselines, args, words):
    if not (baselines / 'out-other').exists():
        good(run(baselines, 'prepare.py', 'tiny.txt', '--name=other', '--vocab_size=300'))
        good(run(baselines, 'train.py', *TINY, '--dataset=other', '--objective=ar', '--out_dir=out-other', '--max_iters=1'))
    one_line(run(baselines, 'eval.py', *args), *words)
