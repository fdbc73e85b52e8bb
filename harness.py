"""
A model of this project as the LM of lm_eval, the Language Model Evaluation Harness of EleutherAI
(pip install lm_eval). eval.py --lm_eval=hellaswag uses it.
"""
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from configurator import UserError
from sample import generate, score


class NanoDuo(LM):
    """loaded: load(...); options: the samplers', for tasks that generate. What lm_eval calls
    likelihood is the bound by `draws` draws for a diffusion model, and exact for AR. Of contexts
    that are too long for the model the last tokens are kept."""

    def __init__(self, loaded, draws, options):
        super().__init__()
        self.tokenizer = loaded.tokenizer
        ids = self.tokenizer._replace(encode=list, decode=list)      # below, a text is its ids
        self.loaded = loaded._replace(tokenizer=ids)
        self.block_size = loaded.info['model']['block_size']
        self.draws = draws
        self.options = options

    def context(self, text, n):
        """The ids of a text, the last ones if all of them leave no room for n more."""
        ids = self.tokenizer.encode(text)
        return ids[max(0, len(ids) + n + 2 - self.block_size):]      # bos and eos are 2

    def loglikelihood(self, requests):
        """Every answer has the same random numbers."""
        result = []
        for request in requests:
            context, answer = request.args
            answer = self.tokenizer.encode(answer)
            context = self.context(context, len(answer))
            nats, _ = score(self.loaded, [answer], context, draws=self.draws)
            result.append((-nats.item(), self.is_greedy(context, answer)))
        return result

    @torch.no_grad()
    def is_greedy(self, context, answer):
        """Is each token the likeliest? A diffusion model is not asked."""
        model, _, info = self.loaded
        if info['objective'] != 'ar':
            return False
        row = [info['data']['bos_id'], *context, *answer]
        x = torch.tensor([row], device=model.output_layer.linear.weight.device)
        likeliest = model(x)[0, len(context):-1].argmax(-1)
        return likeliest.tolist() == answer

    def loglikelihood_rolling(self, requests):
        """In windows that know nothing of each other."""
        result = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            n = self.block_size - 2
            windows = [ids[i:i + n] for i in range(0, len(ids) or 1, n)]
            nats, _ = score(self.loaded, windows, draws=self.draws)
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
            row, = generate(self.loaded, prompt, length=len(prompt) + n + 1, **options)
            ids = row[-n:]
            text = self.tokenizer.decode(ids[:[*ids, eos].index(eos)])
            for stop in how['until']:
                text = text.split(stop)[0]
            result.append(text)
        return result


def run_tasks(loaded, names, folder, limit, draws, options):
    """{'task metric': value}. names: of tasks; folder: of more; limit: questions of each task,
    0 for all."""
    manager = TaskManager(include_path=folder or None)
    unknown = set(names) - set(manager.all_tasks)
    if unknown:
        raise UserError(f'lm_eval knows no task {", ".join(sorted(unknown))}')
    found = simple_evaluate(NanoDuo(loaded, draws, options), tasks=names, task_manager=manager,
                            limit=limit or None, log_samples=False)
    return {f'{task} {name.removesuffix(",none")}': float(value)
            for task, figures in found['results'].items()
            for name, value in figures.items()
            if isinstance(value, (int, float))}
