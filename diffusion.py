"""
The maths of Duo that does not know the training step: noise, the diffusion transformation, losses, reverse steps.

"The Diffusion Duality" (arXiv 2506.10892; equations are numbered as in its v3). A word is noised by keeping it with
probability alpha and else drawing one of all K words; the same process falls out of a Gaussian one by argmax (the
duality, eq. 13), so a Gaussian's softmax can stand in for its argmax while training: the curriculum.

Shapes: B batch, T tokens, K vocabulary, C channels. Ids are int64; losses are in nats; alpha, dalpha, gamma are
(B,1), or anything that broadcasts against (B,T). Randomness is torch's default generator: seed it to repeat a draw.
"""
from functools import partial
from math import log, pi, sqrt

import torch
import torch.nn.functional as F
from torch.special import log_ndtr, ndtri


def wide(device):
    """Where small float64 work runs: on the device itself, or on the CPU where there is no float64 (Apple's MPS)."""
    return torch.device('cpu') if torch.device(device).type == 'mps' else torch.device(device)

# ---------------------------------------------------------------------------------------------------------------------
# schedules: how much of the clean text is left

def stratified_times(u, first, count, total, low=0.0, device='cpu'):
    """count (B,1) float64 times in [low, 1): samples first .. first+count-1 of `total` that share one offset u."""
    i = torch.arange(first, first + count, dtype=torch.float64, device=wide(device)).unsqueeze(-1)
    return low + (1 - low) * ((u + i) / total % 1)


def alpha_linear(t, eps=1e-3):
    """alpha(t) and its time derivative: the log-linear schedule, alpha = 1 - (1 - eps) t. t a tensor."""
    return 1 - (1 - eps) * t, torch.full_like(t, eps - 1)


def transform(gamma, vocab_size):
    """The diffusion transformation operator (eq. 11): the alpha of the discrete process that a Gaussian one has as its
    argmax, and d alpha / d gamma; float64, of gamma's shape. gamma is the log noise-to-signal ratio.

    The true word is the argmax with probability P = int phi(z - mu) Phi(z)^(K-1) dz, mu = exp(-gamma/2). In
    y = z - mu the integrand is smooth and over by |y| = 9, so a plain sum is exact to ten digits or more: no table.
    """
    K, h = vocab_size, 0.05
    gamma = gamma.to(wide(gamma.device), torch.float64).unsqueeze(-1)
    mu = torch.exp(-gamma / 2)
    y = torch.arange(-9, 9 + h, h, dtype=torch.float64, device=gamma.device)
    mass = h / sqrt(2 * pi) * torch.exp(-y * y / 2 + (K - 1) * log_ndtr(mu + y))  # (...,361)
    alpha = (K * mass.sum(-1) - 1) / (K - 1)
    dalpha = K / (K - 1) * (y * mass * (-mu / 2)).sum(-1)
    return alpha, dalpha


def gaussian(gamma):
    """The latent's two scales, w = a x0 + s eps: a^2 = sigmoid(-gamma), s^2 = sigmoid(gamma); float64."""
    gamma = gamma.to(wide(gamma.device), torch.float64)
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()

# ---------------------------------------------------------------------------------------------------------------------
# noise: from clean words to noisy ones

def q_sample(x0, alpha, vocab_size):
    """xt (B,T) ~ q(xt|x0) = alpha x0 + (1-alpha)/K (eq. 1): the uniform word may be x0 again."""
    keep = torch.rand(x0.shape, device=x0.device) < alpha
    return torch.where(keep, x0, torch.randint_like(x0, vocab_size))


def corrupt(x0, alpha, vocab_size, objective='duo'):
    """xt (B,T), sigma (B,1) that the network is told: q_sample for 'duo'; for 'mdlm' each word is kept with probability
    alpha, else it is the mask, word number vocab_size, and the network, which can count masks, is told nothing."""
    if objective == 'duo':
        return q_sample(x0, alpha, vocab_size), -alpha.log()
    keep = torch.rand(x0.shape, device=x0.device) < alpha
    return torch.where(keep, x0, vocab_size), torch.zeros_like(alpha)


