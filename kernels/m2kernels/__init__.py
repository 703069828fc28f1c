"""m2kernels: fused operations for training language models with reinforcement learning.

Every op takes ``backend="auto"`` and accepts int32 or int64 integer tensors. ``torch`` is the
readable reference, ``cpu`` and ``cuda`` are the C++ kernels, ``triton`` those of a GPU.
:func:`doctor` says which of them this machine can run, and why not.
"""

from importlib.metadata import version as _version

from m2kernels.doctor import doctor
from m2kernels.group_advantage import group_advantage
from m2kernels.linear_logprob import LogProb, linear_logprob
from m2kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from m2kernels.logprob import logprob
from m2kernels.metrics import combine_metrics
from m2kernels.pack_balanced import pack_balanced
from m2kernels.packing_cost import KernelCosts, ModelFlops, PackingChoice, PackingWork, choose_packing
from m2kernels.plan_tree import TreePlan, plan_tree
from m2kernels.policy_loss import LossSpec, PolicyLoss, policy_loss
from m2kernels.tree_attention import tree_attention

__all__ = [
    "KernelCosts",
    "LinearPolicyLoss",
    "LogProb",
    "LossSpec",
    "ModelFlops",
    "PackingChoice",
    "PackingWork",
    "PolicyLoss",
    "TreePlan",
    "__version__",
    "choose_packing",
    "combine_metrics",
    "doctor",
    "group_advantage",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "pack_balanced",
    "plan_tree",
    "policy_loss",
    "tree_attention",
]

__version__ = _version("m2train")
