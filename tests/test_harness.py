"""eval.py --lm_eval: tasks made here, by the command line, and lm_eval's rules by known scores."""
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from checkpoint import has_state
from data import load_tokenizer
from helpers import TINY, good, log, one_line, run, run_here, run_ranks
from test_eval import evaluated
from test_sample import of_model, random_model

pytest.importorskip('lm_eval', reason='needs pip install lm_eval')
import harness                                                       # noqa: E402

TASK = '''
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
'''
CHOICE = '''
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
'''
CONTINUE = '''
output_type: generate_until
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
'''
ROLLING = '''
output_type: loglikelihood_rolling
metric_list: [{metric: bits_per_byte}]
'''


def write_task(folder, name, more, questions):
    folder.mkdir(exist_ok=True)
    file = folder / f'{name}.json'
    file.write_text('\n'.join(map(json.dumps, questions)))
    (folder / f'{name}.yaml').write_text(TASK.format(name=name, file=file, more=more))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))


@pytest.fixture
def only_ours(monkeypatch):
    """Without lm_eval's own tasks, of which the list takes seconds to read."""
    monkeypatch.setattr(harness, 'Tasks', partial(harness.Tasks, include_defaults=False))


@pytest.fixture(scope='module')
def trained(work):
    for objective in ('ar', 'mdlm', 'duo'):
        more = (f'--objective={objective} --out_dir=knows-{objective} --max_iters=150 --dropout=0 '
                '--learning_rate=1e-2 --eval_interval=150 --n_embd=64').split()
        good(run_here(work, 'train.py', *TINY, *more))
    lines = [dict(question=f'This is line {i} of', choices=['a small text', 'xq zjv kwpy'],
                  answer=0) for i in range(20)]
    write_task(work / 'tasks', 'lines', CHOICE, lines)
    write_task(work / 'tasks', 'rest', CONTINUE, [dict(question='This is', answer='line')])
    write_task(work / 'tasks', 'whole', ROLLING, [dict(question='', answer='This is line 7 of a')])
    return work


@pytest.mark.parametrize('objective', ['ar', 'mdlm', 'duo'])
def test_tasks_from_the_command_line(trained, only_ours, objective):
    args = f'--out_dir=knows-{objective} --lm_eval_tasks=tasks --lm_eval_draws=8 --steps=4'.split()
    figures = evaluated(trained, '--lm_eval=lines,rest,whole', *args)
    assert figures['out_dir'] == f'knows-{objective}'
    assert figures['lines acc'] >= 0.8
    assert figures['lines acc_norm'] >= 0.8
    assert 0 <= figures['rest exact_match'] <= 1
    assert 0 < figures['whole bits_per_byte'] < 8


def test_an_unknown_task_among_those_of_lm_eval(trained):
    one_line(run_here(trained, 'eval.py', '--lm_eval=piqa,nothing'), "no task 'nothing'")


@pytest.mark.parametrize('args, said', [
    ('--lm_eval=lines, --lm_eval_tasks=tasks', "no task ''"),
    ('--lm_eval=piqa --lm_eval_tasks=nowhere', 'nowhere: no such folder'),
    ('--lm_eval=broken --lm_eval_tasks=broken', 'broken.json'),
    ('--lm_eval=senseless --lm_eval_tasks=broken', 'senseless')])
def test_mistakes_are_one_line(trained, only_ours, args, said):
    if not (trained / 'broken').exists():
        write_task(trained / 'broken', 'broken', CHOICE, [])
        (trained / 'broken' / 'broken.json').unlink()
        (trained / 'broken' / 'senseless.yaml').write_text('task: senseless')
    one_line(run_here(trained, 'eval.py', *args.split()), said)


def test_the_choice_is_the_likeliest_as_a_whole_or_by_length(tmp_path, monkeypatch, only_ours):
    """HellaSwag's rule, which lm_eval calls acc_norm: nats by the character (acc_bytes: by the
    byte). The nats of each answer are known here; the blank before it does not count."""
    nats = {' yes': 1, ' certainly': 4, ' no': 2, ' by no means': 3, ' abcdef': 5, ' äöü': 4.5}
    questions = [
        dict(question='A?', choices=['yes', 'certainly'], answer=0),         # 1 < 4, 1/3 < 4/9
        dict(question='B?', choices=['no', 'by no means'], answer=1),        # 2 < 3, 2/2 > 3/11
        dict(question='C?', choices=['no', 'abcdef'], answer=0),             # 2 < 5, 2/2 > 5/6
        dict(question='D?', choices=['no', 'äöü'], answer=1),        # 2/2 < 4.5/3, 2/2 > 4.5/6
        dict(question='beyond the limit', choices=['no', 'yes'], answer=0),
    ]
    loaded = of_model(random_model(256, T=32), 'duo')
    loaded = loaded._replace(
        tokenizer=load_tokenizer(dict(tokenizer='bytes', vocab_size=256, eos_id=0), ''))
    seen = []

    def known_score(loaded, parts, draws):
        assert draws == 5
        for before, answer, after in parts:
            assert after == []
            seen.append((bytes(before).decode(), bytes(answer).decode()))
        return torch.tensor([nats[answer] for _, answer in seen], dtype=torch.float64), None
    monkeypatch.setattr(harness, 'score_rows', known_score)
    write_task(tmp_path, 'known', CHOICE, questions)
    figures = harness.run_tasks(loaded, ['known'], str(tmp_path), 4, 5, {})
    assert [figures[f'known {name}'] for name in ('acc', 'acc_norm', 'acc_bytes')] == [.5, .5, .75]
    assert seen[:2] == [('A?', ' yes'), ('A?', ' certainly')]


