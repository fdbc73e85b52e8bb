"""eval.py and the baselines through the command line."""
import json
import math
import random
import shutil
import sys

import pytest
import torch

from data import get_rows, load_data, load_tokenizer, num_rows
from eval import diversity, hub_judge, our_judge, reverse_ppl
from helpers import TINY, good, log, one_line, project_with, run, run_here


def last_json(said):
    """Of strict JSON, which knows no NaN."""
    return json.loads(said.strip().splitlines()[-1], parse_constant=pytest.fail)


def evaluated(folder, *args):
    return last_json(good(run_here(folder, 'eval.py', *args)))


@pytest.fixture(scope='module')
def baselines(work):
    for objective in ('ar', 'mdlm'):
        more = (f'--objective={objective} --out_dir=out-{objective} --max_iters=40 '
                '--learning_rate=1e-2 --eval_interval=40 --num_samples=0').split()
        good(run_here(work, 'train.py', *TINY, *more))
    return work


@pytest.mark.parametrize('objective, out_dir', [
    ('ar', 'out-ar'), ('mdlm', 'out-mdlm'), ('duo', 'out')])
def test_likelihood_of_each_objective(baselines, objective, out_dir):
    start = run if objective == 'duo' else run_here
    said = good(start(baselines, 'eval.py', f'--out_dir={out_dir}', '--draws=2'))
    r = last_json(said)
    assert r['objective'] == objective
    assert r['rows'] > 8
    assert r['draws'] == (1 if objective == 'ar' else 2)       # AR's figure is exact
    assert ('at most' in said) == (objective != 'ar')
    assert r['ppl'] == pytest.approx(math.exp(r['nll']))
    assert r['ppl_error'] == pytest.approx(r['ppl'] * r['error'])
    assert r['bpd'] == pytest.approx(r['nll'] / math.log(2))
    assert 0 < r['error'] < 0.5 * r['nll']
    val_loss = log(baselines / out_dir, 'val_loss')[-1]
    val_error = log(baselines / out_dir, 'val_error')[-1]
    assert abs(r['nll'] - val_loss) < 5 * (r['error'] + val_error)


def test_two_processes_evaluate_as_one(baselines):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    one = evaluated(baselines, '--max_rows=40')
    two = last_json(good(run(baselines, 'eval.py', '--max_rows=40', launcher=torchrun)))
    assert two['nll'] == pytest.approx(one['nll'], rel=1e-6)
    assert two['error'] == pytest.approx(one['error'], rel=1e-6)


def test_one_row_has_no_error(baselines):
    r = evaluated(baselines, '--max_rows=1')
    assert r['rows'] == 1 and r['nll'] > 0
    assert r['error'] is None and r['ppl_error'] is None


def test_draws_shrink_the_error_of_each_row(baselines):
    """The times of a row's draws are spread evenly: their mean varies less than one alone."""
    one, many = (evaluated(baselines, f'--draws={n}', '--max_rows=64') for n in (1, 8))
    assert many['error'] < 0.7 * one['error']
    assert abs(many['nll'] - one['nll']) < 4 * one['error']


def test_a_distilled_model_is_no_language_model(baselines):
    shutil.copytree(baselines / 'out', baselines / 'distilled')
    config = baselines / 'distilled' / 'config.json'
    info = json.loads(config.read_text())
    info['settings']['objective'] = 'dcd'
    config.write_text(json.dumps(info))
    said = good(run_here(baselines, 'eval.py', '--out_dir=distilled', '--max_rows=8'))
    assert 'distilled' in said.splitlines()[1]
    assert 'distilled' not in good(run_here(baselines, 'eval.py', '--max_rows=8'))


def test_where_figures_cannot_be_written_nothing_is_sampled(baselines):
    shutil.copytree(baselines / 'out', baselines / 'full')
    (baselines / 'full' / 'gen.jsonl').mkdir()
    done = run_here(baselines, 'eval.py', '--out_dir=full', '--gen_ppl=out-ar', '--steps=1000000')
    one_line(done, 'gen.jsonl')


def test_the_judge_must_be_sure_of_something(baselines):
    """What the judge makes of the samples is a number, or the evaluation ends in one line."""
    code = 'def our_judge(*_):\n    return lambda rows: [torch.full((2, 3), math.nan)]\n'
    project_with(baselines, code, 'eval.py')
    done = run_here(baselines, baselines / 'eval.py', '--gen_ppl=out-ar', '--steps=1',
                    '--num_samples=1')
    one_line(done, 'out-ar', 'nan')


