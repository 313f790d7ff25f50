"""How layers of a shape scale with their rows where CUDA's libraries compute them: cuBLAS's products and PyTorch's causal
scaled_dot_product_attention in f16, one after the other in a CUDA graph, without norms, rotation, activation and residuals.

A Mixture-of-Recursions model of three recursions computes layers of all rows, of two thirds and of a third. What these take beside
one another bounds how much faster it reads a prompt than the vanilla model of its shape. First by layers of each size alone, then by
whole models, of which the routed one scores the rows of each recursion, picks the best, gathers them, and adds what the block made of
them to the stream. Needs PyTorch and a CUDA device:

    python3 benches/layers_of_libraries.py
"""

import statistics

import torch
import torch.nn.functional as F

# name: hidden size, query and key heads, head size, intermediate size; layers before and after the block, and in it.
SHAPES = {
    "360m": (960, 15, 5, 64, 2560, 2, 10),
    "1.7b": (2048, 32, 32, 64, 8192, 0, 8),
}
TOKENS = (2047, 511)


def weights(hidden, heads, kv_heads, size, mlp):
    def matrix(outputs, inputs):
        return torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) * inputs**-0.5

    return matrix((heads + 2 * kv_heads) * size, hidden), matrix(hidden, heads * size), matrix(2 * mlp, hidden), matrix(hidden, mlp)


def run(layers, inputs, heads, kv_heads, size, attends):
    x, attended, activated = inputs
    rows = x.shape[0]
    for qkv_proj, o_proj, gate_up_proj, down_proj in layers:
        qkv = F.linear(x, qkv_proj)
        if attends:
            split = qkv.view(1, rows, heads + 2 * kv_heads, size).transpose(1, 2)
            q, k, v = split.split((heads, kv_heads, kv_heads), dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            attended = out.transpose(1, 2).reshape(rows, heads * size)
        x = F.linear(attended, o_proj)
        F.linear(x, gate_up_proj)
        x = F.linear(activated, down_proj)
    return x


def routed(layers, routers, inputs, outside, shape, attends):
    """A model whose block of layers runs once for each of `routers`, the first and last `outside / 2` layers once."""
    x, *others = inputs
    tokens, block = x.shape[0], (len(layers) - outside) // len(routers)
    ends = outside // 2
    x = run(layers[:ends], (x, *others), *shape, attends) if ends else x
    rows = torch.arange(tokens, device=x.device)
    for recursion, router in enumerate(routers):
        count = (len(routers) - recursion) * tokens // len(routers)
        picked = x[rows] if recursion else x
        gates = torch.sigmoid(F.linear(picked, router))
        if count < len(rows):
            # The best rows, in the order of their positions.
            best = gates[:, 0].topk(count).indices.sort().values
            rows, picked, gates = rows[best], picked[best], gates[best]
        first = ends + recursion * block
        y = run(layers[first : first + block], (picked, *(other[:count] for other in others)), *shape, attends)
        x = x.index_add(0, rows, y * gates) if recursion else x + y * gates
    return run(layers[len(layers) - ends :], (x, *others), *shape, attends) if ends else x


def micros(function):
    """Median of a CUDA graph of `function`, in microseconds."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    for _ in range(60):
        graph.replay()
    times = []
    for _ in range(31):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
        graph.replay()
    return statistics.median(times)


def random_inputs(rows, hidden, heads, _kv_heads, size, mlp):
    return [torch.randn(rows, n, device="cuda", dtype=torch.float16) for n in (hidden, heads * size, mlp)]


def main():
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, (*shape, outside, block) in SHAPES.items():
        layers = [weights(*shape) for _ in range(outside + 3 * block)]
        routers = torch.randn(3, 1, shape[0], device="cuda", dtype=torch.float16) * shape[0] ** -0.5
        sizes = shape[1:4]
        for attends in (False, True):
            what = "products and attention" if attends else "products"
            for tokens in TOKENS:
                rows = [tokens, 2 * tokens // 3, tokens // 3]
                inputs = [random_inputs(n, *shape) for n in rows]
                of_rows = [micros(lambda: run(layers, x, *sizes, attends)) / len(layers) for x in inputs]
                whole, second, third = of_rows
                share = (outside + block) * whole + block * (second + third)
                times = ", ".join(f"{n} rows {t:.1f}" for n, t in zip(rows, of_rows))
                print(f"{name}, {what}, us a layer: {times}; vanilla / routed {len(layers) * whole / share:.3f}", flush=True)
                model = micros(lambda: routed(layers, routers, inputs[0], outside, sizes, attends))
                vanilla = len(layers) * whole
                print(f"{name}, {what}, {tokens} tokens, us: vanilla {vanilla:.0f}, routed {model:.0f}; {vanilla / model:.3f}", flush=True)


if __name__ == "__main__":
    main()
