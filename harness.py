"""
A model of this project as an LM of lm_eval, EleutherAI's Language Model Evaluation Harness
(pip install lm_eval). eval.py --lm_eval=hellaswag uses it.
"""
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from configurator import UserError
from diffusion import per_token
from sample import equally_long, fill_holes, generate, score_rows, with_bos_eos


class NanoDuo(LM):
    """loaded: load(...); options: the sampler's, for tasks that generate. A likelihood is exact for
    AR; for a diffusion model it is sample.score's bound, the mean of `draws` draws. Of a context
    that is too long the last tokens are kept."""

    def __init__(self, loaded, draws, options):
        super().__init__()
        self.tokenizer = loaded.tokenizer
        # generate gets ids instead of texts, since contexts are cut between tokens
        as_they_are = self.tokenizer._replace(encode=list, decode=list)
        self.loaded = loaded._replace(tokenizer=as_they_are)
        self.block_size = loaded.info['model']['block_size']
        self.draws = draws
        self.options = options

    def context(self, text, n):
        """The ids of a text, the last ones if all of them leave no room for n more."""
        ids = self.tokenizer.encode(text)
        return ids[max(0, len(ids) + n + 2 - self.block_size):]      # bos and eos are 2

    def loglikelihood(self, requests):
        """Blanks between context and answer belong to the answer, as in lm_eval's own models."""
        parts = []
        for request in requests:
            context, answer = request.args
            text = context.rstrip()
            answer = self.tokenizer.encode(context[len(text):] + answer)
            parts.append((self.context(text, len(answer)), answer, []))
        nats, _ = score_rows(self.loaded, parts, self.draws)
        return list(zip((-nats).tolist(), self.are_greedy(parts)))

    def are_greedy(self, parts):
        """Of each row: is every token of the answer the likeliest? For a diffusion model False."""
        greedy = [False] * len(parts)
        model, _, info = self.loaded
        if info['objective'] != 'ar':
            return greedy
        likeliest = lambda logits: logits.argmax(-1)
        rows = [with_bos_eos(self.loaded, context + answer) for context, answer, _ in parts]
        for indices in equally_long(rows):
            x, _ = fill_holes(self.loaded, [rows[i] for i in indices])
            best = per_token(model, x, None, likeliest, [])                                  # (n,T)
            for i, tokens in zip(indices, best.tolist()):
                context, answer, _ = parts[i]
                begin = len(context)                     # where its first token is predicted
                greedy[i] = tokens[begin:begin + len(answer)] == answer
        return greedy

    def loglikelihood_rolling(self, requests):
        """In windows that are scored independently."""
        n = self.block_size - 2
        result = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            windows = [([], ids[i:i + n], []) for i in range(0, max(1, len(ids)), n)]
            nats, _ = score_rows(self.loaded, windows, self.draws)
            result.append(-nats.sum().item())
        return result

    def generate_until(self, requests):
        """Greedy unless a task names a temperature; at most half of block_size tokens."""
        eos = self.loaded.info['data']['eos_id']
        result = []
        for request in requests:
            prompt, how = request.args
            n = min(how.get('max_gen_toks', 256), self.block_size // 2)
            prompt = self.context(prompt, n)
            options = self.options | dict(temperature=how.get('temperature') or 1e-4)
            [row] = generate(self.loaded, prompt, length=len(prompt) + n + 1, **options)
            ids = row[len(prompt):][:n]
            if eos in ids:
                ids = ids[:ids.index(eos)]
            text = self.tokenizer.decode(ids)
            stops = how.get('until') or []
            for stop in filter(None, [stops] if isinstance(stops, str) else stops):
                text = text.split(stop)[0]
            result.append(text)
        return result


class Tasks(TaskManager):
    def load(self, names):
        try:
            return super().load(names)
        except Exception as error:  # a task is a user's code, too, and can raise anything
            raise UserError(f'--lm_eval: {names} cannot be loaded: {error!r:.200}')


def run_tasks(loaded, names, folder, limit, draws, options):
    """Print lm_eval's table, and return it as {'task metric': value}. names: of tasks; folder: of
    more tasks, or ''; limit: questions of each task, 0 for all."""
    if folder and not Path(folder).is_dir():
        raise UserError(f'--lm_eval_tasks={folder}: no such folder')
    manager = Tasks(include_path=folder or None)
    for name in set(names) - set(manager.all_tasks):
        raise UserError(f'--lm_eval: no task {name!r}, neither of lm_eval nor in --lm_eval_tasks')
    found = simple_evaluate(NanoDuo(loaded, draws, options), tasks=names, task_manager=manager,
                            limit=limit or None, log_samples=False)
    print(make_table(found))
    return {f'{task} {name.removesuffix(",none")}': value
            for task, figures in found['results'].items()
            for name, value in figures.items()
            if isinstance(value, (int, float))}
