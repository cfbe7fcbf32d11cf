"""Speed of pre-training, beside its matrix products alone and a plain PyTorch loop. Writes results/bench/finetuning.json.

Run:  python tests/bench/finetuning.py                           (ours, and the matrix products)
      python -m venv peer; peer/bin/pip install torch numpy      (its CPU build)
      python tests/bench/finetuning.py --peer-python peer/bin/python

Every measurement is a process of its own; they take turns, `--repeats` times, and medians are compared. Rates per CPU-second hardly
change with other work on the machine. Ours includes sampling of texts, AdamW, and `--lanes` models side by side;
the peer trains one model of the same size, as minGPT does, on tokens made beforehand. Matrix products: those of the step, forwards
and backwards, each timed alone at its shape, in float32.

FLOPs of a step: 2 m n k for every product (m, k) x (k, n); the backward pass has twice the forward pass's. Nothing else is counted.
"""

import sys
import time

from harness import ROOT, count_flops, is_worker, machine, measure, medians, noting, parser_of, time_products, write

OUT = ROOT / "results" / "bench" / "finetuning.json"
STEPS = 20
SIZES = {
    "cpu": dict(width=48, layers=3, heads=4, batch=32, length=40),
    "wide": dict(width=192, layers=2, heads=6, batch=16, length=64),
}


def products(width: int, layers: int, heads: int, batch: int, length: int) -> list[tuple[int, int, int, int, int]]:
    """(times, copies, m, k, n) of the forward pass, as harness.time_products wants them."""
    places = length + 8  # a sequence of length + 9 tokens, of which the last is only predicted
    tokens, vocabulary, wide = batch * places, length + 17, width // heads
    dense = [(layers, 1, tokens, width, 3 * width), (layers, 1, tokens, width, width)]
    dense += [(layers, 1, tokens, width, 4 * width), (layers, 1, tokens, 4 * width, width), (1, 1, tokens, width, vocabulary)]
    attention = [(layers, batch * heads, places, wide, places), (layers, batch * heads, places, places, wide)]
    return dense + attention


def tokens_of(size: dict) -> int:
    """Tokens that a step predicts."""
    return size["batch"] * (size["length"] + 8)


# --- workers: each prints one JSON object as its last line


def ours(size: str, lanes: str) -> dict:
    """Tokens per CPU-second and second of pre-training's steps."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from algos.finetuning import CPU, init_model, learn, make_models, make_optimiser, sample_questions, sequence_loss

    size, lanes = SIZES[size], int(lanes)
    sizes = dict(width=size["width"], layers=size["layers"], heads=size["heads"], batch_size=size["batch"], length=size["length"])
    config = replace(CPU, priors=(0.5,), **sizes)  # two models: of the prior, and the one that only counts b
    tasks = jnp.tile(jnp.stack([tasks for _, _, tasks in make_models(config)]), (lanes, 1, 1))
    params = jax.vmap(lambda key: init_model(key, config))(jax.random.split(jax.random.key(0), 2 * lanes))
    state = params, jax.vmap(make_optimiser(config).init)(params)

    def many(state, t):
        def step(state, t):
            rates = jnp.full(2 * lanes, config.lr)
            return learn(config, sequence_loss, sample_questions, jax.random.key(t), *state, rates, tasks)[:2], None

        return jax.lax.scan(step, state, t)[0]

    many = jax.jit(many, donate_argnums=0)
    state = jax.block_until_ready(many(state, jnp.arange(STEPS)))
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(many(state, STEPS + jnp.arange(STEPS)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = 2 * lanes * STEPS * tokens_of(size)
    return {"tokens_per_cpu_s": tokens / cpu, "tokens_per_s": tokens / wall}


def matmuls(size: str) -> dict:
    """CPU-seconds that a step's matrix products take."""
    made, tokens = products(**SIZES[size]), tokens_of(SIZES[size])
    total = time_products(made)
    return {"cpu_s_per_step": total, "gflops_per_cpu_s": count_flops(made) / total / 1e9, "tokens_per_cpu_s": tokens / total}


def torch_peer(size: str) -> dict:
    """The same model in PyTorch, as minGPT writes it: pre-norm blocks, fused qkv, scaled_dot_product_attention, GELU, AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    size = SIZES[size]
    width, heads, batch, length = (size[name] for name in ("width", "heads", "batch", "length"))
    vocabulary, places = length + 17, length + 9

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

        def forward(self, x):
            q, k, v = (y.view(*y.shape[:2], heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(read.transpose(1, 2).reshape(x.shape))
            return x + self.mlp(self.norm2(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(places, width)
            self.blocks, self.norm = nn.Sequential(*[Block() for _ in range(size["layers"])]), nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)

        def forward(self, tokens):
            x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
            return self.head(self.norm(self.blocks(x)))

    torch.set_num_threads(1)  # threads that wait for one another would count as work
    torch.manual_seed(0)
    model, data = Model(), torch.randint(0, vocabulary, (STEPS, batch, places))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def step(tokens):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, vocabulary), tokens[:, 1:].reshape(-1))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    for tokens in data:
        step(tokens)
    cpu, wall = time.process_time(), time.perf_counter()
    for tokens in data:
        step(tokens)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = STEPS * tokens_of(size)
    return {"tokens_per_cpu_s": tokens / cpu, "tokens_per_s": tokens / wall}


WORKERS = {f.__name__: f for f in (ours, matmuls, torch_peer)}


# --- the comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--peer-python", help="a Python that has PyTorch")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4], help="seeds side by side, two models each")
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    runs = {}
    note = noting(runs, lambda *request: measure(__file__, *request, JAX_NUM_CPU_DEVICES="1"))  # so CPU-seconds are the work's
    for _ in range(args.repeats):
        for size in args.sizes:
            note(f"matrix products, {size}", sys.executable, "matmuls", size)
            for lanes in args.lanes:
                note(f"ours, {size}, {lanes} seeds", sys.executable, "ours", size, str(lanes))
            if args.peer_python:
                note(f"PyTorch, {size}", args.peer_python, "torch_peer", size)
    middle = medians(runs)
    summary = {
        "runs": middle,
        "ratios": ratios(middle, args),
        "repeats": args.repeats,
        "sizes": {s: SIZES[s] for s in args.sizes},
    }
    summary["flops_per_token"] = {size: count_flops(products(**SIZES[size])) / tokens_of(SIZES[size]) for size in args.sizes}
    summary["machine"] = machine()
    write(OUT, summary)


def ratios(runs: dict, args) -> dict:
    """What results/ shows."""
    rate, found = lambda name: runs[name]["tokens_per_cpu_s"], {}
    for size in args.sizes:
        for lanes in args.lanes:
            mine = rate(f"ours, {size}, {lanes} seeds")
            found[f"share of the matrix products' rate, {size}, {lanes} seeds"] = mine / rate(f"matrix products, {size}")
            if args.peer_python:
                found[f"tokens per CPU-second, ours : PyTorch, {size}, {lanes} seeds"] = mine / rate(f"PyTorch, {size}")
    return found


if __name__ == "__main__":
    main()
