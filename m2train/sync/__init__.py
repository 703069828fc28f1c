"""New weights from the learner to the rollout engines, through vLLM's weight-transfer API.

base.py         the interface, the update sequence over HTTP, and which vLLM flags it needs
file_engine.py  runs inside vLLM: reads a safetensors file (shared memory), cures and checks the CPU traps
nccl.py         GPU to GPU with vLLM's own nccl engine
"""

from m2train.sync.base import FileSync, WeightSync, reset_prefix_cache, weight_transfer_flags

__all__ = ["FileSync", "WeightSync", "reset_prefix_cache", "weight_transfer_flags"]
