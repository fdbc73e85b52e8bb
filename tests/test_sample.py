"""sample.py through the command line, a notebook's eyes, and a browser."""
import json
import re
import shutil
import subprocess

import pytest
import torch

from helpers import good, one_line, run
from sample import generate, load


def test_sample(work):
    said = good(run(work, 'sample.py', '--steps', '3', '--prompt', 'Ünë', '--suffix', 'end', '--num_samples=2', '--top_p=0.9'))
    texts = said.split('-' * 80 + '\n')[1:-1]
    assert len(texts) == 2 and all(t.strip('\n').startswith('Ünë') and t.strip('\n').endswith('end') for t in texts)
    assert '4 network calls for 2 texts of 32 tokens' in said
    assert run(work, 'sample.py', '--steps=3').stdout.split(': ')[:-1] == run(work, 'sample.py', '--steps=3').stdout.split(': ')[:-1]
    frames = good(run(work, 'sample.py', '--steps=3', '--watch', '--greedy', '--weights=raw', '--length=40', '--out=texts.txt'))
    assert all(f'[call {i}]' in frames for i in range(1, 5)) and (work / 'texts.txt').read_text().count('-' * 80) == 3


@pytest.mark.parametrize('args, words', [
    (['--steps=0'], ['--steps']), (['--temperature=0'], ['--temperature']), (['--top_p=1.5'], ['--top_p']),
    (['--weights=best'], ['--weights']), (['--out_dir=nowhere'], ['nowhere', 'train.py']), (['--device=tpu'], ['tpu']),
    (['--prompt', 'x' * 40], ['--length']), (['--out=no/such/folder'], ['--out']), (['--stpes=3'], ['did you mean steps'])])
def test_sample_refuses_in_one_line(work, args, words):
    one_line(run(work, 'sample.py', '--steps=1', '--num_samples=1', *args), *words)


def test_every_sampler_ends_in_text(work):
    for args, said in ((['--sampler=psi'], 'psi rescale, eta 0.05, top-p 0.9'), (['--sampler=commit', '--greedy'], 'greedy tail'),
                       (['--sampler=psi', '--psi=loop', '--eta=0.2', '--top_p=1'], '(psi loop, eta 0.2)')):
        said_last = good(run(work, 'sample.py', '--steps=5', '--num_samples=1', *args)).splitlines()[-1]
        assert said in said_last and said_last.startswith('6 network calls')


def test_a_file_of_prompts_becomes_json_lines(work):
    (work / 'lines.txt').write_text('This is\nÜ and\n')
    good(run(work, 'sample.py', '--steps=2', '--prompts=lines.txt', '--num_samples=2', '--batch_size=3', '--out=texts.jsonl'))
    records = [json.loads(line) for line in open(work / 'texts.jsonl', encoding='utf-8')]
    assert [r['prompt'] for r in records] == ['This is'] * 2 + ['Ü and'] * 2
    assert all(r['text'].strip('\n').startswith(r['prompt']) for r in records)


def test_three_lines_in_a_notebook(work):
    model = load(work / 'out', device='cpu')
    torch.manual_seed(3)
    texts = generate(model, 'This is', num_samples=2, steps=3)
    torch.manual_seed(3)
    assert texts == generate(model, 'This is', num_samples=2, steps=3, sampler='ancestral', temperature=1.0)
    assert len(texts) == 2 and all(isinstance(t, str) and t.strip('\n').startswith('This is') for t in texts)


def test_the_page_shows_every_frame(work):
    """A slider moved in a real browser reads back the very texts that --watch saw."""
    args = ['--steps=6', '--num_samples=2', '--prompt=</script> <b>&', '--html=page.html']
    watched = good(run(work, 'sample.py', *args, '--watch')).split('\x1b[H\x1b[2J')[1:]
    watched = [frame.rsplit('\n\n[call', 1)[0] for frame in watched]
    page = (work / 'page.html').read_text(encoding='utf-8')
    assert 'http' not in page and page.count('</script>') == 1
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not browser:
        pytest.skip('no chromium to open the page with')
    probe = """<script>
      const read = [], slide = document.querySelector('input');
      for (let i = 0; i <= slide.max; i++) {
        slide.value = i; slide.dispatchEvent(new Event('input'));
        read.push(document.querySelector('pre').textContent);
      }
      document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));
      document.body.innerHTML = '<textarea></textarea>';
      document.querySelector('textarea').textContent = JSON.stringify([read, slide.value]).replace(/[^ -~]/g,
        c => '\\\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
    </script></html>"""
    (work / 'probe.html').write_text(page.replace('</html>', probe), encoding='utf-8')
    dom = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom', f'file://{work}/probe.html'],
                         capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<textarea>(.*)</textarea>', dom, re.S).group(1)
    for entity, char in (('&lt;', '<'), ('&gt;', '>'), ('&amp;', '&')):
        found = found.replace(entity, char)
    frames, at = json.loads(found)
    assert len(frames) == 8 and at == '6'                                # noise, six steps, noise removal; then one back
    ascii = lambda text: ''.join(c for c in text if ' ' <= c <= '~')      # of a longer character a token may be a part
    assert [ascii(f) for f in frames] == [ascii(w) for w in watched] and len(ascii(frames[0])) > 12