def test_a_run_ends_when_its_score_passes_the_gate(trained):
    """Scored by another process, of which lm_eval's own list of tasks takes seconds."""
    args = [*TINY, '--max_iters=40', '--eval_interval=1', '--num_samples=0', '--gate=lines acc',
            '--gate_options=--lm_eval_tasks=tasks --lm_eval_draws=2']
    again = [*args, '--out_dir=gate', '--init_from=resume']
    said = good(run(trained, 'train.py', *args, '--gate_score=0', '--out_dir=gate'))
    assert 'step 1: lines acc ' in said and 'gate 0.0' in said
    [score] = log(trained / 'gate', 'score')
    assert 0 <= score <= 1 and has_state(trained / 'gate')
    assert (trained / 'gate' / 'README.md').exists()
    good(run(trained, 'train.py', *again, '--gate_score=0'))
    assert log(trained / 'gate', 'step')[-1] == 1
    two = ['--gradient_accumulation_steps=2', '--gate_score=0', '--out_dir=gate-two']
    good(run_ranks(trained, 'train.py', *args, *two))
    assert log(trained / 'gate-two', 'step')[-1] == 1
    for gate, options in [('lines nothing', '--lm_eval_tasks=tasks'), ('lines acc', '--help')]:
        said = good(run(trained, 'train.py', *again, '--gate_score=0', '--max_iters=2',
                        '--eval_interval=2', f'--gate={gate}', f'--gate_options={options}'))
        assert f'no score for --gate={gate}' in said
    assert log(trained / 'gate', 'step')[-1] == 2
    one_line(run_here(trained, 'train.py', *args, '--gate=lines'), 'a task and its metric')


def asked(*args):
    return [SimpleNamespace(args=args)]


def test_long_contexts_lose_their_beginning_and_texts_end_at_a_stop():
    loaded = of_model(random_model(60, T=16, causal=True), 'ar')
    tokenizer = load_tokenizer(dict(tokenizer='bytes', vocab_size=256, eos_id=59), '')
    low = tokenizer._replace(encode=lambda text: [ord(c) % 50 for c in text])
    lm = harness.NanoDuo(loaded._replace(tokenizer=low), 4, dict(steps=4))
    (nats, _), = lm.loglikelihood(asked('a very long beginning', 'and end'))
    assert lm.loglikelihood(asked('beginning'[-7:], 'and end'))[0][0] == nats
    assert lm.loglikelihood(asked('be ', 'gin')) == lm.loglikelihood(asked('be', ' gin'))
    row = torch.tensor([[0, *low.encode('inning')]])
    best = loaded.model(row)[0, -1].argmax().item()
    for token in (best, (best + 1) % 50):
        part = low.encode('inning'), [token], []
        assert lm.are_greedy([part, part]) == 2 * [token == best]
    whole, = lm.loglikelihood_rolling(asked('a text of 20 letters'))
    windows = [lm.loglikelihood(asked('', text))[0][0] for text in ('a text of 20 l', 'etters')]
    assert whole == pytest.approx(sum(windows))
    assert lm.loglikelihood_rolling(asked('')) == [0]
    text, = lm.generate_until(asked('begin', dict(until=[], max_gen_toks=6)))
    assert len(text) == 6
    stop = text[2:4]
    for until in (stop, [stop], ['not there', stop]):
        again, = lm.generate_until(asked('begin', dict(until=until, max_gen_toks=6)))
        assert again == text[:text.index(stop)]
    for more in ({}, dict(until=text[0] + '~')):             # '~' is no token
        assert lm.generate_until(asked('begin', dict(max_gen_toks=6, **more))) == [text]
    ids = low.encode('begin')
    for token in text.encode():
        assert loaded.model(torch.tensor([[0, *ids]]))[0, -1].argmax() == token
        ids.append(token)
    lm.loaded.info['data']['eos_id'] = eos = text.encode()[3]
    ended, = lm.generate_until(asked('begin', dict(max_gen_toks=6)))
    assert ended == text[:text.index(chr(eos))]