def test_samples_are_judged_by_our_own_ar_model(baselines):
    sampling = '--gen_ppl=out-ar --steps=1,4 --num_samples=5 --batch_size=3 --temperature=0.5,1'
    for out_dir in ('out', 'out-mdlm', 'out-ar'):
        results = evaluated(baselines, f'--out_dir={out_dir}', *sampling.split())
        assert [r['steps'] for r in results] == ([31, 31] if out_dir == 'out-ar' else [1, 1, 4, 4])
        for r in results:
            assert r['sampler'] == 'ancestral'
            assert r['gen_ppl'] > 1
            assert 0 <= r['repetition'] < 1
            assert r['samples_per_s'] > 0
            assert r['reverse_ppl'] > r['reverse_ppl_real'] > 1
        cold, warm = results[0], results[1]
        assert cold['temperature'] == 0.5
        assert cold['entropy'] < warm['entropy'] + 0.5
        assert len((baselines / out_dir / 'gen.jsonl').read_text().splitlines()) == len(results)


def test_the_judge_agrees_with_its_own_perplexity(baselines):
    """Real held-out text, scored as samples are, has the AR model's own validation perplexity."""
    info = json.loads((baselines / 'out-ar' / 'config.json').read_text())
    meta, tokens = load_data(baselines / 'data' / 'tiny')
    rows = get_rows(tokens['val'], range(num_rows(tokens['val'], 32)), 32, meta).tolist()
    judge = our_judge(str(baselines / 'out-ar'), info, 'cpu')
    mean = torch.cat(list(judge(rows))).mean().item()
    assert mean == pytest.approx(evaluated(baselines, '--out_dir=out-ar')['nll'], rel=1e-5)


