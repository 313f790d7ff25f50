"""How layers of a shape scale with their rows where CUDA's libraries compute them: cuBLAS's products and PyTorch's causal
scaled_dot_product_attention in f16, one after the other in a CUDA graph, without norms, rotation, activation, residuals and routing.

A Mixture-of-Recursions model of three recursions computes layers of all rows, of two thirds and of a third. What these take beside
one another bounds how much faster it reads a prompt than the vanilla model of its shape. Needs PyTorch and a CUDA device:

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


def micros_a_layer(layers, rows, shape, attends):
    hidden, heads, kv_heads, size, mlp = shape
    inputs = [torch.randn(rows, n, device="cuda", dtype=torch.float16) for n in (hidden, heads * size, mlp)]
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(layers, inputs, heads, kv_heads, size, attends)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(layers, inputs, heads, kv_heads, size, attends)
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
    return statistics.median(times) / len(layers)


def main():
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, (*shape, outside, block) in SHAPES.items():
        layers = [weights(*shape) for _ in range(outside + 3 * block)]
        for attends in (False, True):
            for tokens in TOKENS:
                rows = [tokens, 2 * tokens // 3, tokens // 3]
                whole, second, third = (micros_a_layer(layers, n, shape, attends) for n in rows)
                routed = (outside + block) * whole + block * (second + third)
                what = "products and attention" if attends else "products"
                times = ", ".join(f"{n} rows {t:.1f}" for n, t in zip(rows, (whole, second, third)))
                print(f"{name}, {what}, us a layer: {times}; vanilla / routed {len(layers) * whole / routed:.3f}", flush=True)


if __name__ == "__main__":
    main()