def largest_normals(shape, n, k, device):
    """The k largest of n standard normals, descending, (*shape, k) float64, without drawing the other n - k.

    The largest of n uniforms is U^(1/n), the next U'^(1/(n-1)) times that, ...; so their logs are sums of exponentials.
    """
    e = torch.empty(*shape, k, dtype=torch.float64, device=device).exponential_()
    log_u = -(e / torch.arange(n, n - k, -1, device=device)).cumsum(-1)
    return -ndtri(-torch.expm1(log_u))            # by the upper tail, where the digits are


def other_words(x0, vocab_size, k):
    """k distinct words other than x0, (B,T,k), each ordered choice equally likely."""
    taken, words = x0.unsqueeze(-1), []
    for i in range(k):
        # the r-th word that is still free: step over the taken ones in ascending order
        r = torch.randint_like(x0, vocab_size - 1 - i)
        for word in taken.unbind(-1):
            r = r + (r >= word)
        words.append(r)
        taken = torch.cat([taken, r.unsqueeze(-1)], dim=-1).sort(dim=-1).values
    return torch.stack(words, dim=-1)


def soft_tokens(x0, gamma, tau, vocab_size, k):
    """The curriculum's input (eq. 21): softmax(w / tau) of the Gaussian latent w = a onehot(x0) + s eps.

    Returns ids (B,T,k) and weights (B,T,k) float32, heaviest first, and zt (B,T) = argmax w. The k words are the true
    one and the k-1 that got the most noise; all others carry (exactly, in expectation) what the weights lack to one.
    Nothing of size K is made. With k = vocab_size it is the dense softmax. 2 <= k <= vocab_size.
    """
    n, m = vocab_size - 1, k - 1                                                  # the other words; how many I draw
    device = wide(x0.device)
    a, s = (v.to(device) for v in gaussian(gamma))
    noise = largest_normals(x0.shape, n, m, device)
    true = a + s * torch.randn(x0.shape, dtype=torch.float64, device=device)
    w = torch.cat([true.unsqueeze(-1), s.unsqueeze(-1) * noise], dim=-1) / tau    # (B,T,k)
    w, order = w.sort(dim=-1, descending=True)
    ids = torch.cat([x0.unsqueeze(-1), other_words(x0, vocab_size, m)], dim=-1).gather(-1, order.to(x0.device))
    # the n - m others are normals cut off at the smallest I drew: E[exp(b z) | z < cut] in closed form
    b, cut = s / tau, noise[..., -1]
    total = w.logsumexp(-1)
    if n > m:
        rest = log(n - m) + b * b / 2 + log_ndtr(cut - b) - log_ndtr(cut)
        total = torch.logaddexp(total, rest)
    weights = torch.exp(w - total.unsqueeze(-1)).float()
    return ids, weights.to(x0.device), ids[..., 0]


def coupled_pair(x0, gamma_t, gamma_s, vocab_size):
    """zt, zs (B,T): the argmaxes of one Gaussian path at two noise levels, sharing their noise (Algorithm 1).

    Of all other words only the one with the most noise can win, and it is the same at both levels.
    """
    device = wide(x0.device)
    most = largest_normals(x0.shape, vocab_size - 1, 1, device).squeeze(-1)
    own = torch.randn(x0.shape, dtype=torch.float64, device=device)
    other = other_words(x0, vocab_size, 1).squeeze(-1)

    def argmax(gamma):
        a, s = (v.to(device) for v in gaussian(gamma))
        return torch.where((a + s * own > s * most).to(x0.device), x0, other)
    return argmax(gamma_t), argmax(gamma_s)

# ---------------------------------------------------------------------------------------------------------------------
# losses

