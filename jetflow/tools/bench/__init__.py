"""How fast training, the reading of its data and sampling are on this machine."""

from jetflow.tools.bench.sampling import bench_sample, untrained
from jetflow.tools.bench.throughput import bench_data, bench_train

__all__ = ["bench_data", "bench_sample", "bench_train", "untrained"]
