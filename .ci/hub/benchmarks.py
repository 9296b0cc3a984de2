"""Linear and TIES of 64 MiB tensors, beside plain torch: `kernels benchmark <this repository>`."""

import numpy as np
import torch
from kernels.benchmark import Benchmark


class Merging(Benchmark):
    seed = 1

    def setup(self):
        size = 1 << 25
        self.base, self.a, self.b = (
            torch.randn(size, device=self.device).to(torch.bfloat16) for _ in range(3)
        )
        self.out = torch.empty_like(self.base)
        self.keep = [self.kernel.Sparsify(self.kernel.MAGNITUDE, size // 2)] * 2

    def benchmark_linear(self):
        self.kernel.combine([self.a, self.b], np.array([0.5, 0.5]), self.out)

    def verify_linear(self):
        return (0.5 * self.a.float() + 0.5 * self.b.float()).to(torch.bfloat16)

    def benchmark_ties(self):
        inputs = [self.a, self.b]
        chosen = self.kernel.select(inputs, self.base, self.keep)
        self.kernel.consensus(
            inputs, self.base, [1.0, 1.0], chosen, self.out, elect=True, normalize=True
        )