def test_a_hub_judge_by_the_published_rules(baselines):
    """A GPT-2 of transformers, made here, against a loop over its tokens: cut to its context, and
    of end-of-text tokens only the first is scored."""
    transformers = pytest.importorskip('transformers', reason='the hub judge needs transformers')
    import tokenizers
    alphabet = {chr(c): c - 32 for c in range(32, 127)} | {'\n': 95, '<|endoftext|>': 96, '?': 97}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token='?'))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
    hub_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token='<|endoftext|>', unk_token='?')
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=98, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=96,
        eos_token_id=96, initializer_range=0.5)).eval()
    for part in (hub_tokenizer, gpt2):
        part.save_pretrained(baselines / 'judge')

    folder = baselines / 'data' / 'tiny'
    tokenizer = load_tokenizer(json.loads((folder / 'meta.json').read_text()), folder)
    rows = [
        [0, *b'This is line 3', 0, 0, *b'and 9 is its square.'],
        [*b'no end at all, and long'],
        [0] * 9,
    ]
    judge = hub_judge(str(baselines / 'judge'), tokenizer, 0, 'cpu')
    mean = torch.cat(list(judge(rows))).mean().item()
    expected, scored = 0.0, 0
    for row in rows:
        ids = [96 if i == 0 else alphabet[chr(i)] for i in row][:24]
        logp = gpt2(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for at in range(1, len(ids)):
            if ids[at] != 96 or 96 not in ids[:at]:
                expected -= logp[at - 1, ids[at]].item()
                scored += 1
    assert mean == pytest.approx(expected / scored, rel=1e-4)
    r = evaluated(baselines, '--gen_ppl=judge', '--steps=2', '--num_samples=2')
    assert r[0]['gen_ppl'] > 1
    assert r[0]['judge'] == 'judge'


def test_sampling_from_the_baselines(baselines):
    mdlm = good(run_here(baselines, 'sample.py', '--out_dir=out-mdlm', '--steps=4',
                         '--prompt=This'))
    assert '32 tokens' in mdlm
    ar = good(run_here(baselines, 'sample.py', '--out_dir=out-ar', '--prompt=This',
                       '--num_samples=1'))
    assert ar.split('-' * 80 + '\n')[1].strip('\n').startswith('This')
    assert '31 network calls' in ar
    one_line(run_here(baselines, 'sample.py', '--out_dir=out-ar', '--suffix=end'), 'suffix')


def test_a_repeated_token_has_no_entropy():
    """Why entropy stands beside Gen-PPL: a judge finds one repeated token most likely."""
    dull, rich = [7] * 64, list(range(64))
    assert diversity([dull])['entropy'] == 0
    assert diversity([dull])['repetition'] > 0.9
    assert diversity([rich])['entropy'] == pytest.approx(math.log(64))
    assert diversity([rich])['repetition'] == 0
    assert diversity([dull, rich])['entropy'] == pytest.approx(math.log(64) / 2)
    assert diversity([[1, 2, 3, 4, 1, 2, 3, 4]])['repetition'] == pytest.approx(1 / 5)
    assert diversity([[1, 1, 1]])['repetition'] == 0           # too short for 4-grams


def text_of_a_language(seed, choices=(0, 1, 2, 3), n=40, T=100):
    """Rows in which the next token is one of four, by the last one; equally likely ones, or as
    often as they stand in choices."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        row = [0]
        while len(row) < T:
            row.append((2 * row[-1] + draw.choice(choices)) % 500)
        rows.append(row)
    return rows


def test_real_text_has_the_least_reverse_perplexity():
    real, other = text_of_a_language(1), text_of_a_language(2)
    best = reverse_ppl(other, real, 500)
    assert 4 < best < 20                                 # each token is one of four
    draw = random.Random(3)
    shuffled = [draw.sample(row, len(row)) for row in other]
    uniform = [[draw.randrange(500) for _ in row] for row in other]
    cold = text_of_a_language(2, choices=(0, 0, 0, 0, 0, 0, 0, 1, 2, 3))
    for wrong in (shuffled, uniform, cold, other[:20] * 2, other[:1] * 40, [[7] * 100] * 40):
        assert reverse_ppl(wrong, real, 500) > 2 * best


def test_reverse_perplexity_is_of_witten_bell_bigrams():
    """By hand, of aab in a vocabulary of 4. p(a) = (2 + 2/4) / (3 + 2) = 1/2, p(b) = 3/10, and 1/10
    of each other token. After a: p(b|a) = (1 + 2 p(b)) / (2 + 2), p(c|a) = (0 + 2 p(c)) / 4."""
    a, b, c = range(3)
    ppl = lambda *row: reverse_ppl([[a, a, b]], [row], 4)
    assert ppl(a, b) == pytest.approx(1 / 0.4)
    assert ppl(a, c) == pytest.approx(1 / 0.05)
    assert ppl(c, a) == pytest.approx(1 / 0.5)           # c is new, a no surprise
    assert ppl(a, b, a) == pytest.approx((0.4 * 0.5) ** -0.5)
    assert sum(1 / ppl(a, token) for token in range(4)) == pytest.approx(1)


def test_without_the_data_set_no_reverse_perplexity(baselines, tmp_path):
    args = '--gen_ppl=out-ar --steps=1 --num_samples=2'.split()
    said = good(run_here(baselines, 'eval.py', *args, f'--data_dir={tmp_path}'))
    assert said.count('no reverse perplexity') == 1
    assert 'reverse_ppl' not in last_json(said)[0]


def test_lm_eval_is_asked_for_by_name(baselines, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)    # as if it were not installed
    monkeypatch.delitem(sys.modules, 'harness', raising=False)
    one_line(run_here(baselines, 'eval.py', '--lm_eval=hellaswag'), 'pip install lm_eval')


@pytest.mark.parametrize('args, said', [
    ('--split=test', 'split'),
    ('--draws=0', 'from 1 to'),
    ('--draws=100000000000000000000', 'from 1 to'),
    ('--length=1', 'length'),
    ('--out_dir=nowhere', 'nowhere'),
    ('--dataset=none', 'prepare.py'),
    ('--dataset=other', 'tokenizer'),
    ('--gen_ppl=out', 'autoregressive'),
    ('--gen_ppl=out-other', 'vocabulary'),
    ('--gen_ppl=out-ar --lm_eval=hellaswag', 'one of them'),
    ('--gen_ppl=out-ar --steps=some', 'steps'),
    ('--gen_ppl=out-ar --steps=8,0', 'steps'),
    ('--gen_ppl=out-ar --temperature=0', 'temperature'),
    ('--gen_ppl=out-ar --temperature=1,nan', 'temperature'),
    ('--gen_ppl=out-ar --eta=2', 'eta'),
    ('--gen_ppl=out-ar --psi=some', 'rescale'),
    ('--gen_ppl=out-ar --out_dir=out-ar --sampler=psi', 'psi')])
def test_eval_refuses_in_one_line(baselines, args, said):
    if not (baselines / 'out-other').exists():
        good(run_here(baselines, 'prepare.py', 'tiny.txt', '--name=other', '--vocab_size=300'))
        more = '--dataset=other --objective=ar --out_dir=out-other --max_iters=1'.split()
        good(run_here(baselines, 'train.py', *TINY, *more))
    one_line(run_here(baselines, 'eval.py', *args.split()), said)