def nelbo(logits, xt, x0, alpha, dalpha, scale=None):
    """Duo's Rao-Blackwellised NELBO, nats per token (eq. 17). logits (...,K); xt, x0 (...) ids; 0 < alpha < 1.

    With scale (...): also scale times the gradient by the logits, in closed form (loss (...), gradient (...,K)).

    The bound sums, over the words j that xt might come from, w_j (u_j - 1 - log u_j): w_j the true rate, u_j the
    model's rate over the true one. It is the paper's in another order: no term is negative, so nothing cancels.
    """
    K = logits.size(-1)
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    lo = 1 - alpha                       # before any cast: near alpha = 1 its digits would be lost
    hi = K * alpha + lo                  # K q(xt|x0) of a word that is x0; lo of one that is not
    a, da, lo, hi, r = (v.to(p.dtype).unsqueeze(-1) for v in (alpha, dalpha, lo, hi, lo / hi))  # (...,1)
    xt, x0, Ka = xt.unsqueeze(-1), x0.unsqueeze(-1), K * a
    same = xt == x0
    pt, p0 = p.gather(-1, xt), p.gather(-1, x0)                      # K q(xt|.) as the model has it is Ka p + lo:
    bt, b0 = Ka * pt + lo, Ka * p0 + lo                              # at xt, and at x0

    w = torch.where(same, r, 1)                                      # the true rate, of all words but x0 ...
    d = torch.addcmul(Ka / bt * (same.to(p.dtype) - pt), p, Ka / (w * bt))           # u - 1 = (Ka p + lo)/(w bt) - 1
    d = d.scatter_(-1, xt, 0).scatter_(-1, x0, 0)
    others = w * (d - torch.log1p(d)).sum(-1, keepdim=True)
    u0 = r * b0 / bt                                                 # ... whose own is 1 / r, unless xt is x0
    true = torch.where(same, 0, (u0 - 1 - torch.log(u0)) / r)
    loss = (-da / Ka * (others + true)).squeeze(-1)
    if scale is None:
        return loss

    # f_j = bt/dalpha p_j dloss/dp_j, less p_j times a constant: the softmax does not see it
    f = torch.div(p, d.add_(1), out=d).scatter_(-1, x0, p0 * bt / (r * b0))
    f.scatter_(-1, xt, pt + pt * K * Ka / bt * torch.where(same, (1 - pt) / hi, -pt / lo))
    grad = torch.addcmul(f, p, -f.sum(-1, keepdim=True)).mul_(da / bt * scale.unsqueeze(-1))
    return loss, grad.to(logits.dtype)


def cross_entropy(logits, targets, weights, scale=None):
    """weights (...) times -log softmax(logits)[targets]: the autoregressive loss where the weights are one. With scale
    also the scaled gradient, as nelbo."""
    logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    targets, weights = targets.unsqueeze(-1), weights.to(logp.dtype)
    loss = -weights * logp.gather(-1, targets).squeeze(-1)
    if scale is None:
        return loss
    p = logp.exp_()
    p.scatter_add_(-1, targets, -torch.ones_like(p[..., :1]))
    return loss, p.mul_((weights * scale).unsqueeze(-1)).to(logits.dtype)


def mdlm_nelbo(logits, xt, x0, alpha, dalpha, mask_id, scale=None):
    """The masked-diffusion baseline's NELBO (MDLM, arXiv 2406.07524), nats per token: cross-entropy at masked words,
    weighted by -dalpha / (1 - alpha). SUBS: the mask itself is never predicted, and a word that shows is known."""
    weights = torch.where(xt == mask_id, -dalpha / (1 - alpha), 0)
    columns = torch.arange(logits.size(-1), device=logits.device)
    return cross_entropy(logits.masked_fill(columns == mask_id, -torch.inf), x0, weights, scale)


def teacher_kl(logits, h, weight, bias, forward=False, scale=None):
    """KL(student || teacher), nats per token (eq. 23; the direction of the published code), or with forward
    KL(teacher || student): logits (...,K) are the student's; the teacher's come from its trunk's output h (...,C) and
    its head, here, so that nobody keeps them. With scale also the scaled gradient by the student's logits, as nelbo."""
    logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    teacher = F.linear(*(v.to(logits.dtype) for v in (h, weight, bias)))
    logq = teacher.log_softmax(-1, dtype=logp.dtype)
    p, ratio = logp.exp(), logp - logq
    q = logq.exp() if forward else None
    loss = -(q * ratio).sum(-1) if forward else (p * ratio).sum(-1)
    if scale is None:
        return loss
    grad = p - q if forward else p * (ratio - loss.unsqueeze(-1))
    return loss, (grad * scale.unsqueeze(-1)).to(logits.dtype)


def chunks(h, weight, bias, *args):
    """Walk over tokens: yield (slice, h's rows (n,C), logits (n,K), the args' rows) for h (N,C), args (N,...), so that
    only one chunk's logits exist at a time. The head runs in autocast's precision where that is on, else in h's."""
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    weight, bias = weight.to(dtype), bias.to(dtype)
    n = max(64, (2 ** 28 if h.is_cuda else 2 ** 18) // weight.size(0))   # on a CPU: about what its caches hold
    n = 2 ** (n.bit_length() - 1)        # a power of two divides most batches: one shape, one compiled kernel
    for i in range(0, h.size(0), n):
        s = slice(i, i + n)
        x = h[s].to(dtype)
        yield s, x, F.linear(x, weight, bias), [a[s] for a in args]


class HeadLoss(torch.autograd.Function):
    """Head, loss and all gradients in one pass: a chunk's logits are made once, used, and forgotten."""

    @staticmethod
    def forward(ctx, h, weight, bias, loss_fn, token_weights, grad_scale, *args):
        loss = token_weights.new_zeros(())
        dh, dw, db = torch.empty_like(h), torch.zeros_like(weight), torch.zeros_like(bias)
        for s, x, logits, (tw, *rest) in chunks(h, weight, bias, token_weights, *args):
            each, grad = loss_fn(logits, *rest, scale=tw * grad_scale)
            loss += (tw * each).sum()                                # no matmul: autocast would round it
            dh[s] = grad @ weight.to(grad.dtype)
            if dw.dtype == x.dtype:
                dw.addmm_(grad.T, x)
            else:
                dw += grad.T @ x                                     # float32 sums of half-precision products
            db += grad.sum(0, dtype=db.dtype)
        ctx.save_for_backward(dh, dw, db)
        ctx.grad_scale, ctx.rest = grad_scale, [None] * (3 + len(args))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        g = grad / ctx.grad_scale
        return *(d * g for d in ctx.saved_tensors), *ctx.rest


def head_loss(h, weight, bias, loss_fn, args, mask=None, grad_scale=1.0):
    """Mean over tokens of a loss of the logits h W^T + b, without ever holding all (B,T,K) of them.

    h (B,T,C), weight (K,C), bias (K,). loss_fn(logits (n,K), *args, scale (n,)) -> loss (n,), gradient (n,K), as nelbo;
    args broadcast over (B,T). mask (B,T): the tokens' weights, 0 leaves one out. grad_scale: a GradScaler's scale
    (a tensor, so nobody waits for it): half-precision gradients are made at that scale and do not vanish.
    """
    h, *args = flatten_tokens(h, *args)
    w = (torch.ones_like(h[:, 0]) if mask is None else mask.flatten()).to(torch.promote_types(h.dtype, torch.float32))
    return HeadLoss.apply(h, weight, bias, loss_fn, w / w.sum().clamp(min=1e-9), grad_scale, *args)


def head_nelbo(h, weight, bias, xt, x0, alpha, dalpha, mask=None, grad_scale=1.0, loss_fn=nelbo):
    """nelbo straight from the trunk's output, its mean over tokens: see head_loss. loss_fn: nelbo, or it compiled."""
    return head_loss(h, weight, bias, loss_fn, (xt, x0, alpha, dalpha), mask, grad_scale)


@torch.no_grad()
def head_each(h, weight, bias, loss_fn, args):
    """Every token's loss (B,T) instead of their mean: for evaluation, no gradient."""
    flat, *args = flatten_tokens(h, *args)
    losses = [loss_fn(logits, *rest) for _, _, logits, rest in chunks(flat, weight, bias, *args)]
    return torch.cat(losses).view(h.shape[:2])


def flatten_tokens(h, *args):
    """(B,T,...) -> (B*T,...); each arg is first broadcast over the tokens."""
    return [a.expand(h.shape[:2] + a.shape[2:]).flatten(0, 1) for a in (h, *args)]


def loss_of(objective, vocab_size):
    """The loss function of logits that an objective means."""
    return {'duo': nelbo, 'mdlm': partial(mdlm_nelbo, mask_id=vocab_size), 'ar': cross_entropy}[objective]


def token_nll(model, x0, t, vocab_size, objective='duo', loss_fn=nelbo):
    """What is validated, (B,T) nats per token: one draw of the bound at times t (B,1), whatever was trained on; for an
    autoregressive model the exact (B,T-1), and t does not matter. loss_fn: loss_of(...), or it compiled."""
    if objective == 'ar':
        targets = x0[:, 1:]
        return model(x0[:, :-1], head=partial(head_each, loss_fn=loss_fn, args=(targets, torch.ones_like(targets))))
    alpha, dalpha = (v.float().to(x0.device) for v in alpha_linear(t))
    xt, sigma = corrupt(x0, alpha, vocab_size, objective)
    return model(xt, sigma, head=partial(head_each, loss_fn=loss_fn, args=(xt, x0, alpha, dalpha)))


@torch.no_grad()
def evaluate(nll, get_rows, n, batch_size, device='cpu', rank=0, world=1, pad_id=None):
    """Negative log-likelihood per token of each of n rows, nats, (n,) float64 on the CPU: stratified times over [0,1]
    and noise that are the same on every call. nll(x0 (B,T), t (B,1)) -> (B,T); get_rows(numbers) -> x0 on the device.
    The ranks share the batches, and all get the whole. Tokens that are pad_id are not scored; rows with such are given
    linearised: the mean of what returns is all losses over all scored tokens, and its error is that of this ratio."""
    each = torch.zeros(2, n, dtype=torch.float64, device=wide(device))               # mean losses, scored tokens
    for first in range(rank * batch_size, n, world * batch_size):
        count = min(batch_size, n - first)
        x0 = get_rows(range(first, first + count))
        torch.manual_seed(first)
        t = stratified_times(0.5, first, count, n, device=device)
        losses = nll(x0, t)
        scored = torch.ones_like(losses) if pad_id is None else (x0 != pad_id)[:, -losses.size(1):].to(losses)
        mean = (losses * scored).sum(-1) / scored.sum(-1)
        each[:, first:first + count] = torch.stack([mean, scored.sum(-1)]).to(each)
    if world > 1:
        torch.distributed.all_reduce(each)
    mean, scored = each.cpu()
    share = scored / scored.mean()                                                   # one, where nothing is padded
    return share * mean + (1 - share) * (share * mean).mean()


def mean_and_error(each):
    """The mean of independent numbers, and its standard error. (Stratified times make the true error a little less.)"""
    return each.mean().item(), (each.std() / sqrt(len(each))).item() if len(each) > 1 else float('nan')

# ---------------------------------------------------------------------------------------------------------------------
# reverse: from noise to text

def posterior(probs, xt, alpha_s, alpha_t):
    """q(xs|xt, x0 ~ probs) (B,T,K), the whole reverse distribution (eq. 5); probs (B,T,K), alphas (B,1) or numbers.
    reverse_step draws from it without making it."""
    K = probs.size(-1)
    a_s, a_t = (torch.as_tensor(a, dtype=probs.dtype, device=probs.device).unsqueeze(-1) for a in (alpha_s, alpha_t))
    a_ts = a_t / a_s
    here = F.one_hot(xt, K).to(probs.dtype)
    q = here * (K * a_t * probs + a_ts - a_t) + (a_s - a_t) * probs + (1 - a_ts) * (1 - a_s) / K
    return q / q.sum(-1, keepdim=True)


def categorical(p):
    """One draw (...) from each row of p (...,K), which need not sum to one. Two uniform numbers a row: the first picks
    a block of about sqrt(K) words, the second a word in it, both in float64. (The usual K float32 Gumbels cost more and
    cut the tail off: words below 1e-7 are never drawn.)"""
    K = p.size(-1)
    size = int(sqrt(K))
    full = K // size * size
    sums = p[..., :full].unflatten(-1, (-1, size)).sum(-1, dtype=torch.float64)      # (...,blocks)
    if full < K:
        sums = torch.cat([sums, p[..., full:].sum(-1, keepdim=True, dtype=torch.float64)], dim=-1)

    def draw(weights):
        cdf = weights.double().cumsum(-1)
        u = torch.rand(cdf.shape[:-1], dtype=torch.float64, device=cdf.device).unsqueeze(-1) * cdf[..., -1:]
        return (cdf <= u).sum(-1, keepdim=True)
    words = draw(sums) * size + torch.arange(size, device=p.device)                  # (...,size) of the block
    inside = p.gather(-1, words.clamp(max=K - 1)) * (words < K)
    return words.gather(-1, draw(inside)).squeeze(-1)


def reverse_step(logits, xt, alpha_s, alpha_t, kappa=1.0):
    """xs (...) ~ kappa q(xs|xt) + (1 - kappa) [alpha_s q(x0|xt) + (1 - alpha_s)/K], x0 ~ softmax(logits (...,K)).

    kappa = 1 is ancestral sampling (eq. 5), less is a Psi-sampler's step (chapter II, arXiv 2602.21185, eq. 12). Drawn
    as the mixture it is: stay at xt, or take a word from the softmax, or any word. alphas are numbers, or float64
    (...): their differences are small.
    """
    K = logits.size(-1)
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    pt = K * alpha_t * p.gather(-1, xt.unsqueeze(-1)).squeeze(-1).double()
    a_ts, total = alpha_t / alpha_s, pt + 1 - alpha_t
    stay = kappa * (pt + a_ts - alpha_t) + (1 - kappa) * alpha_s * pt
    word = kappa * (alpha_s - alpha_t) + (1 - kappa) * alpha_s * (1 - alpha_t)
    u = torch.rand(xt.shape, dtype=torch.float64, device=xt.device) * total
    anything = torch.randint_like(xt, K)
    return torch.where(u < stay, xt, torch.where(u < stay + word, categorical(p), anything))


def top_p_filter(logits, top_p):
    """Keep the smallest set of words whose probability reaches top_p (the nucleus); the others get -inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    p = ordered.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logits.scatter(-1, order, ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf))


def mask_step(logits, xt, alpha_s, alpha_t, mask_id):
    """xs (...) of MDLM's ancestral sampler: a mask becomes a word of softmax(logits (...,K)), those of the words alone,
    with probability (alpha_s - alpha_t) / (1 - alpha_t); a word stays."""
    move = torch.rand(xt.shape, dtype=torch.float64, device=xt.device) * (1 - alpha_t) < alpha_s - alpha_t
    return torch.where((xt == mask_id) & move, categorical(logits.softmax(-1)), xt)


def check_sampler(objective, sampler='ancestral', psi='rescale', eta=0.0, top_p=0.0, **_):
    """-> eta, top_p: in place of zeros what was published for psi (at 256 steps). One line if that cannot be."""
    published = {'rescale': (0.05, 0.9), 'cap': (0.01, 0.9), 'constant': (0.01, 0.9), 'loop': (0.01, 0.95)}
    for name, value, known in (('sampler', sampler, ('ancestral', 'psi', 'commit')), ('psi', psi, tuple(published))):
        if value not in known:
            raise SystemExit(f'--{name}={value}: it is one of {", ".join(known)}')
    if sampler != 'ancestral' and objective != 'duo':
        raise SystemExit(f'--sampler={sampler} is for a Duo; this is a model of objective {objective}')
    return eta or published[psi][0], top_p or (published[psi][1] if sampler == 'psi' else 1.0)


def sampling_schedule(steps, psi=None, eta=0.0, eps=1e-5):
    """alphas (steps + 1 numbers), from noise to nearly clean, and kappas (steps): reverse step i goes from alphas[i] to
    alphas[i + 1] with kappas[i]. psi None is ancestral sampling, kappa 1. Else the Psi-samplers of chapter II, whose
    kappa = 1 - sigma / (1 - alpha_s), within [0, 1], re-noises more the larger eta is:

    rescale   sigma = eta min(eta, (1 - alpha_s)/alpha_t). This is the published code; it makes small eta eta squared,
              where the rule it is named after (ReMDM, arXiv 2503.00307) reads eta min(1, (1 - alpha_s)/alpha_t)
    cap       sigma = min(eta, (1 - alpha_s)/alpha_t)
    constant  sigma = eta
    loop      ancestral down to alpha = 0.9 in 45% of the steps, half of them there with sigma = eta, ancestral again
    """
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64)
    middle = slice(None)
    if psi == 'loop':
        t, high, mid = 0.1 / 0.999, round(0.45 * (steps + 1)), round(0.5 * (steps + 1))     # alpha(t) = 0.9
        times = torch.cat([torch.linspace(1, t, high, dtype=torch.float64), times.new_full((mid,), t),
                           torch.linspace(t, eps, steps + 1 - high - mid, dtype=torch.float64)])
        middle = slice(high, max(high, high + mid - 1))
    alphas, kappas = alpha_linear(times)[0], torch.ones(steps, dtype=torch.float64)
    if psi:
        alpha_t, alpha_s = alphas[:-1], alphas[1:]
        capped = ((1 - alpha_s) / alpha_t).clamp(max=eta)
        sigma = {'rescale': eta * capped, 'cap': capped}.get(psi, eta)
        kappas[middle] = (1 - sigma / (1 - alpha_s)).clamp(0, 1)[middle]
    return alphas.tolist(), kappas.tolist()


def commit(words, entropy, alpha_s, vocab_size, settle):
    """xs (B,T): of the words (B,T) predicted, those with the least entropy (B,T), in nats, stay: a share alpha_s of
    each row, and all below settle; the others become any word again.

    With the share picked at random this is the Psi-sampler's step with kappa = 0, whose marginals are proven right.
    Picking it by confidence is a heuristic: better words earlier, less variety, no guarantee.
    """
    rank = entropy.argsort(-1).argsort(-1)
    keep = (rank < round(alpha_s * words.size(1))) | (entropy < settle)
    return torch.where(keep, words, torch.randint_like(words, vocab_size))


@torch.no_grad()
def denoise(model, xt, alphas, kappas, fixed=None, temperature=1.0, top_p=1.0, greedy=False, mask_id=None, settle=None):
    """Yields xt (B,T) after each network call: one for each step of a sampling_schedule, and one more for noise removal
    (alpha_s = 1; with greedy the likeliest word is taken there). xt starts as noise: any words, or all mask_id for a
    masked-diffusion model. Positions where fixed (B,T) is true keep what they hold: a prompt. With settle (nats) words
    stay by confidence (see commit), and when all of them are that sure, noise removal is next."""
    linear, given, changed = model.output_layer.linear, xt, True
    last, settled = len(kappas), False
    for i, (alpha_t, alpha_s, kappa) in enumerate(zip(alphas, [*alphas[1:], 1.0], [*kappas, 1.0])):
        if settled and i < last:
            continue
        if mask_id is None:
            h = model.hidden(xt, -torch.log(torch.full((xt.size(0),), alpha_t, device=xt.device)))
        elif changed:                            # told no time, the network would only repeat itself on the same words
            h = model.hidden(xt, torch.zeros(xt.size(0), device=xt.device))
        flat_h, flat = flatten_tokens(h, xt)
        xs, entropy = torch.empty_like(flat), torch.zeros(flat.shape, device=flat.device)
        for s, _, logits, (x,) in chunks(flat_h, linear.weight, linear.bias, flat):
            logits, x = logits.to(wide(x.device)).float() / temperature, x.to(wide(x.device))
            if mask_id is not None:
                logits = logits[:, :mask_id]                                      # the mask is never predicted
            if top_p < 1:
                logits = top_p_filter(logits, top_p)
            if settle is not None:
                entropy[s] = torch.special.entr(logits.softmax(-1)).sum(-1)
            if mask_id is not None:
                xs[s] = mask_step(logits, x, alpha_s, alpha_t, mask_id)
            elif greedy and i == last:
                xs[s] = logits.argmax(-1)
            else:
                xs[s] = reverse_step(logits, x, alpha_s if settle is None else 1.0, alpha_t, kappa)
        xs, entropy = xs.view_as(xt), entropy.view_as(xt)
        if fixed is not None:
            xs, entropy = torch.where(fixed, given, xs), entropy.masked_fill(fixed, -1.0)
        settled = settle is not None and bool((entropy < settle).all())
        if settle is not None and i < last and not settled:
            xs = commit(xs, entropy, alpha_s, linear.out_features, settle)
            xs = xs if fixed is None else torch.where(fixed, given, xs)
        changed = mask_id is not None and not torch.equal(xs, xt)
        xt = xs
        yield xt


@torch.no_grad()
def write_on(model, xt, fixed=None, temperature=1.0, top_p=1.0):
    """Autoregressive sampling: yields xt (B,T) after each word, from left to right; the first column is given, and so
    is what stands where fixed (B,T) is true. Keys and values of what is written are kept, not computed again."""
    linear, xt, cache = model.output_layer.linear, xt.clone(), [[] for _ in model.blocks]
    for i in range(1, xt.size(1)):
        h = model.hidden(xt[:, i - 1:i], cache=cache)[:, 0]                                    # (B,C)
        for s, _, logits, _ in chunks(h, linear.weight, linear.bias):
            logits = logits.to(wide(xt.device)).float() / temperature
            word = categorical((logits if top_p == 1 else top_p_filter(logits, top_p)).softmax(-1)).to(xt.device)
            xt[s, i] = word if fixed is None else torch.where(fixed[s, i], xt[s, i], word)
        yield xt.clone()


def blank(objective, shape, vocab_size, bos_id, device='cpu'):
    """What sampling starts from, ids of shape (B,T): random words, all masks, or a bos to write on from."""
    if objective == 'duo':
        return torch.randint(vocab_size, shape, device=device)
    return torch.full(shape, vocab_size if objective == 'mdlm' else bos_id, device=device)


def reverse_process(model, xt, objective, vocab_size, steps, fixed=None, temperature=1.0, top_p=1.0, greedy=False,
                    sampler='ancestral', psi='rescale', eta=0.0, settle=0.1):
    """The sampler that suits the objective, from blank() on: yields xt (B,T) after each network call. sampler:
    'ancestral'; for a Duo also 'psi', with psi and eta as in sampling_schedule, or 'commit', settle as in denoise."""
    if objective == 'ar':
        return write_on(model, xt, fixed, temperature, top_p)
    alphas, kappas = sampling_schedule(steps, psi if sampler == 'psi' else None, eta)
    return denoise(model, xt, alphas, kappas, fixed, temperature, top_p, greedy,
                   vocab_size if objective == 'mdlm' else None, settle if sampler == 'commit' else None)
